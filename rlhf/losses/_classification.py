"""Classification losses: one label among two (``[...]`` logits) or among C (``[..., C]`` logits), and on margins."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_probabilities, check_range, check_same_shape, check_tensor
from rlhf.losses._class_targets import check_log_probs
from rlhf.losses._reduction import reducible
from rlhf.losses._suspicions import (
    check_binary,
    check_log_of_zero,
    check_rare_classes,
    check_row_sums,
    check_softmax,
)


def _is_weighted(pos_weight: Any) -> bool:
    # A tensor counts as a weight unread: comparing it would wait for an accelerator.
    return not (isinstance(pos_weight, float | int) and pos_weight == 1)


def _check_bce(arguments: dict[str, Any], mask: Tensor | None) -> None:
    is_weighted = _is_weighted(arguments.get("pos_weight", 1.0))
    check_binary(arguments["logits"], arguments["targets"], mask, loss="bce_with_logits_loss", weighted=is_weighted)


def _check_focal(arguments: dict[str, Any], mask: Tensor | None) -> None:
    check_binary(arguments["logits"], arguments["targets"], mask, loss="focal_loss", weighted=True)


def _check_cross_entropy(arguments: dict[str, Any], mask: Tensor | None) -> None:
    logits, targets = arguments["logits"], arguments["targets"]
    check_softmax(logits, mask)
    if targets.shape == logits.shape:
        check_row_sums(targets, mask)
    elif arguments.get("class_weights") is None:
        check_rare_classes("cross_entropy_loss", targets, mask, logits.size(-1))


def _check_logits(arguments: dict[str, Any], mask: Tensor | None) -> None:
    check_softmax(arguments["logits"], mask)


def _check_nll(arguments: dict[str, Any], mask: Tensor | None) -> None:
    check_log_probs(arguments["log_probs"], mask)


@reducible("logits", "targets", check=_check_bce)
def bce_with_logits_loss(logits: Tensor, targets: Tensor, pos_weight: float | Tensor = 1.0) -> Tensor:
    r"""Binary cross-entropy from logits: for two classes, or for several labels of a row.

    .. math:: -w\,y\log\sigma(z) - (1-y)\log(1-\sigma(z))

    Args:
        logits: any shape, any real number: no sigmoid before.
        targets: same shape, probabilities in [0, 1].
        pos_weight: > 0; weight of the positives, about negatives / positives; broadcasts. It moves the threshold: the
            outputs are probabilities again after its logarithm is subtracted from the logits (docs/imbalance.md).
    Returns:
        Scalar, or the shape of the input for ``"none"``; nats, at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, or targets are not floats in [0, 1].
    Example:
        >>> bce_with_logits_loss(torch.tensor([0.0, 1000.0]), torch.tensor([1.0, 1.0]), reduction="none")
        tensor([0.6931, 0.0000])

    Source: Bernoulli likelihood; as ``torch.nn.functional.binary_cross_entropy_with_logits``.
    """
    check_same_shape(logits=logits, targets=targets)
    check_probabilities("targets", targets)
    # Without a weight torch takes a shorter path, with fewer passes over the logits.
    positive_weights = None
    if _is_weighted(pos_weight):
        positive_weights = torch.as_tensor(pos_weight, dtype=logits.dtype, device=logits.device).detach()
    return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=positive_weights, reduction="none")


@reducible("probabilities", "targets")
def bce_loss(probabilities: Tensor, targets: Tensor) -> Tensor:
    r"""Binary cross-entropy from probabilities; prefer :func:`bce_with_logits_loss`, which cannot overflow.

    .. math:: -y\log p - (1-y)\log(1-p)

    Args:
        probabilities: any shape, in [0, 1]; each logarithm is bounded at -100, so that 0 and 1 stay finite.
        targets: same shape, probabilities in [0, 1].
    Returns:
        Scalar, or the shape of the input for ``"none"``; nats, at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, or values outside [0, 1] (are they logits?).
    Example:
        >>> bce_loss(torch.tensor([0.5]), torch.tensor([1.0]))
        tensor(0.6931)

    Source: Bernoulli likelihood; as ``torch.nn.functional.binary_cross_entropy``.
    """
    check_same_shape(probabilities=probabilities, targets=targets)
    extremes = check_probabilities("probabilities", probabilities, "for logits use bce_with_logits_loss")
    check_probabilities("targets", targets)
    if extremes is not None and (extremes[0] == 0 or extremes[1] == 1):
        remedy = "has no gradient through a sigmoid: pass the logits to bce_with_logits_loss"
        check_log_of_zero(probabilities, targets, 100, remedy, binary=True)
    return F.binary_cross_entropy(probabilities, targets, reduction="none")


@reducible("logits", labels="targets", soft=True, check=_check_cross_entropy)
def cross_entropy_loss(
    logits: Tensor, targets: Tensor, *, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    r"""Cross-entropy from logits, against class indices or soft targets.

    .. math:: -\sum_c w_c\, q_c \log \mathrm{softmax}(z)_c,\; q = (1-\epsilon)\,y + \epsilon/C

    Args:
        logits: [..., C], the classes last: no softmax before.
        targets: [...] integer indices, of which ``ignore_index`` is not scored; or [..., C] probabilities.
        class_weights: [C], the weight of each class; with indices the mean divides by the summed weight of the targets,
            as torch's does.
        label_smoothing: in [0, 1); the share of the target that is spread over all classes.
    Returns:
        Scalar, or [...] for ``"none"``; nats, at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes do not fit, indices outside [0, C), float indices, soft targets outside [0, 1].
    Example:
        >>> cross_entropy_loss(torch.zeros(2, 4), torch.tensor([3, -100]))
        tensor(1.3863)

    Source: multinomial likelihood; smoothing arXiv 1512.00567 §7. As ``torch.nn.functional.cross_entropy``.
    """
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    # Class indices never have the dimension of the classes, so the shape tells soft targets from hard ones.
    has_soft_targets = targets.shape == logits.shape
    if has_soft_targets:
        check_probabilities("targets", targets, "for the logits of a teacher pass targets.softmax(-1)")
    # The logits may have been taken to float32, and torch wants one dtype.
    cast_weights = None if class_weights is None else class_weights.to(logits.dtype)
    # torch wants the classes in dimension 1; as [N, C] they are there without a transposition.
    flat_targets = targets.reshape(-1, logits.size(-1)) if has_soft_targets else targets.reshape(-1)
    losses = F.cross_entropy(
        logits.reshape(-1, logits.size(-1)),
        flat_targets,
        weight=cast_weights,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    # As in torch, the mean divides by the class weights of the targets; a soft target has no class of its own.
    return losses.view(logits.shape[:-1]), None if has_soft_targets or cast_weights is None else cast_weights[targets]


def label_smoothing_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.1, **options: Any) -> Tensor:
    r"""Cross-entropy with label smoothing: a share of each target is spread over all classes.

    .. math:: -(1-\epsilon)\log p_y - \tfrac{\epsilon}{C}\sum_c\log p_c

    Args:
        logits: [..., C], the classes last: no softmax before.
        targets: [...] integer indices or [..., C] probabilities, as in :func:`cross_entropy_loss`.
        smoothing: in [0, 1); 0.1 is usual, and more than 0.2 rarely helps.
        options: the other options of :func:`cross_entropy_loss`.
    Returns:
        Scalar, or [...] for ``"none"``; nats, at least float32; 0 if nothing counts.
    Raises:
        ValueError: as in :func:`cross_entropy_loss`.
    Example:
        >>> label_smoothing_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), smoothing=0.2)
        tensor(0.3269)

    Source: arXiv 1512.00567 §7.
    """
    return cross_entropy_loss(logits, targets, label_smoothing=smoothing, **options)


@reducible("probabilities", "targets")
def categorical_cross_entropy(probabilities: Tensor, targets: Tensor) -> Tensor:
    r"""Cross-entropy from probabilities against one-hot or soft targets; prefer :func:`cross_entropy_loss`.

    .. math:: -\sum_c y_c \log \max(p_c, \mathrm{tiny})

    Args:
        probabilities: [..., C], in [0, 1]; the logarithm is bounded below at that of the dtype's smallest normal.
        targets: [..., C], in [0, 1].
    Returns:
        Scalar, or [...] for ``"none"``; nats, at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, or values outside [0, 1] (are they logits?).
    Example:
        >>> categorical_cross_entropy(torch.tensor([[0.25, 0.75]]), torch.tensor([[0.0, 1.0]]))
        tensor(0.2877)

    Source: multinomial likelihood; Keras' form of it.
    """
    check_same_shape(probabilities=probabilities, targets=targets)
    extremes = check_probabilities("probabilities", probabilities, "for logits use cross_entropy_loss")
    check_probabilities("targets", targets, "pass one-hot rows or probabilities")
    # log 0 would make NaN of a target of 0 times it.
    smallest = torch.finfo(probabilities.dtype).tiny
    if extremes is not None and extremes[0] == 0:
        remedy = "has no gradient there: pass the logits to cross_entropy_loss"
        check_log_of_zero(probabilities, targets, -math.log(smallest), remedy, binary=False)
    return -(targets * probabilities.clamp(min=smallest).log()).sum(-1)


@reducible("log_probs", labels="targets", check=_check_nll)
def nll_loss(
    log_probs: Tensor, targets: Tensor, *, class_weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    r"""Negative log-likelihood from log-probabilities.

    .. math:: -w_y \log p_y

    Args:
        log_probs: [..., C], each <= 0.
        targets: [...] integer indices; ``ignore_index`` is not scored.
        class_weights: [C], the weight of each class, as in :func:`cross_entropy_loss`.
    Returns:
        Scalar, or [...] for ``"none"``; nats, at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes do not fit, indices outside [0, C), or soft targets.
    Example:
        >>> nll_loss(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1]))
        tensor(0.2877)

    Source: as ``torch.nn.functional.nll_loss``, with the classes last.
    """
    # An ignored label is class 0 by now, so the index is valid; its loss is masked.
    losses = -log_probs.gather(-1, targets[..., None]).squeeze(-1)
    if class_weights is None:
        return losses, None
    target_weights = class_weights.to(log_probs.dtype)[targets]
    return losses * target_weights, target_weights


@reducible("logits", "targets", check=_check_focal)
def focal_loss(logits: Tensor, targets: Tensor, alpha: float | None = 0.25, gamma: float = 2.0) -> Tensor:
    r"""Binary cross-entropy with less weight on examples that the model already classifies well.

    .. math:: -\alpha_t (1 - p_t)^\gamma \log p_t,\; p_t = \sigma(z) \text{ for } y=1,\; 1-\sigma(z) \text{ for } y=0

    For rare positives, begin with :func:`bce_with_logits_loss`: its ranking was as good, and its outputs are
    probabilities, unlike those of this loss (measured in docs/imbalance.md).

    Args:
        logits: any shape, any real number: no sigmoid before.
        targets: same shape, probabilities in [0, 1].
        alpha: weight of the positives, in [0, 1]; negatives have 1 - alpha. The default gives a positive a third of the
            weight of a negative, so that fewer positives are found at a threshold of 0.5. None for no weights.
        gamma: >= 0; how fast the loss of easy examples falls; 0 with ``alpha=None`` is :func:`bce_with_logits_loss`.
    Returns:
        Scalar, or the shape of the input for ``"none"``; nats, at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, targets outside [0, 1], or alpha or gamma out of range.
    Example:
        >>> focal_loss(torch.tensor([0.0]), torch.tensor([1.0]))    # 0.25 * 0.5 ** 2 * log 2
        tensor(0.0433)

    Source: arXiv 1708.02002 eq. 5.
    """
    check_same_shape(logits=logits, targets=targets)
    check_probabilities("targets", targets)
    check_range("gamma", gamma, 0.0, math.inf)
    log_prob, log_other = F.logsigmoid(logits), F.logsigmoid(-logits)
    # (1 - p)^gamma as an exponential, which has a gradient at p = 1; a power has none there for gamma < 1.
    positive = log_prob * torch.exp(gamma * log_other)
    negative = log_other * torch.exp(gamma * log_prob)
    # The factor is not detached: as in the paper, the gradient flows through it too.
    # lerp is the paper's case distinction for targets of 0 and 1, and mixes both losses for soft targets.
    if alpha is None:
        return -torch.lerp(negative, positive, targets)
    # 0.25 gives rare positives the smaller weight: at gamma 2 easy negatives have lost most of theirs already.
    check_range("alpha", alpha, 0.0, math.nextafter(1.0, 2.0))
    return torch.lerp((alpha - 1) * negative, -alpha * positive, targets)


@reducible("logits", labels="targets", check=_check_logits)
def multiclass_focal_loss(
    logits: Tensor, targets: Tensor, gamma: float = 2.0, *, class_weights: Tensor | None = None
) -> Tensor:
    r"""Cross-entropy over C classes with less weight on examples that the model already classifies well.

    .. math:: -w_y (1 - p_y)^\gamma \log p_y

    Args:
        logits: [..., C], the classes last: no softmax before.
        targets: [...] integer indices; ``ignore_index`` is not scored.
        gamma: >= 0; 0 is :func:`cross_entropy_loss`.
        class_weights: [C], the alpha of each class. The mean divides by the number of scored elements, as in the
            paper's form (cross-entropy divides by the summed weights).
    Returns:
        Scalar, or [...] for ``"none"``; nats, at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes do not fit, indices outside [0, C), soft targets, or ``gamma < 0``.
    Example:
        >>> multiclass_focal_loss(torch.zeros(1, 2), torch.tensor([0]))    # 0.5 ** 2 * log 2
        tensor(0.1733)

    Source: arXiv 1708.02002 eq. 4, over a softmax.
    """
    check_range("gamma", gamma, 0.0, math.inf)
    log_probs = logits.log_softmax(-1)
    target_logp = log_probs.gather(-1, targets[..., None]).squeeze(-1)
    # log(1 - p_y) from the other classes: exact, and differentiable, where p_y rounds to 1.
    other_logp = log_probs.scatter(-1, targets[..., None], -math.inf).logsumexp(-1)
    # At gamma 0 the product would be 0 * -inf, a NaN, where all other classes have probability 0.
    losses = -target_logp * torch.exp(gamma * other_logp) if gamma else -target_logp
    return losses if class_weights is None else losses * class_weights.to(logits.dtype)[targets]


@reducible("scores", "targets")
def hinge_loss(scores: Tensor, targets: Tensor, *, squared: bool = False) -> Tensor:
    r"""Margin loss of linear classifiers: examples on the right side by 1 or more have no gradient.

    .. math:: \max(0, 1 - y s)

    Args:
        scores: any shape, any real number.
        targets: same shape, -1 or +1 (not 0 and 1).
        squared: square each loss, which makes it smooth.
    Returns:
        Scalar, or the shape of the input for ``"none"``; at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, or a target is neither -1 nor +1.
    Example:
        >>> hinge_loss(torch.tensor([0.5, -2.0]), torch.tensor([1.0, -1.0]), reduction="none")
        tensor([0.5000, 0.0000])

    Source: Cortes and Vapnik 1995. For preference pairs: ``PREFERENCE_LOSSES["hinge"]``.
    """
    losses = F.relu(1 - _margin(scores, targets))
    return losses**2 if squared else losses


@reducible("scores", "targets")
def modified_huber_loss(scores: Tensor, targets: Tensor) -> Tensor:
    r"""Squared hinge that is linear for large errors; its scores map to probabilities.

    .. math:: \max(0, 1 - ys)^2 \text{ if } ys \ge -1, \text{ else } -4ys

    Args:
        scores: any shape, any real number.
        targets: same shape, -1 or +1 (not 0 and 1).
    Returns:
        Scalar, or the shape of the input for ``"none"``; at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, or a target is neither -1 nor +1.
    Example:
        >>> modified_huber_loss(torch.tensor([0.5, -3.0]), torch.tensor([1.0, 1.0]), reduction="none")
        tensor([ 0.2500, 12.0000])

    Source: Zhang 2004; as in ``sklearn.linear_model.SGDClassifier``.
    """
    margin = _margin(scores, targets)
    # At a margin of -1 both pieces have the value 4 and the slope -4, so the gradient is continuous.
    return torch.where(margin >= -1, F.relu(1 - margin) ** 2, -4 * margin)


@reducible("logits", labels="targets", check=_check_logits)
def poly1_loss(logits: Tensor, targets: Tensor, epsilon: float = 1.0) -> Tensor:
    r"""PolyLoss: cross-entropy plus ``epsilon`` times the probability of a wrong class.

    .. math:: -\log p_y + \epsilon (1 - p_y)

    Args:
        logits: [..., C], the classes last: no softmax before.
        targets: [...] integer indices; ``ignore_index`` is not scored.
        epsilon: >= -1; 0 is :func:`cross_entropy_loss`.
    Returns:
        Scalar, or [...] for ``"none"``; nats, at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes do not fit, indices outside [0, C), soft targets, or ``epsilon < -1``.
    Example:
        >>> poly1_loss(torch.zeros(1, 2), torch.tensor([0]))
        tensor(1.1931)

    Source: arXiv 2204.12511.
    """
    # Below -1 the slope at p = 1 changes its sign, and certain predictions would be pushed away.
    check_range("epsilon", epsilon, -1.0, math.inf)
    target_logp = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    # expm1(logp) is p - 1 with all digits where p is near 1.
    return -target_logp - epsilon * target_logp.expm1()


def class_weights(counts: Tensor, scheme: str = "balanced", *, beta: float = 0.999) -> Tensor:
    r"""Weights of classes from their counts, for the argument ``class_weights`` of the losses.

    ``"inverse"``: 1 / n_c · ``"balanced"``: N / (C n_c), scikit-learn's · ``"effective"``: (1 - beta) / (1 - beta^n_c)
    scaled to sum to C.

    Args:
        counts: [C], how often each class occurs, > 0.
        scheme: ``"inverse"``, ``"balanced"`` or ``"effective"``, as above.
        beta: in [0, 1), of the effective number.
    Returns:
        [C] float32 (float64 for float64 counts).
    Raises:
        ValueError: an unknown scheme, or a class that never occurs.
    Example:
        >>> class_weights(torch.tensor([90, 10]))
        tensor([0.5556, 5.0000])

    Source: King and Zeng 2001; effective number arXiv 1901.05555.
    """
    check_tensor("counts", counts)
    counts = counts if counts.dtype == torch.float64 else counts.float()
    is_empty = counts <= 0
    # The weight of a class that never occurs would be infinite.
    if is_empty.any():
        first_empty = int(is_empty.nonzero()[0])
        raise ValueError(
            f"counts[{first_empty}] is 0: leave the class out, or give it a weight by hand "
            "(counts are how often each class occurs: for labels pass labels.bincount())"
        )
    match scheme:
        case "inverse":
            return 1 / counts
        case "balanced":
            return counts.sum() / (len(counts) * counts)
        case "effective":
            check_range("beta", beta, 0.0, 1.0)
            if not beta:  # each class counts once, however large
                return torch.ones_like(counts)
            # (1 - beta) / (1 - beta^n); expm1 keeps the digits of beta near 1.
            weights = (1 - beta) / -torch.expm1(counts * math.log(beta))
            # A mean weight of 1 keeps the size of the loss, and so the learning rate, as it was.
            return weights * len(counts) / weights.sum()
    raise ValueError(f'scheme must be "inverse", "balanced" or "effective", got {scheme!r}')


def _margin(scores: Tensor, targets: Tensor) -> Tensor:
    check_same_shape(scores=scores, targets=targets)
    is_masked = (targets == 0) & (scores == 0)  # by a mask
    # Reading targets is free on the CPU and waits on an accelerator.
    if targets.device.type == "cpu" and not (is_masked | (targets.abs() == 1)).all():
        raise ValueError("targets must be -1 or +1: for labels of 0 and 1 pass 2 * targets - 1")
    return scores * targets
