"""Input checks shared by every loss: one line that names the argument, what was seen and what to do."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

# A module's state instead of an argument, so that checks() reaches losses deep inside a trainer.
_level: Literal["off", "warn", "error"] = "off"
# The number of elements that each loss was last summed over, inside a context.
_sizes: dict[str, int] = {}


class Checks:
    """``with rlhf.losses.checks():`` and ``with rlhf.losses.checks.warn():`` look at *values* too.

    Shapes, dtypes and hyper-parameters are always checked. Label and probability ranges are always checked on CPU,
    where it costs nothing. Inside ``checks()`` they are checked on an accelerator as well (which waits for the device),
    and so is what is legal but looks like a mistake: NaN or infinity, a sigmoid or softmax before a loss that has its
    own, continuous targets for a classification and labels for a regression, rare positives without a weight, sums over
    batches of different sizes. ``checks.warn()`` warns of the latter kind instead of raising.
    """

    def __call__(self, enabled: bool = True):  # type: ignore[no-untyped-def]
        return self._within("error" if enabled else "off")

    def warn(self):  # type: ignore[no-untyped-def]
        return self._within("warn")

    @contextmanager
    def _within(self, level: Literal["off", "warn", "error"]) -> Iterator[None]:
        global _level
        previous_level, _level = _level, level
        # Sizes are compared within one context: the next may be about other data.
        _sizes.clear()
        try:
            yield
        finally:
            _level = previous_level


checks = Checks()


def checking() -> bool:
    """Whether values are to be read on an accelerator too."""
    return _level != "off"


def suspect(message: str) -> None:
    """Something legal that looks like a mistake; only called where :func:`checking`."""
    if _level == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=4)


def check_floating(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}: pass log-probabilities or logits")
    if not checking():
        return
    # From here on values are read, which waits for an accelerator.
    is_finite = value.isfinite()
    if not is_finite.all():
        position = first_true(~is_finite)
        likely_cause = "look for an overflow or a division by zero upstream"
        suspect(f"{name}{list(position)} is {float(value[position])}: {likely_cause}")


def first_true(condition: Tensor) -> tuple[int, ...]:
    """The position of the first element that is True."""
    return tuple(condition.nonzero()[0].tolist())


def check_same_shape(**named: Tensor | None) -> None:
    # Equal, not broadcastable: [B, 1] against [B] would silently become [B, B].
    shapes = {name: tuple(value.shape) for name, value in named.items() if value is not None}
    if len(set(shapes.values())) > 1:
        seen_shapes = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes must be equal, got {seen_shapes}")


def check_labels(name: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raise unless every label is an index into ``classes`` or ``ignore_index``."""
    if labels.is_floating_point() or labels.dtype is torch.bool:
        raise ValueError(
            f"{name} must hold class indices (integers), got {labels.dtype}: for one-hot rows pass {name}.argmax(-1)"
        )
    if not labels.numel() or not is_cheap_to_read(labels):
        return
    # On CUDA such a label is a device-side assert without its position, after which the process cannot go on.
    is_outside = (labels < 0) | (labels >= classes)
    is_wrong = is_outside & (labels != ignore_index)
    if is_wrong.any():
        position = first_true(is_wrong)
        raise ValueError(
            f"{name}{list(position)} is {int(labels[position])}, outside the vocabulary [0, {classes}): "
            f"fix the label, or set it to ignore_index ({ignore_index})"
        )


def is_cheap_to_read(values: Tensor) -> bool:
    """Whether values may be looked at: on an accelerator that waits for the device, so only on request."""
    return values.device.type == "cpu" or checking()


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise unless ``low <= value < high`` (``low < value`` with ``open_low``)."""
    above_low = low < value if open_low else low <= value
    if not above_low or not value < high:  # so that NaN fails too
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must be in {bracket}{low}, {high}), got {value}")


def check_probabilities(name: str, value: Tensor) -> None:
    """Raise unless all values lie in [0, 1]; like label ranges, read on CPU always and elsewhere on request."""
    if value.numel() and is_cheap_to_read(value):
        smallest, largest = float(value.detach().min()), float(value.detach().max())
        # NaN passes both comparisons; finding it is what checks() is for.
        if smallest < 0 or largest > 1:
            raise ValueError(f"{name} must be probabilities in [0, 1], got values from {smallest:.4g} to {largest:.4g}")


def check_binary(logits: Tensor, targets: Tensor, weighted: bool) -> None:
    """What looks like a mistake in a binary classification from logits."""
    # A handful of values can look like anything.
    if not checking() or logits.numel() < 8:
        return
    if logits.min() >= 0 and logits.max() <= 1:
        suspect("logits all lie in [0, 1]: was a sigmoid applied before? this loss applies its own")
    if not ((targets == 0) | (targets == 1)).all():
        suspect("targets are neither 0 nor 1: for continuous targets use a regression loss")
    positive_share = float(targets.float().mean())
    # In fewer than 100 targets such a share is easily an accident of the batch.
    if not weighted and targets.numel() >= 100 and 0 < positive_share < 0.05:
        suspect(
            f"{positive_share:.1%} of the targets are positive and weigh as all others: "
            "set pos_weight, or use focal_loss"
        )


def check_softmax(logits: Tensor) -> None:
    """What looks like probabilities where logits belong."""
    if not checking() or logits.numel() < 8:
        return
    # The tolerance covers the rounding of a softmax in float16.
    sums_to_one = ((logits.sum(-1) - 1).abs() < 1e-3).all()
    if logits.min() >= 0 and sums_to_one:
        suspect("logits are not negative and sum to 1: was a softmax applied before? this loss applies its own")


def check_continuous(targets: Tensor) -> None:
    """What looks like labels where values belong."""
    if not checking() or targets.numel() < 8:
        return
    is_binary = ((targets == 0) | (targets == 1)).all()
    # All 0 or all 1 may be a constant target; the two together look like labels.
    if is_binary and len(targets.unique()) == 2:
        suspect("targets are all 0 or 1: for labels use bce_with_logits_loss or cross_entropy_loss")


def check_sum(loss: str, reduction: str, size: int) -> None:
    """Sums over batches of different sizes pull with different force."""
    if not checking() or reduction != "sum":
        return
    previous_size = _sizes.setdefault(loss, size)
    # The gradient of a sum grows with the batch, and with it the step.
    if previous_size != size:
        _sizes[loss] = size
        suspect(
            f"{loss} is summed over {size} elements after {previous_size}: "
            'with reduction="sum" a step grows with the batch'
        )
