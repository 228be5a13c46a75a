"""Input checks shared by every loss: one line that names the argument, its value and what to pass instead."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

# A module's state instead of an argument, so that checks() reaches losses deep inside a trainer.
_level: Literal["off", "warn", "error"] = "off"
# A warning names the first line outside of these folders: torch calls the losses that are modules.
_NOT_THE_CALLER = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))


@dataclass
class Seen:
    """What the losses have seen since a context of :data:`checks` was entered.

    Attributes:
        sizes: by loss, the number of elements that it was last summed over.
        label_counts: by loss, how often each class has occurred.
        advised: losses about which advice was given. It is given once.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    label_counts: dict[str, Tensor] = field(default_factory=dict)
    advised: set[str] = field(default_factory=set)


_seen = Seen()


class Checks:
    """``with rlhf.losses.checks():`` checks the values of tensors too, and raises; ``checks.warn()`` warns.

    Types, shapes, dtypes and hyper-parameters are always checked. The values of labels and probabilities are always
    checked on a CPU. On an accelerator they are checked inside ``checks()`` only, as the check waits for the device.

    Inside ``checks()`` legal values that look like a mistake are errors as well: NaN or infinity, a sigmoid or softmax
    before a loss that applies its own, continuous targets in a classification, classes in a regression, sums over
    batches of different sizes. Rare classes are counted over the batches of a context, and give a warning.
    """

    def __call__(self, enabled: bool = True):  # type: ignore[no-untyped-def]
        return self._within("error" if enabled else "off")

    def warn(self):  # type: ignore[no-untyped-def]
        return self._within("warn")

    @contextmanager
    def _within(self, level: Literal["off", "warn", "error"]) -> Iterator[None]:
        global _level, _seen
        previous_level, _level = _level, level
        # Batches are compared within one context: the next may be about other data.
        _seen = Seen()
        try:
            yield
        finally:
            _level = previous_level


checks = Checks()


def checking() -> bool:
    """Whether values are checked on an accelerator too."""
    return _level != "off"


def seen() -> Seen:
    """What the losses have seen in the present context."""
    return _seen


def suspect(message: str) -> None:
    """Report legal values that look like a mistake: an error inside ``checks()``, and a warning elsewhere."""
    if _level == "error":
        raise ValueError(message)
    warn(message)


def warn(message: str) -> None:
    """Warn, with the line of the user's code that called the loss."""
    stack_level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_CALLER):
        stack_level, frame = stack_level + 1, frame.f_back
    warnings.warn(message, stacklevel=stack_level)


def check_tensor(name: str, value: Any) -> None:
    """Raise for anything that is not a tensor, such as a list or a NumPy array."""
    if isinstance(value, Tensor):
        return
    if value is None:
        raise ValueError(f"{name} is None: pass a tensor")
    kind = type(value)
    library = "" if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}."
    size = ""
    if hasattr(value, "shape"):
        size = f" of shape {tuple(value.shape)}"
    elif hasattr(value, "__len__"):
        size = f" of {len(value)}"
    call = f"torch.as_tensor({name})"
    # A Series of pandas is read by its index, which need not begin at 0.
    if hasattr(value, "to_numpy"):
        call = f"torch.as_tensor({name}.to_numpy())"
    elif isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        call = f"torch.stack({name})"
    raise ValueError(f"{name} must be a torch.Tensor, got a {library}{kind.__name__}{size}: pass {call}")


def check_tensors(**named: Any) -> None:
    """:func:`check_tensor` of several arguments."""
    for name, value in named.items():
        check_tensor(name, value)


