"""What a run shows while it trains: one line for each entry of the log, and how far it is."""

import time
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import CallbackHandler, PrinterCallback
from transformers.trainer_utils import has_length

from rlhf.runs.lines import Pace, figures_of, log_line
from rlhf.runs.screens import Screen, make_screen

# In a notebook the second one is another class, which needs IPython.
REPLACED = (PrinterCallback, DEFAULT_PROGRESS_CALLBACK)
"""Callbacks of transformers that :class:`ProgressLines` stands for."""


class ProgressLines(TrainerCallback):
    """Shows each entry of the log, and a bar where the output can show one; in the first process only.

    Lines are shown inside the ``with`` statement only, which a trainer opens for its training: an evaluation by itself
    returns its metrics.

    Args:
        trainer_class: decides which metrics a line has.
        log_all: whether to show all other metrics too.
        plain: whether to show lines of text alone, wherever this runs.
    """

    def __init__(self, trainer_class: type, log_all: bool, plain: bool) -> None:
        self.figures = figures_of([base.__name__ for base in trainer_class.__mro__])
        self.log_all, self.plain = log_all, plain
        self._screen: Screen | None = None
        self._open = 0  # with statements around this one
        self._is_training = False
        self._began: float | None = None  # when training began in this process
        self._first_step = 0
        self._mark = 0.0  # until when the time of training is counted
        self._seconds = 0.0  # of training since the last line of it, without evaluation and saving
        self._tokens: int | None = None  # read until that line
        self._speed: float | None = None  # tokens a second at that line
        self._last_shown: tuple[str, dict[str, float]] | None = None
        self._batches = 0  # of the evaluation so far

    def __enter__(self) -> "ProgressLines":
        if self._open == 0:
            self._screen = make_screen(self.plain)
        self._open += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._open -= 1
        if self._open == 0 and self._screen is not None:
            self._screen.close()
            self._screen = None

    def tell(self, text: str) -> None:
        """Show any other text, above the bar where there is one.

        Args:
            text: of one or more lines.
        """
        if self._screen is not None:
            self._screen.tell(text)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._is_training = True
        self._began = self._mark = time.monotonic()
        self._first_step, self._seconds, self._speed = state.global_step, 0.0, None
        # A resumed run has tokens of before in its first line, whose time is unknown.
        self._tokens = state.num_input_tokens_seen if state.global_step == 0 else None
        self._move(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the time of the step, and move the bar."""
        now = time.monotonic()
        self._seconds += now - self._mark
        self._mark = now
        self._move(state)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Move the bar of the evaluation."""
        self._batches += 1
        if has_length(eval_dataloader):
            self._move(state, (self._batches, len(eval_dataloader)))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go back to the bar of training."""
        self._batches, self._mark = 0, time.monotonic()
        if self._is_training:
            self._move(state)
        elif self._screen is not None:
            self._screen.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away, also where training has stopped early."""
        self._is_training = False
        if self._screen is not None:
            self._screen.close()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the time of saving out of the speed."""
        self._mark = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show a line."""
        if self._screen is None or not state.is_world_process_zero:
            return
        logs = logs or {}
        if "loss" in logs:
            self._measure_speed(logs)
        line = log_line(logs, self.figures, self._pace(state))
        # A command evaluates after training, as it may have done after the last step.
        if line is not None and (line.head, line.figures) != self._last_shown:
            self._screen.show(line, self.log_all)
            self._last_shown = line.head, line.figures

    def _measure_speed(self, logs: dict[str, Any]) -> None:
        tokens = logs.get("num_tokens")
        if tokens is not None and self._tokens is not None and self._seconds > 0:
            self._speed = (tokens - self._tokens) / self._seconds
        self._tokens, self._seconds = tokens, 0.0

    def _pace(self, state: Any) -> Pace:
        done = state.global_step - self._first_step
        left = None
        if self._began is not None and done > 0:
            left = (time.monotonic() - self._began) / done * (state.max_steps - state.global_step)
        return Pace(state.global_step, state.max_steps, self._speed, left)

    def _move(self, state: Any, evaluated: tuple[int, int] | None = None) -> None:
        if self._screen is not None and state.is_world_process_zero:
            self._screen.move(self._pace(state), evaluated)


def replace_progress(handler: CallbackHandler, callbacks: Sequence[TrainerCallback]) -> None:
    """Put callbacks in the place of those with which transformers shows a run.

    Args:
        handler: of the trainer's callbacks.
        callbacks: are called in this order.
    """
    for replaced in REPLACED:
        handler.remove_callback(replaced)
    for callback in callbacks:
        handler.add_callback(callback)
