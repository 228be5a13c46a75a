"""How each training command runs: from parsed options to a saved checkpoint."""

import gc
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from rlhf.cli.arguments import DataArguments, ModelArguments
from rlhf.cli.commands import COMMANDS, TrainingCommand
from rlhf.cli.dry_run import dry_run
from rlhf.cli.exit_codes import ExitCode
from rlhf.cli.lasting_output import lasting_output
from rlhf.cli.options import require
from rlhf.cli.overwriting import (
    WRITTEN_BY_RUN,
    config_of,
    delete_set_aside,
    is_set_aside,
    refuse_inputs_inside,
    set_aside,
)
from rlhf.cli.parsing import given_options, parse
from rlhf.data import Mixture, load_datasets, shuffled
from rlhf.data.errors import error_context
from rlhf.data.streams import name_of
from rlhf.distillation import DistillConfig, DistillTrainer
from rlhf.models import add_adapter_beside, load_tokenizer
from rlhf.runs.ending import Ending, Kind
from rlhf.runs.files import COMPLETIONS_FILE, METRICS_FILE, REPORT_FILE, RUN_FILE, SAMPLES_FILE
from rlhf.runs.report import write_report_at_end
from rlhf.runs.screens import print_whole
from rlhf.trainers.base import BaseTrainer
from rlhf.trainers.config import BAD_ROWS, BaseConfig
from rlhf.trainers.recording import CommandRecord
from rlhf.trainers.resuming import AUTO, RESULTS, checkpoint_to_resume, finished_step, resume_request
from rlhf.trainers.run_folder import finish_interrupted
from rlhf.trainers.run_lock import LOCK_FILE, run_lock
from rlhf.trainers.stopping import noted_signals
from rlhf.visible import visible

# Attributes of a trainer, or of its callbacks, that lead to weights or to the state of the optimizer.
_HOLD_WEIGHTS = {
    "model", "model_wrapped", "deepspeed", "optimizer", "lr_scheduler", "reference", "policy", "teacher", "collector",
    "balancer", "callbacks", "rollouts",
}  # fmt: skip
TEACHER_ADAPTER = "teacher"  # name of the teacher's adapter on the student's model
Rows: TypeAlias = Dataset | IterableDataset | Mixture


def run(name: str, command: TrainingCommand, argv: list[str]) -> int:
    """Train as a command of the table says.

    Args:
        name: of the command.
        command: its row of the table.
        argv: words of the command line, after the command.

    Returns:
        The exit status: 0, or that of the signal that stopped training.

    Raises:
        ValueError, OSError: bad options, bad data, or a folder that must not be replaced.
    """
    # The options of the launcher come first; they were used before this process began.
    classes = [resolve_name(path) for path in command.option_classes]
    _, data, model, *groups, args = parse(name, classes, argv)
    _require_training_options(data, model, args)
    # Before rows and weights are loaded, as a group refuses what does not go together.
    trainer_kwargs: dict[str, Any] = {}
    for group in groups:
        trainer_kwargs |= group.trainer_kwargs(model, args)
    # Those of the configuration are the trainer's own.
    options = {name: value for group in (data, model, *groups) for name, value in vars(group).items()}
    if data.overwrite:
        # The file of options is among the words of the command line only.
        of_trainer = {option.name: getattr(args, option.name) for option in fields(args)}
        refuse_inputs_inside(Path(str(args.output_dir)), of_trainer | options | {"config": config_of(argv)})
    call = CommandRecord(name, ["rlhf", name, *argv], given_options(name, classes, argv))
    with lasting_output():
        return train(command, data, model, args, trainer_kwargs, options, call)


