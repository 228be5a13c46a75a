"""How long a run takes, from steps that are really done and then thrown away."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.planning.batches import Micro
from rlhf.planning.step import backward, update
from rlhf.trainers.base import BaseTrainer

_TRIAL_BYTES = 2**26  # that are written to measure the disk


@dataclass(frozen=True)
class Speed:
    """Measured times, in seconds.

    Attributes:
        token: of forward and backward.
        update: clipping and the step of the optimizer.
        eval_token: of a forward pass without gradient.
        first: the first micro-batch, which warms up.
    """

    token: float
    update: float
    eval_token: float
    first: float


@dataclass(frozen=True)
class Duration:
    """The time of a whole run, in seconds, by what it is spent on."""

    training: float
    rollouts: float = 0.0
    evaluation: float = 0.0
    saving: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.training + self.rollouts + self.evaluation + self.saving


def measure_speed(trainer: BaseTrainer, micros: Sequence[Micro], eval_micro: Any = None) -> Speed:
    """Time a few micro-batches and a step of the optimizer.

    Args:
        trainer: of the run; nothing may be trained with it afterwards.
        micros: the largest micro-batch, which warms up, and typical ones.
        eval_micro: a batch of evaluation rows.

    Returns:
        Times of a token and of an update.
    """
    trainer.optimizer = None
    trainer.create_optimizer()
    model: Any = trainer.model
    model.train()
    largest, *typical = micros
    first = _seconds(lambda: backward(trainer, largest))
    update(trainer)  # makes the optimizer's state
    # From here on the memory is that of a step in the middle of a run: gradients, state, and the largest batch.
    seconds, tokens = 0.0, 0
    for micro in typical or [largest]:
        seconds += _seconds(lambda micro=micro: backward(trainer, micro))  # type: ignore[misc]
        tokens += micro.batch.input_ids.numel()
        # Without accumulation no gradient is left when the next batch is read.
        if trainer.args.gradient_accumulation_steps == 1:
            update(trainer)
    # The largest batch, with the gradients of others: the highest point of a step.
    if typical:
        backward(trainer, largest)
    update_seconds = _seconds(lambda: update(trainer))
    eval_token = 0.0
    if eval_micro is not None:
        eval_token = _seconds(lambda: forward(trainer, eval_micro)) / eval_micro.input_ids.numel()
    return Speed(seconds / tokens, update_seconds, eval_token, first)


def forward(trainer: BaseTrainer, batch: Any) -> None:
    """What evaluation computes of a batch.

    Args:
        trainer: of the run.
        batch: on the device.
    """
    model: Any = trainer.model
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        trainer.measure(model, batch)


def _seconds(work: Callable[[], Any]) -> float:
    _synchronize()
    started_at = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - started_at


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def existing_parent(folder: Path) -> Path:
    """The folder, or the next one above it that exists.

    Args:
        folder: may be missing.

    Returns:
        A folder.

    Raises:
        OSError: nothing can be written there.
    """
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OSError(f"{parent}: cannot be written; choose another --output_dir")
    return parent


def seconds_to_save(num_bytes: int, folder: Path) -> float:
    """The time to write files, from a trial of 64 MiB without a name, which is gone afterwards.

    Args:
        num_bytes: to write.
        folder: on the disk that is written to.

    Returns:
        Seconds.
    """
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        started_at = time.perf_counter()
        for _ in range(_TRIAL_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - started_at
    return seconds * num_bytes / _TRIAL_BYTES
