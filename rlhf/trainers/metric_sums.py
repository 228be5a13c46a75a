"""Metrics as sums and counts on the device, reduced over processes once at each logging step."""

import math
from collections.abc import Set

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]
"""By name, sums and counts of any equal shape: a mean is the total of the first over the total of the second."""


class MetricSums:
    """Running sums and counts of metrics. Adding does not wait for the device; only :meth:`reduce` does."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # [2]: sum and count

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, metrics: Metrics) -> None:
        """Add the sums and counts of a batch, of this process.

        Args:
            metrics: by name, sums and counts; a name that is new begins at 0.
        """
        for name, (total, count) in metrics.items():
            dtype = sum_dtype(total.device)
            sum_and_count = torch.stack([total.detach().sum().to(dtype), count.sum().to(dtype)])
            previous = self._sums.get(name)
            self._sums[name] = sum_and_count if previous is None else previous + sum_and_count

    def copy(self) -> "MetricSums":
        """The same sums, which later additions leave as they are."""
        copied = MetricSums()
        copied._sums = dict(self._sums)  # an addition makes new tensors
        return copied

    def state(self) -> dict[str, Tensor]:
        """Sums and counts of this process since the last line of the log, for a checkpoint."""
        return {name: sum_and_count.cpu() for name, sum_and_count in self._sums.items()}

    def load_state(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Go on from what :meth:`state` returned."""
        self._sums = {name: sum_and_count.to(device) for name, sum_and_count in state.items()}

    def reduce(self, accelerator: Accelerator) -> dict[str, tuple[float, float]]:
        """Sums and counts over all processes since the last call; all processes must call it together.

        Args:
            accelerator: of the run.
        Returns:
            By name, the sum and the count.
        """
        # Every process reduces the same table, or they would wait for each other for ever.
        # A reward function may log a name that other processes do not have.
        names = sorted({name for names in gather_object([list(self._sums)]) for name in names})
        zero_sums = torch.zeros_like(next(iter(self._sums.values())))
        table = torch.stack([self._sums.get(name, zero_sums) for name in names])
        self._sums = {}
        reduced_rows = accelerator.reduce(table).tolist()
        return {name: (total, count) for name, (total, count) in zip(names, reduced_rows, strict=True)}


def means(sums: dict[str, tuple[float, float]], exp_metrics: Set[str]) -> dict[str, float]:
    """The mean of each metric.

    Args:
        sums: by name, the sum and the count.
        exp_metrics: names whose mean is reported as its exponential, such as a perplexity.
    Returns:
        By name, sum / count, or exp(sum / count); NaN where nothing was counted.
    """
    values = {}
    for name, (total, count) in sums.items():
        mean = total / count if count else math.nan
        # exp overflows from 710 on: a diverged run should report a huge number rather than stop.
        values[name] = math.exp(min(mean, 700.0)) if name in exp_metrics else mean
    return values


def known(values: dict[str, float], sums: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The values for a line of the log: without those of nothing, which are NaN.

    NaN is no JSON, and looks like training that went wrong. A NaN in what was counted stays.

    Args:
        values: by name; some may be computed from several metrics.
        sums: by name, the sum and the count.
    Returns:
        The values that something was counted for.
    """
    return {name: value for name, value in values.items() if not math.isnan(value) or sums.get(name, (0, 0))[1]}


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type of sums: float64 where the device has it.

    A variance as mean square less squared mean, and counts of millions, lose all their digits in float32.
    """
    return torch.float32 if device.type == "mps" else torch.float64
