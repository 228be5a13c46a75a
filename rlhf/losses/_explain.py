"""Why a loss is not a number, or does not fall."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


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
    reasons = [reason for name, value in (inputs or {}).items() for reason in _of_input(name, value)]
    history = [float(loss.detach())] if isinstance(loss, Tensor) else [float(value) for value in loss]
    if isinstance(loss, Tensor) and not loss.requires_grad and not reasons:
        reasons.append("the loss has no gradient: it was detached, or computed under no_grad or from frozen parameters")
    if model is not None:
        reasons += _of_model(model)
    if not math.isfinite(history[-1]) and not reasons:
        good = next((i for i in range(len(history) - 1, -1, -1) if math.isfinite(history[i])), None)
        since = "" if good is None else f" since step {good + 2} of those given"
        reasons.append(
            f"the loss is {history[-1]}{since} and its inputs show no cause: lower the learning rate, clip gradients, "
            "or compute in float32; log(0) and 0/0 inside the model are the usual ways"
        )
    return reasons + (_of_history(history, num_classes) if len(history) > 3 else [])


def _of_input(name: str, value: Tensor) -> list[str]:
    if value.dtype == torch.bool and not value.any():
        return [f"{name} is False everywhere: nothing counts, and the loss is 0 whatever the model does"]
    if not value.is_floating_point():
        return [f"{name} is -100 everywhere: nothing is scored"] if value.numel() and (value == -100).all() else []
    finite = value.isfinite()
    if not finite.all():
        where = tuple((~finite).nonzero()[0].tolist())
        cause = "look for an overflow or a division by zero upstream"
        return [f"{name}{list(where)} is {float(value[where])}: the loss cannot be a number; {cause}"]
    if value.numel() > 1 and float(value.detach().std()) == 0:
        return [
            f"{name} is the same everywhere ({float(value.detach().flatten()[0]):.4g}): a dead layer, or zero weights?"
        ]
    return []


def _of_model(model: nn.Module) -> list[str]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        return ["no parameter requires a gradient: the model is frozen"]
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            return [f"parameter {name} holds {_kind(p)}: an earlier update broke it; go back to a checkpoint before"]
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    if not gradients:
        return []
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            return [f"the gradient of {name} holds {_kind(gradient)}: clip it, lower the scale, or compute in float32"]
    norm = math.sqrt(sum(float(gradient.double().norm()) ** 2 for gradient in gradients.values()))
    if norm == 0:
        return ["all gradients are 0: a saturated or clipped loss, or nothing that counts"]
    without = len(trained) - len(gradients)
    missing = [f"{without} of {len(trained)} trained parameters have no gradient: the loss does not reach them"]
    large = [f"the gradient's norm is {norm:.3g}: clip it (1.0 is usual) or lower the learning rate"]
    return (missing if without else []) + (large if norm > 1e3 else [])


def _of_history(history: Sequence[float], num_classes: int | None) -> list[str]:
    if not all(map(math.isfinite, history)):
        return []
    first, last = history[0], history[-1]
    size = max(abs(first), abs(last), 1e-12)
    steps = [b - a for a, b in pairwise(history)]
    if max(history) - min(history) < 1e-6 * size:
        return ["the loss does not move at all: is optimizer.step() called, and on these parameters?"]
    if last > first + 0.1 * size:
        return [f"the loss grows, from {first:.4g} to {last:.4g}: lower the learning rate, or look at the loss's sign"]
    turns = sum(a * b < 0 for a, b in pairwise(steps))
    if turns > 0.7 * len(steps) and max(map(abs, steps)) > 0.3 * size:
        return ["the loss jumps up and down: lower the learning rate or enlarge the batch"]
    if first - last < 0.01 * size:
        if num_classes and abs(last - math.log(num_classes)) < 0.02 * math.log(num_classes):
            guess = f"log({num_classes}) = {math.log(num_classes):.4g}"
            return [f"the loss stays at {guess}, that of a guess: are labels and inputs in the same order?"]
        return ["the loss hardly falls: raise the learning rate, or check that the targets can be learned"]
    return []


def _kind(value: Tensor) -> str:
    return "NaN" if value.isnan().any() else "infinity"
