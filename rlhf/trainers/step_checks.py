"""What is looked at once in each optimizer step: signals that ask to stop."""

from typing import Any

from torch import Tensor
from transformers.trainer_utils import TrainOutput

from rlhf.trainers.profiling import ProfiledTrainer
from rlhf.trainers.stopping import ObeySignals, SignalRequests


class CheckedSteps(ProfiledTrainer):
    """A ``transformers.Trainer`` that obeys signals at the end of a step, where it was told to."""

    signal_requests: SignalRequests | None = None

    def obey(self, requests: SignalRequests) -> None:
        """Save, or stop, at the end of the step in which a signal comes.

        Args:
            requests: those of :func:`rlhf.trainers.stopping.noted_signals`. All processes must call this, or none.
        """
        self.signal_requests = requests
        self.add_callback(ObeySignals(requests))

    def reduce_count(self, count: Tensor) -> Tensor:
        """The sum over all processes of what the loss of a step is divided by.

        Args:
            count: of this process.
        Returns:
            The sum.
        """
        if self.signal_requests is None:
            return self.accelerator.reduce(count)
        return self.signal_requests.reduce_with(count, self.accelerator)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.signal_requests is None or self.signal_requests.stopped_by is None:
            return super()._finalize_training(*args, **kwargs)
        # A finished run goes back to its best checkpoint, and may delete the last one: this one resumes from it.
        limits = self.args.load_best_model_at_end, self.args.save_total_limit
        self.args.load_best_model_at_end, self.args.save_total_limit = False, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.load_best_model_at_end, self.args.save_total_limit = limits