def train(
    command: TrainingCommand,
    data: DataArguments,
    model: ModelArguments,
    args: BaseConfig,
    trainer_kwargs: dict[str, Any],
    options: dict[str, Any],
    call: CommandRecord,
) -> int:
    """Check everything, then train, evaluate and save; nothing that existed is touched before training starts.

    No other run can write into the output folder meanwhile.

    Args:
        command: has the trainer, and the function that loads the model.
        data: the rows, and what to do with a folder that is not empty.
        model: the model and its adapter.
        args: the trainer's configuration.
        trainer_kwargs: further keyword arguments of the trainer.
        options: all options that are not in ``args``, by name; each checkpoint records them.
        call: how the command was called, for ``run.yaml``.

    Returns:
        The exit status: 0, or that of the signal that stopped training.
    """
    output_folder = Path(str(args.output_dir))
    if output_folder.exists() and not output_folder.is_dir():
        raise ValueError(f"{output_folder}: output_dir is a file; choose a folder")
    make_trainer = partial(_make_trainer, command, data, model, args, trainer_kwargs, options)
    if data.dry_run:
        return dry_run(args, _check_output(output_folder, data, _resume_request(data, args)), make_trainer)
    # The first process writes the folder for all.
    with run_lock(output_folder) if args.process_index == 0 else nullcontext():
        request = _resume_request(data, args)
        # The first process tidies the folder before any process looks at it.
        with args.main_process_first(local=False, desc="looking for checkpoints"):
            if args.process_index == 0:
                finish_interrupted(output_folder)
            if request in ("true", AUTO):
                step = finished_step(str(output_folder), args.max_steps, args.num_train_epochs)
                if step is not None:
                    print(f"{output_folder}: already complete at step {step}")
                    return ExitCode.SUCCESS
            checkpoint = _check_output(output_folder, data, request)
        trainer = make_trainer()
        trainer.command = call
        # Only now: whatever could be wrong with data or model would have been found.
        if data.overwrite:
            if args.process_index == 0 and (aside := set_aside(output_folder, WRITTEN_BY_RUN)) is not None:
                print(f"{output_folder}: the run before is kept in {aside} until the new model is saved")
            trainer.accelerator.wait_for_everyone()
        with trainer.trackers.open_to_the_end(), trainer.progress:
            return _train_and_save(trainer, checkpoint)


def _make_trainer(
    command: TrainingCommand,
    data: DataArguments,
    model: ModelArguments,
    args: BaseConfig,
    trainer_kwargs: dict[str, Any],
    options: dict[str, Any],
) -> BaseTrainer:
    peft_config = model.peft_config()
    train_rows, eval_rows = _load_rows(data, args)
    name, trust_remote_code = str(model.model_name_or_path), args.trust_remote_code
    tokenizer = load_tokenizer(name, args.chat_template_path, model.model_revision, trust_remote_code)
    init_kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    # A reference or a critic that is given by name is loaded alike.
    args.model_init_kwargs = {**model.other_kwargs(trust_remote_code), **init_kwargs}
    load_model, trainer_class = resolve_name(command.load_model), resolve_name(command.trainer)
    trainer: BaseTrainer = trainer_class(
        model=load_model(name, **{**model.load_kwargs(trust_remote_code), **init_kwargs}),
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft_config,
        **trainer_kwargs,
    )
    trainer.command_options = options
    return trainer


def make_distill_trainer(
    *, model: PreTrainedModel, args: DistillConfig, peft_config: Any, teacher_adapter: str | None = None, **kwargs: Any
) -> DistillTrainer:
    """A trainer whose teacher may be an adapter in a folder, on the student's own weights.

    Args:
        model: the student.
        args: the trainer's configuration.
        peft_config: the student's adapter.
        teacher_adapter: folder of the teacher's adapter.
        kwargs: further keyword arguments of the trainer.

    Returns:
        The trainer.
    """
    if teacher_adapter is None:
        return DistillTrainer(model, args=args, peft_config=peft_config, **kwargs)
    set_seed(args.seed)  # as the trainer does before it draws an adapter
    with_both_adapters = add_adapter_beside(model, teacher_adapter, TEACHER_ADAPTER, peft_config)
    return DistillTrainer(with_both_adapters, args=args, teacher_adapter=TEACHER_ADAPTER, **kwargs)


def _require_training_options(data: DataArguments, model: ModelArguments, args: BaseConfig) -> None:
    require(model_name_or_path=model.model_name_or_path, dataset_name=data.dataset_name)
    if args.output_dir == "trainer_output":  # transformers' default, which nobody chose
        require(output_dir=None)


def _load_rows(data: DataArguments, args: BaseConfig) -> tuple[Rows, Rows | None]:
    """Rows to train on and to evaluate on; refused where they hold nothing to train on, before weights are loaded."""
    train_rows = load_datasets(
        data.dataset_name or [],
        data.dataset_train_split,
        data.dataset_config,
        mixture=data.mixture,
        streaming=data.streaming,
    )
    seed = args.seed if args.data_seed is None else args.data_seed
    train_rows = shuffled(train_rows, seed, data.shuffle_buffer_size)
    eval_rows = None
    if data.eval_dataset_name is not None or data.dataset_test_split is not None:
        eval_rows = load_datasets(
            data.eval_dataset_name or data.dataset_name or [],
            data.dataset_test_split or "train",
            data.dataset_config if data.eval_dataset_name is None else None,
            mixture=data.mixture,
        )
    elif args.eval_strategy != "no" or args.eval_on_start:
        raise ValueError("evaluation is asked for, but there are no rows: pass --eval_dataset_name")
    for rows in (train_rows, eval_rows):
        _check_columns(args, rows)
    return train_rows, eval_rows


