"""A budget of seconds for a run, and files by which processes wait for each other."""

import time
from pathlib import Path
from typing import Any

import torch
from settings import WARMUP_STEPS
from transformers import TrainerCallback


def wait_for(file: Path) -> None:
    """Wait until another process has made the file."""
    while not file.exists():
        time.sleep(0.05)


def work_seconds() -> float:
    """On a GPU the time; on a CPU that of this process alone, so that other programs on the machine do not count."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def wait_for_device() -> None:
    """Wait for what is queued on the GPU: a step that is not done has not been trained."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Budget(TrainerCallback):
    """Ends a run after some seconds of training; keeps what it logged with the seconds of each line.

    Args:
        seconds: that the run may train.
        decays: let the learning rate fall to 0 over them; otherwise it stays.
    """

    def __init__(self, seconds: float, decays: bool = True) -> None:
        self.seconds, self.decays = seconds, decays
        self.started = self.wall_started = 0.0
        self.lines: list[dict[str, Any]] = []

    @property
    def elapsed(self) -> float:
        """Seconds since training began, of :func:`work_seconds`."""
        return work_seconds() - self.started

    @property
    def wall_seconds(self) -> float:
        """Seconds on the clock since training began."""
        return time.perf_counter() - self.wall_started

    def rate(self, step: int) -> float:
        """The share of the peak learning rate: a short warm-up, then constant or down to 0 over the seconds."""
        left = max(0.0, 1 - self.elapsed / self.seconds) if self.started and self.decays else 1.0
        return left * min(1.0, (step + 1) / WARMUP_STEPS)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_device()
        self.started, self.wall_started = work_seconds(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_device()
        if self.elapsed >= self.seconds:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        figures = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        self.lines.append({"seconds": round(self.elapsed, 3), "step": state.global_step, **figures})

    def train(self, trainer: Any) -> list[dict[str, Any]]:
        """Train until the seconds are over.

        Args:
            trainer: of this package or of TRL; the callback is added here.
        Returns:
            The lines of its log.
        """
        trainer.add_callback(self)
        trainer.create_optimizer()
        # The learning rate follows the clock, so that all runs of a comparison end theirs at 0.
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, self.rate)
        trainer.train()
        return self.lines
