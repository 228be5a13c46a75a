"""What is looked at once in each optimizer step: signals that ask to stop, and whether its gradient is finite."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import TrainOutput

from rlhf.data import Batch
from rlhf.trainers.metric_sums import MetricSums
from rlhf.trainers.nonfinite import RowSource, StepRecord, describe_rows, describe_step
from rlhf.trainers.profiling import ProfiledTrainer
from rlhf.trainers.stopping import ObeySignals, SignalRequests

logger = logging.getLogger(__name__)


class CheckedSteps(ProfiledTrainer):
    """A ``transformers.Trainer`` that ends, or leaves a step out, where a loss or a gradient is not finite.

    It obeys signals at the end of a step, where it was told to.
    """

    args: Any
    signal_requests: SignalRequests | None = None
    row_source: RowSource | None = None  # of the training rows
    _metric_sums: MetricSums
    nonfinite_steps = 0  # steps that were left out

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_record = StepRecord()

    def obey(self, requests: SignalRequests) -> None:
        """Save, or stop, at the end of the step in which a signal comes.

        Args:
            requests: those of :func:`rlhf.trainers.stopping.noted_signals`. All processes must call this, or none.
        """
        self.signal_requests = requests
        self.add_callback(ObeySignals(requests))

    # A step that is not finite

    def begin_step(self, batches: list[Batch]) -> None:
        """Keep what a message about this step needs.

        Args:
            batches: of the step, of this process.
        """
        undo = self.undo_step() if self.args.on_nonfinite == "skip" else None
        self.step_record = StepRecord(batches, undo=undo)

    def undo_step(self) -> list[Callable[[], None]]:
        """What gives metrics the values that they have now, where the step that begins is left out."""
        loss_before = self._tr_loss.clone()  # added to in place
        sums_before = self._metric_sums.copy()

        def undo() -> None:
            self._tr_loss.copy_(loss_before)
            # The mean loss of a line of the log is over the steps since this one.
            self._globalstep_last_logged += 1
            self._metric_sums = sums_before

        return [undo]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        record, self.step_record = self.step_record, StepRecord()
        is_bad = self._has_bad_loss(record)
        # DeepSpeed has no norm before its first step.
        if is_bad or (norm is not None and not math.isfinite(float(norm))):
            self._treat_nonfinite(model, norm, record)
        return norm

    def _has_bad_loss(self, record: StepRecord) -> bool:
        """Whether a loss of this step, in any process, is not finite. The signals of all processes come along.

        Here, before the weights change, a step waits for the device, once.
        """
        received = [] if self.signal_requests is None else self.signal_requests.pop_received()
        bad_loss = record.has_bad_loss(self.args.device)
        flags = torch.stack([bad_loss, *(torch.full_like(bad_loss, flag) for flag in received)])
        has_bad_loss, *num_receivers = self.accelerator.reduce(flags).tolist()
        if self.signal_requests is not None:
            self.signal_requests.settle(num_receivers)
        return has_bad_loss > 0

    def _treat_nonfinite(self, model: Any, norm: Any, record: StepRecord) -> None:
        """Leave the step out or raise, in all processes alike."""
        losses = gather_object(record.bad_losses())
        scaler = self.accelerator.scaler
        # A scaled gradient of float16 may overflow: such a step is left out by the scaler, which then scales less.
        # A scale below 1 would make a gradient smaller than it is.
        if scaler is not None and not losses and scaler.get_scale() >= 1:
            return
        sequences = record.bad_sequences() if losses else record.all_sequences()
        own_rows = describe_rows(sequences, self.train_dataset, self.row_source, self.processing_class)
        message = describe_step(self.state.global_step + 1, norm, losses, gather_object(own_rows))
        if record.undo is None or self.nonfinite_steps >= self.args.max_nonfinite_steps:
            raise FloatingPointError(f"{message}; {self._what_to_do()}")
        self.nonfinite_steps += 1
        for undo in record.undo:
            undo()
        # An optimizer passes over weights that have no gradient. float16's scaler has noted that it must not step.
        if scaler is None:
            model.zero_grad()
        if self.is_world_process_zero():
            logger.warning(
                "%s; left out (%d of at most %d)", message, self.nonfinite_steps, self.args.max_nonfinite_steps
            )

    def _what_to_do(self) -> str:
        if self.args.on_nonfinite == "skip":
            return f"{self.nonfinite_steps} steps were left out before (--max_nonfinite_steps)"
        return "nothing was saved; look at these rows, lower --learning_rate, or pass --on_nonfinite skip"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``transformers.Trainer``, with the number of steps that were left out."""
        if self.args.on_nonfinite == "skip" and ("loss" in logs or "train_loss" in logs):
            logs["nonfinite_steps"] = self.nonfinite_steps
        super().log(logs, start_time)
        bad_names = [name for name, value in logs.items() if name.startswith("eval_") and _is_bad_loss(name, value)]
        if bad_names and self.is_world_process_zero():
            logger.warning("step %d: not finite in evaluation: %s", self.state.global_step, ", ".join(bad_names))

    def check_nonfinite_options(self) -> None:
        """Refuse to leave steps out where that is too late.

        Raises:
            ValueError: DeepSpeed changes the weights before its gradient can be looked at.
        """
        if self.args.on_nonfinite == "skip" and self.is_deepspeed_enabled:
            raise ValueError(
                "--on_nonfinite skip: DeepSpeed takes a step before it can be left out; use stop, or FSDP2"
            )

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


def _is_bad_loss(name: str, value: Any) -> bool:
    return name.endswith("loss") and not math.isfinite(value)