def _check_columns(args: BaseConfig, rows: Rows | None) -> None:
    for part in rows.parts if isinstance(rows, Mixture) else (rows,):
        # The columns of a stream are unknown before its first row.
        if part is not None and part.column_names is not None:
            with error_context(name_of(part)):
                args.check_columns(list(part.column_names))


def _train_and_save(trainer: BaseTrainer, checkpoint: str | None) -> int:
    # Only here: a program that uses the trainer itself keeps its own meaning of Ctrl-C.
    with noted_signals() as requests:
        trainer.obey(requests)
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step == 0:
        raise ValueError("no step was trained, so nothing is saved: raise --max_steps or --num_train_epochs")
    if requests.stopped_by is None:
        _save_and_evaluate(trainer, result)
    elif trainer.is_world_process_zero():
        print(_stopped_at(trainer))
    # A single process has no group to end.
    if trainer.args.world_size > 1:
        _end_process_group(trainer)
    return ExitCode.SUCCESS if requests.stopped_by is None else ExitCode.of_signal(requests.stopped_by)


def _save_and_evaluate(trainer: BaseTrainer, result: TrainOutput) -> None:
    trainer.save_model()
    if trainer.is_world_process_zero():
        # Those of a shorter run: results say that all of a run is done, also its evaluation.
        (Path(str(trainer.args.output_dir)) / RESULTS).unlink(missing_ok=True)
        delete_set_aside(Path(str(trainer.args.output_dir)))
    trainer.save_state()
    metrics: dict[str, Any] = dict(result.metrics)
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.create_model_card()  # with the figures of the last evaluation
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.save_metrics("all", metrics)
    if trainer.is_world_process_zero():
        write_report_at_end(Path(str(trainer.args.output_dir)))  # once more, with the last evaluation
        print_whole(visible("\n".join(_ending(trainer, result).lines(COMMANDS))))


def _ending(trainer: BaseTrainer, result: TrainOutput) -> Ending:
    kind: Kind = "adapter" if trainer.model.has_adapter else "model"
    return Ending(
        folder=Path(str(trainer.args.output_dir)),
        kind=kind if trainer.writes_text else "reward model",
        history=trainer.state.log_history,
        figures=trainer.progress.figures,
        steps=trainer.state.global_step,
        seconds=result.metrics.get("train_runtime", 0.0),
        tokens=trainer.state.num_input_tokens_seen,
    )


def _stopped_at(trainer: BaseTrainer) -> str:
    where = f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}"
    # The user asked for checkpoints that are no more than a model.
    if trainer.args.save_only_model:
        return f"{where}; its checkpoint holds the model only (--save_only_model), so training cannot go on from it"
    return f"{where}; go on with --resume"


def _end_process_group(trainer: BaseTrainer) -> None:
    """End the process group once nothing holds it: left to the interpreter's exit, its threads may abort there."""
    trainer.accelerator.wait_for_everyone()
    # DDP holds the group, and so does every tensor that is sharded over it.
    for owner in (trainer, trainer.callback_handler):
        for name in _HOLD_WEIGHTS & vars(owner).keys():
            setattr(owner, name, None)
    trainer.accelerator.free_memory()
    gc.collect()
    trainer.accelerator.end_training()


def _resume_request(data: DataArguments, args: BaseConfig) -> str:
    """What to resume, as :func:`resume_request` gives it, from either of the two options."""
    request = resume_request(data.resume)
    if request and data.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if request and args.resume_from_checkpoint is not None:
        raise ValueError("--resume and --resume_from_checkpoint exclude each other")
    return request or resume_request(args.resume_from_checkpoint)


def _check_output(folder: Path, data: DataArguments, request: str) -> str | None:
    """The checkpoint to resume from; raises where the folder holds something that nobody asked to replace."""
    checkpoint = checkpoint_to_resume(request, str(folder))
    # A run that goes on in its own folder replaces nothing.
    if checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve():
        if data.overwrite:
            raise ValueError(f"{checkpoint}: --overwrite would replace it; choose another --output_dir")
        return checkpoint
    if folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir()):
        if not _holds_run(folder):
            raise ValueError(f"{folder}: not empty and no run of ours; choose another --output_dir")
        starts_anew = request == AUTO and not (folder / "training_args.bin").exists()
        if not data.overwrite and not starts_anew:
            raise ValueError(f"{folder}: holds a run already; pass --resume to go on, or --overwrite to replace it")
    return checkpoint


def _holds_run(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir() if not is_set_aside(path.name)} - {LOCK_FILE}
    # A run that stopped before its first checkpoint left no more than these.
    ended_early = names <= {RUN_FILE, METRICS_FILE, SAMPLES_FILE, COMPLETIONS_FILE, REPORT_FILE, BAD_ROWS}
    return ended_early or "training_args.bin" in names or get_last_checkpoint(str(folder)) is not None
