"""What to change in a run that does not fit, each with the memory that it would take."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from rlhf.models.activations import checkpointing_options
from rlhf.planning.batches import BatchSizes, Micro, make_micro, sizes_of_rows
from rlhf.planning.memory import MemoryPlan

_LISTS = ("input_ids", "labels", "prompt_ids", "chosen_ids", "rejected_ids")


def changes_that_help(
    trainer: Any, sizes: BatchSizes | None, plan: MemoryPlan, peak_of: Callable[[Micro], int]
) -> dict[str, int]:
    """Predict the peak with one option changed.

    Args:
        trainer: of the run; activation checkpointing is on afterwards.
        sizes: its micro-batches; None for a stream or for rollouts.
        plan: as it is.
        peak_of: the peak with another largest micro-batch.

    Returns:
        Peaks in bytes by the change; only those that are lower.
    """
    args, rows = trainer.args, trainer.train_dataset
    peaks: dict[str, int] = {}
    if not trainer.model.has_adapter:
        # Gradients and optimizer state are those of the adapter alone, a few MiB.
        gradients = plan.gradients if args.gradient_accumulation_steps > 1 else 0
        peaks["--use_peft (computed)"] = plan.peak - plan.optimizer - gradients
    if sizes is not None and isinstance(rows, Dataset):
        largest = [rows[index] for index in sizes.largest]
        if len(largest) > 1:
            longest = rows[int(sizes_of_rows(rows).argmax())]
            peaks["--per_device_train_batch_size 1"] = peak_of(make_micro(trainer, [longest]))
        # Nested lists, such as the labels of a pair, are not cut.
        if args.max_length is not None and "input_ids" in rows.column_names:
            half = args.max_length // 2
            shorter = [_cut(row, half) for row in largest]
            peaks[f"--max_length {half}"] = peak_of(make_micro(trainer, shorter))
        if not checkpointing_options(args)[0]:
            trainer.model.activation_checkpointing_enable()
            peaks["--activation_checkpointing"] = peak_of(make_micro(trainer, largest))
    return dict(sorted(((name, peak) for name, peak in peaks.items() if peak < plan.peak), key=lambda item: item[1]))


def _cut(row: dict[str, Any], length: int) -> dict[str, Any]:
    return {name: value[:length] if name in _LISTS else value for name, value in row.items()}
