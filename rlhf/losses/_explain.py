"""Why a loss is not a number, or does not fall."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from rlhf.losses._checks import cause_of, check_tensor, non_finite

LARGE_NORM = 1e3  # of a gradient: far beyond what clipping at 1.0 leaves


def explain(
    loss: Tensor | Sequence[float],
    *,
    inputs: Mapping[str, Tensor] | None = None,
    model: nn.Module | None = None,
    num_classes: int | None = None,
) -> list[str]:
    """Why a loss is NaN, infinite or constant, and what to do; the most likely reason first.

    Args:
        loss: a scalar before or after ``backward()``, or the losses of the last steps, oldest first.
        inputs: by name, what the loss was computed from (logits, targets, masks).
        model: its parameters and their gradients are checked.
        num_classes: of a cross-entropy; used to recognise the loss of random guessing.
    Returns:
        Sentences; empty where nothing looks wrong.
    Raises:
        ValueError: an input is no tensor.
    Example:
        >>> explain(torch.tensor(float("nan")), inputs={"logits": torch.tensor([0.0, float("inf")])})
        ['logits[1] is inf: the loss cannot be a number; look for an overflow or a division by 0 upstream']
    """
    reasons: list[str] = []
    for name, value in (inputs or {}).items():
        check_tensor(name, value)
    # A NaN in any input explains all that follows.
    for name, value in (inputs or {}).items():
        reasons += _of_non_finite(name, value)
    for name, value in (inputs or {}).items():
        reasons += _of_input(name, value)
    history = [float(loss.detach())] if isinstance(loss, Tensor) else [float(value) for value in loss]
    if isinstance(loss, Tensor) and not loss.requires_grad and not reasons:
        reasons.append("the loss has no gradient: it was detached, or computed under no_grad or from frozen parameters")
    if model is not None:
        reasons += _of_model(model)
    # Only where nothing better was found: the cause is then between the inputs and the loss.
    if not math.isfinite(history[-1]) and not reasons:
        finite_steps = [step for step, value in enumerate(history) if math.isfinite(value)]
        since_step = f" since step {finite_steps[-1] + 2} of those given" if finite_steps else ""
        reasons.append(
            f"the loss is {history[-1]}{since_step} and its inputs show no cause: lower the learning rate, "
            "clip gradients, or compute in float32; log(0) and 0/0 inside the model are the usual ways"
        )
    # Three losses or fewer show no trend.
    return reasons + (_of_history(history, num_classes) if len(history) > 3 else [])


def _of_non_finite(name: str, value: Tensor) -> list[str]:
    if not value.is_floating_point() or value.isfinite().all():
        return []
    return [f"{non_finite(name, value)}: the loss cannot be a number; look for {cause_of(value)}"]


def _of_input(name: str, value: Tensor) -> list[str]:
    if value.dtype == torch.bool and not value.any():
        return [f"{name} is False everywhere: nothing counts, and the loss is 0 whatever the model does"]
    # -100 is the label that transformers and torch ignore.
    if value.dtype == torch.int64 and value.numel() and (value == -100).all():
        return [f"{name} is -100 everywhere: nothing is scored"]
    values = value.detach().flatten()
    is_constant = values.numel() > 1 and bool((values == values[0]).all())
    if not is_constant:
        return []
    constant = f"{name} is the same everywhere ({values[0].item():.4g})"
    # Targets and labels are data; an attention mask and weights of 1 everywhere are usual.
    if any(word in name.lower() for word in ("target", "label")) or name in ("y", "y_true"):
        return [f"{constant}: this batch has one class or one value, so shuffle the data"]
    if not value.is_floating_point() or "mask" in name or "weight" in name:
        return []
    return [f"{constant}: if a model computed it, look for a dead layer or for weights of 0"]


def _of_model(model: nn.Module) -> list[str]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        return ["no parameter requires a gradient: the model is frozen"]
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            advice = "an earlier update broke it; go back to a checkpoint before"
            return [f"parameter {name} holds {_kind(parameter)}: {advice}"]
    gradients = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    if not gradients:
        return []
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            return [f"the gradient of {name} holds {_kind(gradient)}: clip it, lower the scale, or compute in float32"]
    # In float64, as the squares of a large gradient overflow in half precision.
    gradient_norms = [float(gradient.double().norm()) for gradient in gradients.values()]
    total_norm = math.hypot(*gradient_norms)
    if total_norm == 0:
        return ["all gradients are 0: a saturated or clipped loss, or nothing that counts"]
    reasons = []
    missing = len(trained) - len(gradients)
    if missing:
        reasons.append(f"{missing} of {len(trained)} trained parameters have no gradient: the loss does not reach them")
    if total_norm > LARGE_NORM:
        reasons.append(f"the gradient's norm is {total_norm:.3g}: clip it (1.0 is usual) or lower the learning rate")
    return reasons


def _of_history(history: Sequence[float], num_classes: int | None) -> list[str]:
    if not all(map(math.isfinite, history)):
        return []
    first_loss, last_loss = history[0], history[-1]
    # The floor makes losses of exactly 0 count as constant: 0 < 0 would be False.
    loss_size = max(abs(first_loss), abs(last_loss), 1e-12)
    changes = [later - earlier for earlier, later in pairwise(history)]
    if max(history) - min(history) < 1e-6 * loss_size:
        return ["the loss does not move at all: is optimizer.step() called, and on these parameters?"]
    if last_loss > first_loss + 0.1 * loss_size:
        return [
            f"the loss grows, from {first_loss:.4g} to {last_loss:.4g}: "
            "lower the learning rate, or look at the loss's sign"
        ]
    reversals = sum(earlier * later < 0 for earlier, later in pairwise(changes))
    # Most steps go back on the one before, and some of them far.
    if reversals > 0.7 * len(changes) and max(map(abs, changes)) > 0.3 * loss_size:
        return ["the loss jumps up and down: lower the learning rate or enlarge the batch"]
    if first_loss - last_loss < 0.01 * loss_size:
        # A guess among equals costs log(classes).
        guess_loss = math.log(num_classes) if num_classes else 0.0
        if num_classes and abs(last_loss - guess_loss) < 0.02 * guess_loss:
            value = f"log({num_classes}) = {guess_loss:.4g}"
            return [f"the loss stays at {value}, that of a guess: are labels and inputs in the same order?"]
        return ["the loss hardly falls: raise the learning rate, or check that the targets can be learned"]
    return []


def _kind(value: Tensor) -> str:
    return "NaN" if value.isnan().any() else "infinity"