def check_floating(name: str, value: Tensor) -> None:
    """Raise unless a tensor is floating point; inside ``checks()``, report NaN and infinity."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {_described(value)}: {_float_remedy(name)}")
    if not checking():
        return
    # From here on values are read, which waits for an accelerator.
    is_finite = value.isfinite()
    if not is_finite.all():
        suspect(f"{non_finite(name, value)}: look for {cause_of(value)}")


def _described(value: Tensor) -> str:
    description = f"{value.dtype} of shape {tuple(value.shape)}"
    if value.numel() and value.device.type == "cpu":
        description += f", the first {value.flatten()[0].item()}"
    return description


def _float_remedy(name: str) -> str:
    if name in ("logits", "scores", "predictions", "probabilities"):
        return "pass the output of the model first, without argmax or rounding; the targets come second"
    if name.endswith(("logps", "log_probs")):
        return "pass log-probabilities"
    return f"pass {name}.float()"


def non_finite(name: str, value: Tensor) -> str:
    """The first element that is NaN or infinite, such as ``logits[3, 0] is nan``."""
    position = first_true(~value.isfinite())
    return f"{element(name, position)} is {float(value[position])}"


def cause_of(value: Tensor) -> str:
    """The usual origin of the first element that is NaN or infinite."""
    first = float(value[first_true(~value.isfinite())])
    if first == float("-inf"):
        return "the logarithm of 0 upstream"
    return "an overflow or a division by 0 upstream" if first == float("inf") else "0/0 or inf - inf upstream"


def first_true(condition: Tensor) -> tuple[int, ...]:
    """The position of the first element that is True."""
    return tuple(condition.nonzero()[0].tolist())


def element(name: str, position: tuple[int, ...]) -> str:
    """An element as it is written in Python; a scalar has no brackets."""
    return f"{name}{list(position)}" if position else name


def check_same_shape(**named: Tensor | None) -> None:
    """Raise unless the tensors have one shape. None is left out."""
    # Equal, not broadcastable: [B, 1] against [B] would silently become [B, B].
    shapes = {}
    for name, value in named.items():
        if value is not None:
            check_tensor(name, value)
            shapes[name] = tuple(value.shape)
    if len(set(shapes.values())) > 1:
        seen_shapes = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes must be equal, got {seen_shapes}{_squeeze_hint(shapes)}")


def _squeeze_hint(shapes: dict[str, tuple[int, ...]]) -> str:
    # The output of nn.Linear(n, 1) is a column.
    for name, shape in shapes.items():
        if any(shape == (*other, 1) for other in shapes.values()):
            return f": pass {name}.squeeze(-1)"
    return ""


def first_rows(values: Tensor, rows: int = 8) -> Tensor:
    """Some rows [..., C] without their gradient: enough to know a softmax, too few to cost time."""
    values = values.detach()
    # Not flattened, which would copy a tensor that is not contiguous.
    while values.dim() > 2 and len(values):
        values = values[0]
    return values[:rows] if values.dim() > 1 else values


def is_cheap_to_read(values: Tensor) -> bool:
    """Whether values may be looked at: on an accelerator that waits for the device, so only on request."""
    return values.device.type == "cpu" or checking()


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise unless ``low <= value < high`` (``low < value`` with ``open_low``)."""
    above_low = low < value if open_low else low <= value
    if not above_low or not value < high:  # so that NaN fails too
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must be in {bracket}{low}, {high}), got {value}")


def check_probabilities(name: str, value: Tensor, remedy: str = "") -> tuple[float, float] | None:
    """Raise unless all values lie in [0, 1]; like label ranges, read on CPU always and elsewhere on request.

    Args:
        name: of the argument.
        value: any shape.
        remedy: what to do instead; by default it is guessed from the values, as those of targets.
    Returns:
        The smallest and the largest value; None where they are not read.
    Raises:
        ValueError: one lies outside.
    """
    if not value.numel() or not is_cheap_to_read(value):
        return None
    smallest, largest = float(value.detach().min()), float(value.detach().max())
    # NaN passes both comparisons; finding it is what checks() is for.
    if smallest < 0 or largest > 1:
        got = f"got values from {smallest:.4g} to {largest:.4g}"
        raise ValueError(f"{name} must be probabilities in [0, 1], {got}: {remedy or _target_remedy(name, value)}")
    return smallest, largest


def _target_remedy(name: str, targets: Tensor) -> str:
    values = set(targets.detach().unique().tolist())
    # A mask puts 0 where an element is hidden.
    if values <= {-1.0, 0.0, 1.0}:
        return f"for labels of -1 and 1 pass ({name} + 1) / 2"
    if values == {1.0, 2.0}:
        return f"for labels of 1 and 2 pass {name} - 1"
    if values == set(map(float, range(len(values)))):
        return f"for {len(values)} classes use cross_entropy_loss, with {len(values)} logits for each row"
    return "for continuous targets use a regression loss such as mse_loss"
