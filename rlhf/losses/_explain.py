"""Why a loss is not a number, or does not fall."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from rlhf.losses._checks import first_true

LARGE_NORM = 1e3  # of a gradient: far beyond what clipping at 1.0 leaves


def explain(
    loss: Tensor | Sequence[float],
    *,
    inputs: Mapping[str, Tensor] | None = None,
    model: nn.Module | None = None,
    num_classes: int | None = None,
) -> list[str]:
    """In words: why a loss is NaN, infinite or stuck, with what to do. The likeliest reason first.

    Args:
        loss: a scalar before or after ``backward()``, or the losses of the last steps, oldest first.
        inputs: by name, what the loss was computed from (logits, targets, masks).
        model: its parameters and their gradients are looked at.
        num_classes: for a cross-entropy, to know the value of a guess.
    Returns:
        Sentences; empty where nothing looks wrong.
    Example:
        >>> explain(torch.tensor(float("nan")), inputs={"logits": torch.tensor([0.0, float("inf")])})
        ['logits[1] is inf: the loss cannot be a number; look for an overflow or a division by zero upstream']
    """
    reasons: list[str] = []
    # Inputs come first: a NaN there explains all that follows.
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


def _of_input(name: str, value: Tensor) -> list[str]:
    if value.dtype == torch.bool and not value.any():
        return [f"{name} is False everywhere: nothing counts, and the loss is 0 whatever the model does"]
    if not value.is_floating_point():
        # -100 is the label that transformers and torch ignore.
        return [f"{name} is -100 everywhere: nothing is scored"] if value.numel() and (value == -100).all() else []
    is_finite = value.isfinite()
    if not is_finite.all():
        position = first_true(~is_finite)
        likely_cause = "look for an overflow or a division by zero upstream"
        return [f"{name}{list(position)} is {float(value[position])}: the loss cannot be a number; {likely_cause}"]
    value = value.detach()
    if value.numel() > 1 and float(value.std()) == 0:
        return [f"{name} is the same everywhere ({float(value.flatten()[0]):.4g}): a dead layer, or zero weights?"]
    return []


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
