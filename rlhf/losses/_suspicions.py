"""Legal values that look like a mistake. Most are only looked for inside ``checks()``."""

import torch
from torch import Tensor

from rlhf.losses._checks import checking, element, first_rows, first_true, seen, suspect, warn

# A handful of values can look like anything.
MIN_VALUES = 8
# Counts of fewer targets are easily an accident of the batch.
MIN_TARGETS, MIN_TARGETS_OF_A_CLASS = 100, 20
# A class that occurs in fewer of the targets is rare; with more than two, one that is this much rarer than another.
RARE_SHARE, RARE_RATIO = 0.05, 20
# With more classes than these they are a vocabulary, in which rare words are normal.
MAX_CLASSES = 1000


def check_binary(logits: Tensor, targets: Tensor, mask: Tensor | None, *, loss: str, weighted: bool) -> None:
    """Report what looks like a mistake in a binary classification from logits."""
    if not checking():
        return
    logits, targets = _visible(logits, mask), _visible(targets, mask)
    if logits.numel() >= MIN_VALUES:
        if logits.min() >= 0 and logits.max() <= 1:
            suspect("logits all lie in [0, 1]: was a sigmoid applied before? this loss applies its own")
        is_between = (targets != 0) & (targets != 1)
        if is_between.any():
            value = float(targets[first_true(is_between)])
            suspect(
                f"a target is {value:.4g}, neither 0 nor 1: for continuous targets use a regression loss such as "
                "mse_loss (soft labels are right here: leave checks() out)"
            )
    if not weighted:
        _check_rare_label(loss, targets)


def _check_rare_label(loss: str, targets: Tensor) -> None:
    positives = targets.float().round().sum().cpu()
    counts = _add_counts(loss, torch.stack([targets.numel() - positives, positives]))
    total, positive_share = float(counts.sum()), float(counts[1] / counts.sum().clamp(min=1))
    is_rare = 0 < min(positive_share, 1 - positive_share) < RARE_SHARE
    if total < MIN_TARGETS or not is_rare or loss in seen().advised:
        return
    seen().advised.add(loss)
    share, kind = (positive_share, "positive") if positive_share < 0.5 else (1 - positive_share, "negative")
    ratio = (1 - positive_share) / positive_share
    warn(
        f"{share:.1%} of {total:.0f} targets are {kind}: the accuracy of a constant answer is {1 - share:.1%}. "
        "Compare by average precision, and choose the threshold on validation data. "
        f"pos_weight={ratio:.3g} moves the threshold too, but the outputs are no probabilities then"
    )


def check_rare_classes(loss: str, labels: Tensor, mask: Tensor | None, classes: int) -> None:
    """Warn of classes that occur far more rarely than others; counted over the batches of a context."""
    if not checking() or classes > MAX_CLASSES:
        return
    counts = _add_counts(loss, _visible(labels, mask).flatten().cpu().bincount(minlength=classes))
    total = int(counts.sum())
    if total < max(MIN_TARGETS, MIN_TARGETS_OF_A_CLASS * classes) or loss in seen().advised:
        return
    # A class that has not occurred may be absent from the data.
    rarest = int(torch.where(counts > 0, counts, total + 1).argmin())
    commonest = int(counts.argmax())
    if counts[commonest] >= RARE_RATIO * counts[rarest]:
        seen().advised.add(loss)
        times = "once" if counts[rarest] == 1 else f"{int(counts[rarest])} times"
        warn(
            f"class {rarest} occurs {times} in {total} targets and class {commonest} {int(counts[commonest])} times: "
            "accuracy hides rare classes. Look at the recall of each class. "
            "class_weights=class_weights(counts) moves the decision, but the outputs are no probabilities then"
        )


def _add_counts(loss: str, counts: Tensor) -> Tensor:
    """Add to what a loss has counted in this context; a different number of classes starts again."""
    earlier = seen().label_counts.get(loss)
    if earlier is not None and earlier.shape == counts.shape:
        counts = counts + earlier
    seen().label_counts[loss] = counts
    return counts


def check_softmax(logits: Tensor, mask: Tensor | None = None) -> None:
    """Report what looks like probabilities where logits belong: on a CPU always, by the first rows."""
    if checking():
        rows = logits.detach().flatten(0, -2) if mask is None else logits.detach()[mask.bool()]
    elif logits.device.type == "cpu":
        rows = first_rows(logits)
    else:
        return
    # Logits are nearly always negative somewhere, so that most calls end here.
    if rows.numel() < MIN_VALUES or float(rows.min()) < 0:
        return
    # The tolerance covers the rounding of a softmax in float16.
    if ((rows.sum(-1) - 1).abs() < 1e-3).all():
        suspect(
            "logits are not negative and sum to 1: was a softmax applied before? "
            "this loss applies its own: pass the logits"
        )


def check_row_sums(targets: Tensor, mask: Tensor | None) -> None:
    """Report rows of soft targets that are no distribution over the classes."""
    if not checking() or not targets.numel():
        return
    sums = targets.sum(-1) if mask is None else targets.sum(-1)[mask.bool()]
    is_off = (sums - 1).abs() > 1e-2
    if is_off.any():
        total = float(sums[first_true(is_off)])
        suspect(
            f"the targets of a row sum to {total:.4g}: for several labels in a row use bce_with_logits_loss; "
            "for probabilities divide by the sum"
        )


def check_regression_targets(targets: Tensor, mask: Tensor | None) -> None:
    """Report what looks like classes where values belong."""
    if not checking():
        return
    targets = _visible(targets, mask)
    if targets.numel() < MIN_VALUES:
        return
    values = targets.unique()
    # All 0 or all 1 may be a constant target. From 0 on without a gap, they look like classes.
    looks_like_classes = 2 <= len(values) <= 20 and torch.equal(values.float(), torch.arange(len(values)).to(values))
    if not looks_like_classes:
        return
    if len(values) == 2:
        suspect("targets are all 0 or 1: for labels use bce_with_logits_loss or cross_entropy_loss")
    else:
        suspect(
            f"targets are the whole numbers 0 to {len(values) - 1}: for classes use cross_entropy_loss, with "
            f"{len(values)} logits for each row (counts and ratings are right here: leave checks() out)"
        )


def check_log_of_zero(probabilities: Tensor, targets: Tensor, limit: float, remedy: str, *, binary: bool) -> None:
    """Report a probability of exactly 0 for what the targets call possible.

    Args:
        probabilities: any shape, some of them 0 or 1.
        targets: the same shape.
        limit: the largest loss.
        remedy: ends the message.
        binary: an element is the probability of one of two classes, so that 1 means 0 for the other.
    """
    is_contradicted = (probabilities == 0) & (targets > 0)
    if binary:
        is_contradicted |= (probabilities == 1) & (targets < 1)
    if is_contradicted.any():
        position = first_true(is_contradicted)
        output = f"{element('probabilities', position)} is {float(probabilities[position]):.0f}"
        target = f"{element('targets', position)} is {float(targets[position]):.4g}"
        suspect(f"{output} and {target}: the loss is cut at {limit:.4g} and {remedy}")


def check_sum(loss: str, reduction: str, size: int) -> None:
    """Report sums over batches of different sizes."""
    if not checking() or reduction != "sum":
        return
    previous_size = seen().sizes.setdefault(loss, size)
    # The gradient of a sum grows with the batch, and with it the step.
    if previous_size != size:
        seen().sizes[loss] = size
        suspect(
            f"{loss} is summed over {size} elements after {previous_size}: "
            'with reduction="sum" a step grows with the batch'
        )


def _visible(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.detach() if mask is None else values.detach()[mask.bool()]
