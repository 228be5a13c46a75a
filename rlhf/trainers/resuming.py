"""How a run goes on: which checkpoint it continues from, what is left to do, and what a line of the log began."""

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from transformers.trainer_utils import SaveStrategy, TrainOutput

from rlhf.data.fingerprint import fingerprint
from rlhf.runs.files import METRICS_FILE, SAMPLES_FILE, append_line
from rlhf.trainers.checkpoint_files import last_whole_checkpoint, problem_of
from rlhf.trainers.checkpointing import Checkpointing
from rlhf.trainers.option_changes import RECORD, check_changes, recorded_options
from rlhf.trainers.recording import CommandRecord, DataSource, OpenRecord, begin_record, closing, model_facts
from rlhf.trainers.run_folder import finish_deletion, finish_interrupted, last_marked_checkpoint
from rlhf.trainers.sharding import check_sharding_of

logger = logging.getLogger(__name__)

RESULTS = "all_results.json"  # the last file of a run
AUTO = "auto"  # go on where there is a checkpoint, start where there is none


class Resuming(Checkpointing):
    """A trainer whose resumed run has the log of an uninterrupted one, also where steps since its last line are lost.

    transformers begins its sums for the log anew when it resumes, and trains one step more where none is left.
    """

    # In output_dir; a resumed run cuts them back.
    appended_files: ClassVar[tuple[str, ...]] = (METRICS_FILE, SAMPLES_FILE)

    data_sources: Sequence[DataSource] = ()  # as they were passed

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._log_window: dict[str, Any] | None = None  # of the checkpoint, until training begins
        # Options that are no part of `args`, of a command; recorded in each checkpoint.
        self.command_options: dict[str, Any] = {}
        self.command = CommandRecord()  # that started the run
        self._record: dict[str, Any] = {}
        self._in_own_folder = False  # whether the checkpoint lies there
        self._training_began = 0.0  # as a time, less that of the run's earlier parts
        self._earlier_seconds = 0.0
        self._step_figures: tuple[Any, Any] = (None, None)  # gradient norm and learning rate of the last step

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As ``transformers.Trainer``; by default from ``args.resume_from_checkpoint``."""
        requested = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        run_folder = Path(str(self.args.output_dir))
        # The first process tidies the folder before any process looks at it.
        with self.args.main_process_first(local=False, desc="looking for checkpoints"):
            if self.args.process_index == 0:
                finish_interrupted(run_folder)
            checkpoint = checkpoint_to_resume(requested, str(run_folder))
        self._record = self._run_options()
        if checkpoint is not None:
            self.check_checkpoint(checkpoint)
            log_resuming(checkpoint, self.args.max_steps)
        elif self.args.process_index == 0:
            # Of an earlier run in this folder, which had no checkpoint, or which is not resumed.
            cut_back(run_folder, dict.fromkeys(self.appended_files, 0))
        self._in_own_folder = checkpoint is not None and Path(checkpoint).resolve().parent == run_folder.resolve()
        if checkpoint is not None and self._in_own_folder and self.args.process_index == 0:
            finish_deletion(Path(checkpoint), self.args.save_total_limit)
        self._log_window, self._earlier_seconds, self._training_began = None, 0.0, 0.0
        with closing(self._begin_record(run_folder), lambda: self.state, lambda: self._training_began):
            return super().train(checkpoint, *args, **kwargs)

    def _begin_record(self, run_folder: Path) -> OpenRecord | None:
        """Write ``run.yaml``, in the first process."""
        if self.args.process_index != 0:
            return None
        facts = {"trainer": type(self).__name__, "model": model_facts(self.model.model)}
        return begin_record(run_folder, self.command, self.args, facts, self.data_sources, self._in_own_folder)

    def check_checkpoint(self, checkpoint: str) -> None:
        """Refuse to go on from the checkpoint of another run.

        Args:
            checkpoint: its folder.
        Raises:
            ValueError: it is sharded in another way, or options differ that move figures.
        """
        check_sharding_of(checkpoint, self.accelerator)
        check_changes(checkpoint, self._run_options(), self.args.allow_changes)

    def _run_options(self) -> dict[str, Any]:
        """What a run that goes on from a checkpoint of this one is compared with."""
        options = {option.name: getattr(self.args, option.name) for option in fields(self.args) if option.init}
        facts = {
            "trainer": type(self).__name__,
            "processes": self.args.world_size,
            # Log-probs of the reference belong to the options.
            "rows": fingerprint(self.train_dataset, without=getattr(self, "ref_columns", ())),
        }
        return recorded_options(options | self.command_options | facts)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            text = json.dumps(self._record, indent=2, sort_keys=True)
            (Path(output_dir) / RECORD).write_text(text + "\n", encoding="utf-8")

    def resume_state(self) -> dict[str, Any]:
        """The state of this process that a resumed run needs, beyond weights, optimizer and the number of steps."""
        files = {name: Path(str(self.args.output_dir)) / name for name in self.appended_files}
        grad_norm, learning_rate = self._step_figures
        return {
            "appended_files": {name: file.stat().st_size if file.exists() else 0 for name, file in files.items()},
            "log_window": {
                "loss": self._tr_loss.detach().cpu().clone(),  # summed since the last line of the log
                "total_loss": self._total_loss_scalar,
                "last_logged_step": self._globalstep_last_logged,
                "grad_norm": None if grad_norm is None else float(grad_norm),
                "learning_rate": learning_rate,
                "seconds": time.time() - self._training_began,
            },
        }

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`resume_state` returned."""
        # transformers sets these sums to 0 after it loads a checkpoint, so they are kept until the first epoch.
        self._log_window = state["log_window"]
        # A run that goes on in another folder leaves those of the first as they are.
        if self._in_own_folder and self.args.process_index == 0:
            cut_back(Path(str(self.args.output_dir)), state["appended_files"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``transformers.Trainer``; each line of the log is a line of ``metrics.jsonl`` too."""
        super().log(logs, start_time)
        if self.is_world_process_zero():
            # Evaluation may come before training.
            seconds = time.time() - self._training_began if self._training_began else 0.0
            entry = {"seconds": round(seconds, 3)} | self.state.log_history[-1]
            append_line(Path(str(self.args.output_dir)) / METRICS_FILE, entry)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, *args: Any, learning_rate: Any = None, **kwargs: Any
    ) -> None:
        # The line at the end of an epoch repeats those of its last step.
        self._step_figures = grad_norm, learning_rate
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)  # type: ignore[misc]

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Until its first epoch a resumed run has nothing to evaluate: with `eval_on_start` it was, at its start.
        return {} if self._log_window is not None else super()._evaluate(*args, **kwargs)

    def _continue_log_window(self, start_time: float) -> bool:
        """Go on with the sums of the checkpoint, once; training started at ``start_time``. Returns whether it did."""
        window, self._log_window = self._log_window, None
        if window is not None:
            self._tr_loss += window["loss"].to(self.args.device)
            self._total_loss_scalar = window["total_loss"]
            self._globalstep_last_logged = window["last_logged_step"]
            self._step_figures = window["grad_norm"], window["learning_rate"]
            # The last line of the log is about the whole run: its loss, and the time of all its parts.
            self._initial_global_step = 0
            self._earlier_seconds = window["seconds"]
        self._training_began = start_time - self._earlier_seconds
        return window is not None

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]  # passes all by name
        step, is_first = self.state.global_step, self._continue_log_window(kwargs["start_time"])
        # Stopped between its last step and its last save; transformers would take another step.
        is_over = step >= self.state.max_steps
        if is_first and (is_over or step % kwargs["num_update_steps_per_epoch"] == 0):
            # Evaluation follows with the random numbers of the checkpoint, and training with those after it.
            self._load_rng_state(kwargs["resume_from_checkpoint"])
            self._end_epoch(kwargs["trial"], kwargs["start_time"])
            kwargs["resume_from_checkpoint"] = None
        if is_over:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _end_epoch(self, trial: Any, start_time: float) -> None:
        """What a run does at the end of an epoch whose last step has saved the checkpoint."""
        if self.args.save_strategy == SaveStrategy.EPOCH:  # saved after all of it
            return
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        grad_norm, learning_rate = self._step_figures
        self._maybe_log_save_evaluate(
            self._tr_loss, grad_norm, self.model_wrapped, trial, None, None, start_time, learning_rate=learning_rate
        )

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        # Again, as a run without an epoch left comes here at once.
        if self._continue_log_window(start_time):
            self._end_epoch(trial, start_time)
        return super()._finalize_training(trial, num_train_samples, self._training_began)


def cut_back(folder: Path, sizes: dict[str, int]) -> None:
    """Leave out what a run appended to files after its last checkpoint.

    Args:
        folder: of the run.
        sizes: bytes of each file at the checkpoint, by name.
    """
    for name, size in sizes.items():
        file = folder / name
        if file.exists() and file.stat().st_size > size:
            os.truncate(file, size)


def resume_request(given: str | bool | None) -> str:
    """Which run is asked for, as one word or path.

    Args:
        given: of ``--resume`` or ``resume_from_checkpoint``. The command line passes text, a YAML file a boolean.
    Returns:
        ``true`` for the last checkpoint of the run; ``auto`` for that, or a new run where there is none; a folder as it
        was given; empty for a new run.
    """
    word = "" if given is None else str(given).lower()
    if word in ("", "false", "no"):
        return ""
    if word in ("true", "yes", "last"):
        return "true"
    return AUTO if word == AUTO else str(given)


def checkpoint_to_resume(given: str | bool | None, output_dir: str) -> str | None:
    """Find the folder that training continues from.

    Args:
        given: a folder; ``True`` (or the text ``true``, ``yes``, ``last``) for the last checkpoint in ``output_dir``;
            ``auto`` for the same, or a new run where there is none; None, ``False`` or their text for a new run.
        output_dir: of the run.
    Returns:
        The folder, or None.
    Raises:
        ValueError: there is no checkpoint, or it does not hold what a run needs.
    """
    request = resume_request(given)
    if not request:
        return None
    if request in ("true", AUTO):
        whole, passed_over = last_whole_checkpoint(output_dir)
        problems = [f"{path}: {problem}" for path, problem in passed_over.items()]
        if whole is None and request != AUTO:
            raise ValueError(
                f"{output_dir}: no checkpoint to resume from; leave out --resume to start, or pass --resume auto to do "
                f"either{''.join(f' ({problem})' for problem in problems)}"
            )
        for line in problems:
            logger.warning("passed over %s", line)
        return None if whole is None else str(whole)
    folder = Path(str(given)).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{given}: no such folder to resume from (--resume_from_checkpoint)")
    last_checkpoint = last_marked_checkpoint(folder)
    if not (folder / "trainer_state.json").exists():
        hint = f"; did you mean {last_checkpoint}?" if last_checkpoint else ""
        raise ValueError(f"{given}: not a checkpoint of a run (no trainer_state.json){hint}")
    if (problem := problem_of(folder)) is not None:
        whole, _ = last_whole_checkpoint(folder.resolve().parent)
        remedy = f"; the last whole checkpoint is {whole}" if whole else ""
        raise ValueError(f"{given}: {problem}{remedy}")
    # "global_step…" is DeepSpeed's folder of optimizer states.
    has_optimizer = any(path.name.startswith(("optimizer", "global_step")) for path in folder.iterdir())
    if not has_optimizer:
        hint = "it was saved with --save_only_model; train from it as a model instead"
        if last_checkpoint:
            hint = f"did you mean {last_checkpoint}?"
        raise ValueError(f"{given}: holds no state of the optimizer to go on with; {hint}")
    return str(folder)


def log_resuming(checkpoint: str, max_steps: int) -> None:
    """Log the step that a run continues from.

    Args:
        checkpoint: its folder.
        max_steps: of the run; 0 or less where epochs are counted.
    """
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    last_step = int(state["global_step"])
    logger.info("%s: going on after step %d", checkpoint, last_step)
    if 0 < max_steps <= last_step:
        logger.warning(
            "%s: step %d of %d, so all steps are trained; to train more, raise --max_steps",
            checkpoint,
            last_step,
            max_steps,
        )


def finished_step(output_dir: str, max_steps: int, num_train_epochs: float) -> int | None:
    """The last step of a run that is finished and saved, where it reached what is asked for now.

    Args:
        output_dir: of the run.
        max_steps: asked for now; 0 or less where epochs are counted.
        num_train_epochs: asked for now.
    Returns:
        The step; None where a step, or a part of the last save, is still to be done.
    """
    folder = Path(output_dir)
    # The last files of a run, in this order; a run that was stopped writes none of them.
    state, results = _read_json(folder / "trainer_state.json"), _read_json(folder / RESULTS)
    if state is None or results is None:
        return None
    step, epoch = int(state["global_step"]), float(state.get("epoch") or 0.0)
    is_reached = step >= max_steps if max_steps > 0 else epoch >= num_train_epochs
    return step if is_reached else None


def _read_json(file: Path) -> dict[str, Any] | None:
    """What a file holds; None where it is missing, or was cut off while it was written."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
