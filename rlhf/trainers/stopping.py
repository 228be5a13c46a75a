"""Signals that ask a run to stop or to save: noted when they come, and obeyed by all processes at the end of a step."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.trainers.processes import another_process_failed

STOPPING = (signal.SIGTERM, signal.SIGINT)
# Windows has no signal that a user may give a meaning.
SAVING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()
NOTED = (*STOPPING, *SAVING)


class SignalRequests:
    """The signals that this process got, and those that all processes obey at the end of this step.

    Only one of several processes may get a signal, and a launcher passes one on at different moments. So the trainer
    adds up what each got before the end of a step.
    """

    def __init__(self) -> None:
        self.due: set[int] = set()  # what all processes obey at the end of this step
        self.stopped_by: signal.Signals | None = None  # set once training has been told to end
        self._received: set[int] = set()
        self._process_id = os.getpid()

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Note a signal; the handler that Python calls.

        Args:
            number: of the signal.
            frame: not read.
        Raises:
            KeyboardInterrupt: Ctrl-C was pressed before, so that this one does not wait.
        """
        if os.getpid() != self._process_id:
            self._answer_in_a_child(number)
        # The launcher's: there are no more steps, as the others would wait for the one that failed.
        elif number == signal.SIGTERM and another_process_failed():
            _end_by(number)
        # SIGTERM alone may come twice without anybody's impatience: from a scheduler, and from the launcher it told.
        elif number == signal.SIGINT and number in self._received:
            raise KeyboardInterrupt
        else:
            self._received.add(number)

    def _answer_in_a_child(self, number: int) -> None:
        """A process that was forked, such as a worker that loads data, has this handler too."""
        # A terminal sends Ctrl-C to all processes, and the step that is to be finished needs its workers.
        if number != signal.SIGINT:
            _end_by(number)

    def pop_received(self) -> list[int]:
        """Whether this process got each of NOTED, as 1 or 0. A request to save is forgotten then."""
        received = [int(number in self._received) for number in NOTED]
        self._received -= set(SAVING)
        return received

    def settle(self, num_receivers: list[float]) -> None:
        """Set what is due, from all processes' sums.

        Args:
            num_receivers: how many processes got each of NOTED.
        """
        self.due = {number for number, count in zip(NOTED, num_receivers, strict=True) if count}


def _end_by(number: int) -> None:
    """End this process by a signal, as it would without a handler."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def noted_signals() -> Iterator[SignalRequests]:
    """Let signals be requests to the run, and not its end, while training runs.

    Only the main thread of a program can do so. Handlers that were there before are put back.
    """
    requests = SignalRequests()
    previous_handlers = {number: signal.signal(number, requests.note) for number in NOTED}
    try:
        yield requests
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


class ObeySignals(TrainerCallback):
    """Saves, and ends training, at the end of the step in which a signal was noted.

    Args:
        requests: of this process.
    """

    def __init__(self, requests: SignalRequests) -> None:
        self.requests = requests
        self._saves_at_end_of_epoch = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        due = self.requests.due
        # The run is complete, and its model is about to be saved.
        if not due or state.global_step >= state.max_steps:
            return
        # At the end of an epoch its evaluation comes before the checkpoint, as in a run that nobody stops.
        ends_epoch = state.epoch is not None and float(state.epoch).is_integer()
        self._saves_at_end_of_epoch = ends_epoch
        control.should_save = control.should_save or not ends_epoch
        stopping = [number for number in STOPPING if number in due]
        if stopping:
            self.requests.stopped_by = stopping[0]
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._saves_at_end_of_epoch:
            self._saves_at_end_of_epoch = False
            control.should_save = True
        elif self.requests.stopped_by is not None:
            # transformers ends the epoch in which it stops; this one goes on when the run does.
            control.should_log = control.should_evaluate = control.should_save = False
