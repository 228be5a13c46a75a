"""Saving and loading as an ordinary checkpoint: the model inside the policy, never the wrapper."""

import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rlhf.models import configured_dropout
from rlhf.models.adapter_base import PARTIAL, keep_base, name_lengths
from rlhf.runs.card import write_card
from rlhf.runs.files import CARD_FILE
from rlhf.trainers.checkpoint_files import discard, partial_path, put_in_place, write_mark, writing
from rlhf.trainers.plain_state import load_state, save_state
from rlhf.trainers.run_folder import MODEL, delete_old_checkpoints, last_marked_checkpoint, move_model_in
from rlhf.trainers.safe_loading import SafeLoading


class Checkpointing(SafeLoading):
    """A ``transformers.Trainer`` whose model is a wrapper (:class:`rlhf.models.policy.Wrapper`).

    A folder holds the model inside the wrapper, so that ``from_pretrained`` loads it. Other weights that the wrapper
    trains, such as a value head, are in a file beside it.
    """

    extra_state_file: ClassVar[str] = "value_head.safetensors"
    model: Any  # the wrapper, or what accelerate made of it
    args: Any  # a configuration of rlhf

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_saving_checkpoint = False
        self.bases: set[Path] = set()  # folders where this run saved the base of its adapter

    @contextmanager
    def _inner_model(self) -> Iterator[nn.Module]:
        """Let ``self.model`` be the model inside the wrapper, for methods of ``Trainer`` that save or load it."""
        outer_model = self.model
        self.model = self.accelerator.unwrap_model(outer_model).model
        try:
            yield self.model
        finally:
            self.model = outer_model

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As ``transformers.Trainer``, under the names that the wrapper gives its parameters."""
        # transformers names parameters by the tree of modules, in which the model is a child of the wrapper.
        decayed = set(super().get_decay_parameter_names(model))
        wrapper_names = {id(parameter): name for name, parameter in model.named_parameters()}
        module_tree = nn.Module.named_parameters(model)
        return [wrapper_names[id(parameter)] for name, parameter in module_tree if name in decayed]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # All processes come here: one writes.
        if not self.args.should_save:
            return
        weights = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
        # safetensors stores contiguous tensors only.
        extra_weights = {name: weight.contiguous() for name, weight in weights.items() if not name.startswith("model.")}
        if state_dict is not None:
            state_dict = {
                name.removeprefix("model."): weight for name, weight in weights.items() if name.startswith("model.")
            }
        folder = Path(output_dir or str(self.args.output_dir))
        # A run and all its checkpoints share the base of their adapters.
        home = folder.parent.parent if folder.parent.name == PARTIAL else folder
        with self._inner_model() as inner_model, configured_dropout(inner_model):
            keep_base(inner_model, home.resolve(), self.bases, state_dict)
            super()._save(output_dir, state_dict)
            name_lengths(inner_model, folder)
        if extra_weights:
            save_file(extra_weights, folder / self.extra_state_file)

    # Checkpoints and the final model, each whole or not there

    def _get_output_dir(self, trial: Any) -> str:
        run_folder = super()._get_output_dir(trial)
        return os.path.join(run_folder, PARTIAL) if self._is_saving_checkpoint else run_folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As ``transformers.Trainer``; all processes write, and then one of them renames the folder.

        Args:
            model: as transformers passes it.
            trial: of a search for hyperparameters.

        Raises:
            OSError: a process could not write; all processes raise.
        """
        run_folder = Path(self._get_output_dir(trial))
        final = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial = partial_path(final)
        self._is_saving_checkpoint = True
        with self._all_or_none(partial, final), writing(final):
            try:
                super()._save_checkpoint(model, trial)
                self._name_best_checkpoint(run_folder, partial)
            finally:
                self._is_saving_checkpoint = False
        with self._all_or_none(partial, final), writing(final):
            if self.args.should_save:
                write_mark(partial, self.state.global_step, self.args.world_size)
                put_in_place(partial, final)
                delete_old_checkpoints(final, self.args.save_total_limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``transformers.Trainer``; a folder that holds a model keeps it until the new one is whole.

        Args:
            output_dir: by default that of the run.
            _internal_call: transformers saves a checkpoint, or the model that it is about to send to the hub.

        Raises:
            OSError: the model could not be written.
        """
        if _internal_call and output_dir is not None:
            return super().save_model(output_dir, _internal_call)
        final = Path(output_dir or str(self.args.output_dir))
        partial = final / PARTIAL / MODEL
        # Where weights are whole on each process, the first may be the only one that calls this.
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        with self._all_or_none(partial, final) if is_sharded else nullcontext(), writing(final):
            if self.is_fsdp_enabled:
                # Gathered by all processes. transformers saves no model at all where checkpoints are in shards.
                self._save(str(partial), state_dict=self.accelerator.get_state_dict(self.model))
            else:
                super().save_model(str(partial), _internal_call=True)
        if self.args.should_save:
            with writing(final):
                (partial / CARD_FILE).unlink(missing_ok=True)  # PEFT's, a form that nobody has filled in
                write_mark(partial, self.state.global_step, self.args.world_size)
                move_model_in(partial, final)
                write_card(Path(str(self.args.output_dir)), final)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card again, as ``transformers.Trainer`` does before it sends the folder to the hub.

        Args:
            args: not read; the card describes the run by its record.
            kwargs: alike.
        """
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            write_card(folder, folder)

    def _name_best_checkpoint(self, run_folder: Path, partial: Path) -> None:
        """Give the best checkpoint the path that it has once it is renamed; transformers looks beside the new one."""
        best_step = self.state.best_global_step
        best = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{best_step}"
        if best_step and (best.exists() or best.name == partial.name):
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(partial / "trainer_state.json"))

    @contextmanager
    def _all_or_none(self, partial: Path, final: Path) -> Iterator[None]:
        """Let all processes fail where one does, so that none waits for it; nothing is left of the folder then."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # raised below, in all processes
            error = caught
        process = self.args.process_index
        problems = gather_object([] if error is None else [f"process {process}: {error}"])
        if not problems:
            return
        if self.args.should_save:
            discard(partial)
        if error is None:
            raise OSError(f"{final} is not saved, because of {problems[0]}")
        last = last_marked_checkpoint(final.parent)
        if isinstance(error, OSError) and last is not None:
            raise OSError(f"{error}; the last whole checkpoint is {last}: go on from it with --resume") from error
        raise error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # whose checkpoints hold the wrapper, in shards
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._require_extra_weights(Path(resume_from_checkpoint))
        with self._inner_model() as inner_model:
            super()._load_from_checkpoint(resume_from_checkpoint, inner_model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._require_extra_weights(Path(str(self.state.best_model_checkpoint)))
        with self._inner_model():
            super()._load_best_model()

    def _require_extra_weights(self, folder: Path) -> None:
        names = self.accelerator.unwrap_model(self.model).state_dict()
        has_extra_weights = any(not name.startswith("model.") for name in names)
        if not self._load_extra_weights(folder) and has_extra_weights:
            raise ValueError(f"{folder}: no {self.extra_state_file}, which this trainer trains; choose another folder")

    def _load_extra_weights(self, folder: Path) -> bool:
        """Load what the wrapper trains besides the model; returns whether the folder has it."""
        file = folder / self.extra_state_file
        if file.exists():
            wrapper = self.accelerator.unwrap_model(self.model)
            wrapper.load_state_dict(load_file(file), strict=False)  # the file holds nothing of the model
        return file.exists()

    # State that transformers does not know of, saved with the optimizer's in each checkpoint

    @abstractmethod
    def resume_state(self) -> dict[str, Any]:
        """The state of this process that a resumed run needs, beyond weights, optimizer and the number of steps."""

    @abstractmethod
    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`resume_state` returned."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        save_state(self._resume_file(output_dir), self.resume_state())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = self._resume_file(checkpoint)
        if not file.exists() and file.with_suffix(".pt").exists():
            raise ValueError(
                f"{file.with_suffix('.pt')}: of an older version, in a format that can run code; start the run anew"
            )
        if not file.exists():
            raise FileNotFoundError(
                f"{checkpoint}: no {file.name}; it was saved by fewer processes, or by another trainer: resume with as "
                "many processes as before"
            )
        self.load_resume_state(load_state(file))

    def _resume_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"trainer_state_{self.args.process_index}.json"
