"""What the training commands share: from parsed options to a saved checkpoint."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from rlhf.cli.arguments import DataArguments, ModelArguments
from rlhf.data import Mixture, load_datasets, shuffled
from rlhf.data.errors import error_context
from rlhf.data.streams import name_of
from rlhf.models import load_model, load_tokenizer
from rlhf.trainers.base import BaseConfig, BaseTrainer
from rlhf.trainers.checkpointing import checkpoint_to_resume
from rlhf.trainers.config import BAD_ROWS


def quiet_logging() -> None:
    """Our own messages as plain lines from the first process; transformers' only from warnings on."""
    main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rlhf").setLevel(logging.INFO if main else logging.ERROR)
    transformers_logging.set_verbosity_warning()


def train(
    data: DataArguments,
    model: ModelArguments,
    args: BaseConfig,
    make: Callable[..., BaseTrainer],
    load: Callable[..., Any] = load_model,
) -> None:
    """Check everything, then train, evaluate and save; nothing that existed is touched before training starts."""
    quiet_logging()
    _require(model_name_or_path=model.model_name_or_path, dataset_name=data.dataset_name)
    if args.output_dir == "trainer_output":
        _require(output_dir=None)
    peft_config = model.peft_config()
    output = Path(str(args.output_dir))
    checkpoint = _check_output(output, data, args.resume_from_checkpoint)
    train_rows = load_datasets(
        data.dataset_name or [], data.dataset_train_split, data.dataset_config, mixture=data.mixture,
        streaming=data.streaming,
    )  # fmt: skip
    train_rows = shuffled(train_rows, args.seed if args.data_seed is None else args.data_seed, data.shuffle_buffer_size)
    eval_rows = _eval_rows(data)
    if eval_rows is None and (args.eval_strategy != "no" or args.eval_on_start):
        raise ValueError("evaluation is asked for, but there are no rows: pass --eval_dataset_name")
    for rows in (train_rows, eval_rows):
        _check_columns(args, rows)
    tokenizer = load_tokenizer(
        str(model.model_name_or_path), args.chat_template_path, model.model_revision, args.trust_remote_code
    )
    own = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    # A reference or a critic that is given by name is loaded alike.
    args.model_init_kwargs = {**model.other_kwargs(args.trust_remote_code), **own}
    trainer = make(
        model=load(str(model.model_name_or_path), **{**model.load_kwargs(args.trust_remote_code), **own}),
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    if data.overwrite:
        _clear(output, trainer)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except (ValueError, OSError):
        _end_bar(trainer)
        raise
    trainer.save_model()
    trainer.save_state()
    metrics: dict[str, Any] = dict(result.metrics)
    if eval_rows is not None:
        metrics |= trainer.evaluate()
    trainer.save_metrics("all", metrics)
    if trainer.is_world_process_zero():
        print(f"saved {args.output_dir}")
    if args.world_size > 1:
        _close(trainer)


def _end_bar(trainer: BaseTrainer) -> None:
    """Close the progress bar, so that what is said next has a line of its own."""
    for callback in trainer.callback_handler.callbacks:
        if (bar := getattr(callback, "training_bar", None)) is not None:
            bar.close()


def _require(**named: Any) -> None:
    for name, value in named.items():
        if value is None:
            raise ValueError(f"--{name} is missing: give it on the command line or in the config file")


def _eval_rows(data: DataArguments) -> Dataset | IterableDataset | Mixture | None:
    if data.eval_dataset_name is None and data.dataset_test_split is None:
        return None
    return load_datasets(
        data.eval_dataset_name or data.dataset_name or [],
        data.dataset_test_split or "train",
        data.dataset_config if data.eval_dataset_name is None else None,
        mixture=data.mixture,
    )


def _check_columns(args: BaseConfig, rows: Dataset | IterableDataset | Mixture | None) -> None:
    """Refuse rows that hold nothing to train on, before weights are loaded."""
    for part in rows.parts if isinstance(rows, Mixture) else (rows,):
        if part is not None and part.column_names is not None:  # of a stream, unknown before its first row
            with error_context(name_of(part)):
                args.check_columns(list(part.column_names))


def _check_output(folder: Path, data: DataArguments, checkpoint: str | None = None) -> str | None:
    """The checkpoint to go on from; raises where the folder holds something that nobody said to replace."""
    given = data.resume or checkpoint
    if data.resume and data.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if data.resume and checkpoint is not None:
        raise ValueError("--resume and --resume_from_checkpoint exclude each other")
    found = checkpoint_to_resume(given, str(folder))
    if found is not None and Path(found).resolve().parent == folder.resolve():
        if data.overwrite:
            raise ValueError(f"{found}: --overwrite would replace it; choose another --output_dir")
        return found
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: output_dir is a file; choose a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not _holds_run(folder):
            raise ValueError(f"{folder}: not empty and no run of ours; choose another --output_dir")
        if not data.overwrite:
            raise ValueError(f"{folder}: holds a run already; pass --resume to go on, or --overwrite to replace it")
    return found


def _holds_run(folder: Path) -> bool:
    left = {path.name for path in folder.iterdir()} <= {"completions.jsonl", BAD_ROWS}  # by a run that ended early
    return left or (folder / "training_args.bin").exists() or get_last_checkpoint(str(folder)) is not None


def _close(trainer: BaseTrainer) -> None:
    """End the process group once DDP has let go of it: left to the interpreter's exit, its threads may abort there."""
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def _clear(folder: Path, trainer: BaseTrainer) -> None:
    if trainer.is_world_process_zero():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != BAD_ROWS:  # of the run that begins
                path.unlink()
    trainer.accelerator.wait_for_everyone()
