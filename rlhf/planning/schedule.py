"""How long a run is, in steps, evaluations and checkpoints, and what it leaves on disk."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from torch import nn
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from rlhf.data.batch import IGNORE
from rlhf.data.packing import Packed, longest_sequences, num_tokens
from rlhf.planning.memory import gradient_bytes


@dataclass(frozen=True)
class RowFigures:
    """The tokenised rows of a data set.

    Attributes:
        rows: how many.
        shortest: tokens of the shortest sequence; a prompt with one of its answers is one.
        median: of the sequences.
        longest: of the sequences.
        tokens: of all rows, a prompt that answers share counted once.
        scored: how many of the tokens have a loss; None for prompts.
    """

    rows: int
    shortest: int
    median: int
    longest: int
    tokens: int
    scored: int | None


def row_figures(rows: Any) -> RowFigures | None:
    """Count the tokens of rows.

    Args:
        rows: tokenised rows, packed or not.

    Returns:
        None for a stream, whose rows are not known.
    """
    if isinstance(rows, Packed):
        rows = rows.rows
    if not isinstance(rows, Dataset):
        return None
    lengths = longest_sequences(rows)
    return RowFigures(
        rows=len(rows),
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        longest=int(lengths.max()),
        tokens=int(num_tokens(rows).sum()),
        scored=_scored_tokens(rows),
    )


def _scored_tokens(rows: Dataset) -> int | None:
    table = rows.with_format("arrow")[:]
    if "labels" in table.column_names:
        labels = table["labels"]
        # The labels of a pair are a list for each answer.
        while pa.types.is_nested(labels.type):
            labels = pc.list_flatten(labels)
        return int(pc.sum(pc.not_equal(labels, IGNORE)).as_py() or 0)
    # Without labels every token of every answer is scored.
    answers = [name for name in ("chosen_ids", "rejected_ids") if name in table.column_names]
    if not answers:
        return None
    return sum(int(pc.sum(pc.list_value_length(table[name])).as_py()) for name in answers)


@dataclass(frozen=True)
class Schedule:
    """The length of a run.

    Attributes:
        steps: optimizer steps in all.
        steps_per_epoch: optimizer steps of an epoch.
        micro_batches: of this process, in all.
        evaluations: how often all evaluation rows are read, with the one at the end.
        checkpoints: how many are saved.
    """

    steps: int
    steps_per_epoch: int
    micro_batches: int
    evaluations: int
    checkpoints: int

    @property
    def epochs(self) -> float:
        """Epochs in all."""
        return self.steps / self.steps_per_epoch


def schedule_of(trainer: Any, loader: Any) -> Schedule:
    """The steps of a run.

    Args:
        trainer: of the run.
        loader: its loader of training rows.

    Returns:
        The numbers of steps, evaluations and checkpoints.
    """
    args = trainer.args
    _, steps_per_epoch, _, _, _, batches_per_epoch, steps = trainer.set_initial_training_values(args, loader)
    full_epochs = steps // steps_per_epoch
    # The last step of an epoch may have fewer micro-batches.
    rest = (steps % steps_per_epoch) * args.gradient_accumulation_steps
    evaluations = 0
    if trainer.eval_dataset is not None:
        evaluations = 1 + bool(args.eval_on_start) + _times(args.eval_strategy, args.eval_steps, steps, steps_per_epoch)
    return Schedule(
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        micro_batches=full_epochs * batches_per_epoch + rest,
        evaluations=evaluations,
        checkpoints=_checkpoints(args, steps, steps_per_epoch),
    )


def _times(strategy: Any, every: float | None, steps: int, steps_per_epoch: int) -> int:
    """How often something happens that follows steps or epochs."""
    if strategy == IntervalStrategy.EPOCH:
        return math.ceil(steps / steps_per_epoch)
    if strategy != IntervalStrategy.STEPS or not every:
        return 0
    # Below 1 it is a share of all steps.
    interval = math.ceil(steps * every) if every < 1 else int(every)
    return steps // interval


def _checkpoints(args: Any, steps: int, steps_per_epoch: int) -> int:
    if args.save_strategy == SaveStrategy.NO:
        return 0
    if args.save_strategy == SaveStrategy.BEST:
        return _times(args.eval_strategy, args.eval_steps, steps, steps_per_epoch)
    times = _times(IntervalStrategy(args.save_strategy.value), args.save_steps, steps, steps_per_epoch)
    # The last step is saved too.
    interval = math.ceil(steps * args.save_steps) if args.save_steps < 1 else int(args.save_steps)
    ends_between = args.save_strategy == SaveStrategy.STEPS and steps % interval != 0
    return times + ends_between


@dataclass(frozen=True)
class Disk:
    """What a run leaves in its folder, in bytes.

    Attributes:
        model: the model, or the adapter.
        checkpoint: one, with the state of the optimizer.
        checkpoints: how many are kept.
        at_most: in the moment when a new checkpoint is whole and an old one is not deleted yet.
        free: on the disk.
    """

    model: int
    checkpoint: int
    checkpoints: int
    at_most: int
    free: int


def disk_of(trainer: Any, schedule: Schedule, optimizer_bytes: int, free: int) -> Disk:
    """The disk that a run needs.

    Args:
        trainer: of the run.
        schedule: how many checkpoints it saves.
        optimizer_bytes: of all processes.
        free: bytes on the disk.

    Returns:
        The sizes of model and checkpoints.
    """
    args, policy = trainer.args, trainer.model
    model = gradient_bytes(policy) if policy.has_adapter else saved_bytes(policy)
    checkpoint = model if args.save_only_model else model + optimizer_bytes
    limit = args.save_total_limit or schedule.checkpoints
    kept = min(schedule.checkpoints, limit)
    # An old checkpoint is deleted only once the new one is whole.
    at_once = min(schedule.checkpoints, kept + 1)
    return Disk(model, checkpoint, kept, model + at_once * checkpoint, free)


def saved_bytes(model: nn.Module) -> int:
    """The bytes of all weights; tied ones are saved once.

    Args:
        model: the trained model.

    Returns:
        Bytes.
    """
    return sum(weight.nbytes for weight in model.parameters())
