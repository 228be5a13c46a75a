"""Losses on embeddings: contrastive and triplet losses."""

import math
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape, check_tensor
from rlhf.losses._reduction import Reduction, reduce, reducible, upcast

Distance = Literal["euclidean", "squared", "cosine"]


def info_nce_loss(
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    *,
    symmetric: bool = True,
    normalize: bool = True,
    gather: bool = False,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""InfoNCE: classifies the own key of each query among all keys (CLIP's loss when symmetric).

    .. math:: -\log\frac{e^{q_i \cdot k_i/\tau}}{\sum_j e^{q_i \cdot k_j/\tau} + \sum_m e^{q_i \cdot n_m/\tau}}

    Args:
        queries: [N, D]; carries the gradient.
        keys: [N, D]; row i belongs to query i.
        negatives: [M, D], further keys that belong to no query (not used in the direction from keys to queries).
        temperature: > 0, tau; a tensor may be learned (CLIP learns ``log_scale`` and passes ``(-log_scale).exp()``).
        symmetric: average with the loss from keys to queries; False for one side.
        normalize: scale embeddings to length 1 first.
        gather: under ``torch.distributed``, take the keys (and queries) of all ranks as candidates, with gradient. The
            loss is that of this rank's rows: averaging gradients over ranks gives that of the whole batch.
        reduction: ``"mean"`` over the elements that count, ``"sum"`` or ``"none"``.
        weight: [N], >= 0.
        mask: [N] bool, True counts. A masked pair is not a candidate either.
    Returns:
        Scalar, or [N] for ``"none"``; nats, at least float32; log N for N equal pairs; 0 if nothing counts.
    Raises:
        ValueError: shapes do not fit, or ``temperature <= 0`` (for a number).
    Example:
        >>> info_nce_loss(torch.ones(4, 2), torch.ones(4, 2))
        tensor(1.3863)

    Source: arXiv 1807.03748 eq. 4; symmetric form CLIP, arXiv 2103.00020 figure 3.
    """
    _check_embeddings(queries=queries, keys=keys)
    check_same_shape(queries=queries, keys=keys)
    # A learned temperature is not read: that would wait for an accelerator at each step.
    if not isinstance(temperature, Tensor):
        check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    visible = None if mask is None else mask.bool()
    check_same_shape(queries=queries[:, 0], mask=visible, weight=weight)
    queries = _prepared(queries, visible, normalize)
    keys = _prepared(keys, visible, normalize)
    # Candidates are the rows of this process, or of all processes one after another.
    all_queries, all_keys, candidates, first_row = queries, keys, visible, 0
    if gather and dist.is_available() and dist.is_initialized():
        all_queries, all_keys = torch.cat(_all_gather(queries)), torch.cat(_all_gather(keys))
        candidates = None if visible is None else torch.cat(_all_gather(visible.float())).bool()
        # all_gather wants the same number of rows on each rank, so the rows of this one start here.
        first_row = dist.get_rank() * len(queries)
    partner = torch.arange(len(queries), device=queries.device) + first_row
    allowed = None
    if candidates is not None:
        # A masked row is compared with itself alone, so that its softmax is not empty; its loss is dropped below.
        is_partner = torch.arange(len(candidates), device=partner.device)[None] == partner[:, None]
        allowed = candidates[None] | is_partner

    def one_side(rows: Tensor, columns: Tensor, further: Tensor | None) -> Tensor:
        """The cross-entropy of finding each row's partner among the columns and further candidates, [N]."""
        # Dividing [N, D] rows is cheaper than dividing [N, N] logits.
        logits = (rows / temperature) @ columns.T
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        if further is not None:
            logits = torch.cat([logits, rows @ further.T / temperature], 1)
        return F.cross_entropy(logits, partner, reduction="none")

    if negatives is not None:
        _check_embeddings(negatives=negatives)
        negatives = _prepared(negatives, None, normalize)
    query_losses = one_side(queries, all_keys, negatives)
    if symmetric:
        query_losses = (query_losses + one_side(keys, all_queries, None)) / 2
    return reduce(query_losses, reduction, weight, visible)


def supervised_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float = 0.07,
    *,
    normalize: bool = True,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""SupCon: contrastive loss with labels; all other examples of a class are positives.

    .. math:: -\frac{1}{|P_i|}\sum_{p\in P_i}\log\frac{e^{z_i\cdot z_p/\tau}}{\sum_{a\ne i}e^{z_i\cdot z_a/\tau}}

    Args:
        embeddings: [N, D]; carries the gradient.
        labels: [N] integers, the class of each example.
        temperature: > 0, tau.
        normalize: scale embeddings to length 1 first.
        reduction: ``"mean"`` over the elements that count, ``"sum"`` or ``"none"``.
        weight: [N], >= 0.
        mask: [N] bool, True counts. An example without another of its class does not count.
    Returns:
        Scalar, or [N] for ``"none"``; nats, at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes do not fit, or ``temperature <= 0``.
    Example:
        >>> supervised_contrastive_loss(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]))    # log 3
        tensor(1.0986)

    Source: arXiv 2004.11362 eq. 2 (L_out).
    """
    _check_embeddings(embeddings=embeddings)
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    visible = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    check_same_shape(embeddings=embeddings[:, 0], labels=labels, mask=visible, weight=weight)
    prepared = _prepared(embeddings, visible, normalize)
    is_self = torch.eye(len(prepared), dtype=torch.bool, device=prepared.device)
    # The similarity of an example with itself is the largest there is, and would dominate every softmax.
    is_other = visible[None] & ~is_self
    is_positive = is_other & (labels[:, None] == labels[None])
    # Not -inf: a row without others would have an empty softmax, and its gradient would be NaN.
    smallest = -torch.finfo(prepared.dtype).max
    logits = (prepared @ prepared.T / temperature).masked_fill(~is_other, smallest)
    num_positives = is_positive.sum(1)
    log_probs = torch.where(is_positive, logits.log_softmax(1), 0.0)
    # The mean over positives is outside of the logarithm: L_out, which the paper finds better than L_in.
    anchor_losses = -log_probs.sum(1) / num_positives.clamp(min=1)
    return reduce(anchor_losses, reduction, weight, visible & (num_positives > 0))


def triplet_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    margin: float = 1.0,
    *,
    distance: Distance = "euclidean",
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Triplet loss: an anchor should be nearer to its positive than to its negative, by a margin.

    .. math:: \max(0, d(a, p) - d(a, n) + m)

    Args:
        anchors: [..., D]; carries the gradient.
        positives: [..., D], what should be near.
        negatives: [..., D], what should be far.
        margin: >= 0, in units of the distance.
        distance: ``"euclidean"``, ``"squared"`` (its square) or ``"cosine"`` (1 - cosine, in [0, 2]).
        reduction: ``"mean"`` over the elements that count, ``"sum"`` or ``"none"``.
        weight: [...], >= 0.
        mask: [...] bool, True counts.
    Returns:
        Scalar, or [...] for ``"none"``; at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, ``margin < 0``, or an unknown distance.
    Example:
        >>> triplet_loss(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]))    # 5 - 2 + 1
        tensor(4.)

    Source: arXiv 1503.03832 eq. 3 (squared).
    """
    check_range("margin", margin, 0.0, math.inf)
    check_same_shape(anchors=anchors, positives=positives, negatives=negatives)
    anchors = _prepared(anchors, mask, normalize=False)
    to_positive = _distance(anchors, _prepared(positives, mask, normalize=False), distance)
    to_negative = _distance(anchors, _prepared(negatives, mask, normalize=False), distance)
    return reduce(F.relu(to_positive - to_negative + margin), reduction, weight, mask)


def batch_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float = 1.0,
    *,
    mining: Literal["all", "hard", "semi-hard"] = "semi-hard",
    distance: Distance = "euclidean",
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    r"""Triplet loss over all triplets of a batch, or over the hardest.

    Args:
        embeddings: [N, D]; carries the gradient.
        labels: [N] integers, the class of each example.
        margin: >= 0, in units of the distance.
        mining: ``"all"`` valid triplets · ``"hard"``: for each anchor its farthest positive and nearest negative ·
            ``"semi-hard"``: for each anchor and positive the nearest negative that is farther than the positive, or the
            farthest negative if there is none.
        distance: as in :func:`triplet_loss`.
        reduction: ``"mean"`` (over the triplets found) or ``"sum"``.
    Returns:
        Scalar, at least float32; 0, differentiable, if the batch holds no triplet.
    Raises:
        ValueError: shapes do not fit, an unknown mining or distance.
    Example:
        >>> x = torch.tensor([[0.0], [1.0], [1.5]])
        >>> batch_triplet_loss(x, torch.tensor([0, 0, 1]), mining="hard")    # (1 - 1.5 + 1 + 1 - 0.5 + 1) / 2
        tensor(1.)

    Source: hard: arXiv 1703.07737; semi-hard: arXiv 1503.03832 §3.2.
    """
    _check_embeddings(embeddings=embeddings)
    check_range("margin", margin, 0.0, math.inf)
    embeddings = upcast(embeddings)
    # [N, N], and mining compares [N, N, N] below: meant for batches of hundreds.
    distances = _distance(embeddings[:, None], embeddings[None], distance)
    same_class = labels[:, None] == labels[None]
    is_self = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    is_positive = same_class & ~is_self
    if mining == "hard":
        farthest_positive = distances.masked_fill(~is_positive, -math.inf).amax(1)
        nearest_negative = distances.masked_fill(same_class, math.inf).amin(1)
        has_triplet = is_positive.any(1) & ~same_class.all(1)
        # Without a triplet both are infinite, and their difference would be NaN.
        gaps = torch.where(has_triplet, farthest_positive, 0.0) - torch.where(has_triplet, nearest_negative, 0.0)
        return reduce(F.relu(gaps + margin), reduction, mask=has_triplet)
    # [anchor, positive, negative]
    to_positive, to_negative = distances[:, :, None], distances[:, None, :]
    is_triplet = is_positive[:, :, None] & ~same_class[:, None, :]
    if mining == "all":
        return reduce(F.relu(to_positive - to_negative + margin), reduction, mask=is_triplet)
    if mining != "semi-hard":
        raise ValueError(f'mining must be "all", "hard" or "semi-hard", got {mining!r}')
    is_beyond = is_triplet & (to_negative > to_positive)
    nearest_beyond = to_negative.masked_fill(~is_beyond, math.inf).amin(2)
    farthest_negative = to_negative.masked_fill(~is_triplet, -math.inf).amax(2)
    # The fallback keeps every anchor and positive in the mean, as TensorFlow's semi-hard loss does.
    mined_negative = torch.where(is_beyond.any(2), nearest_beyond, farthest_negative)
    has_triplet = is_triplet.any(2)
    gaps = torch.where(has_triplet, distances - torch.where(has_triplet, mined_negative, 0.0), 0.0)
    return reduce(F.relu(gaps + margin), reduction, mask=has_triplet)


def siglip_loss(
    queries: Tensor,
    keys: Tensor,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    *,
    normalize: bool = True,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""SigLIP: a binary classification of every pair, without a softmax over the batch.

    .. math:: \sum_j -\log\sigma(z_{ij}(s\,q_i\cdot k_j + b)),\; z_{ii} = 1,\; z_{ij} = -1

    Args:
        queries: [N, D]; carries the gradient.
        keys: [N, D]; row i belongs to query i.
        scale: s, a number or a learned tensor; the paper starts at 10.
        bias: b, a number or a learned tensor; the paper starts at -10.
        normalize: scale embeddings to length 1 first.
        reduction: ``"mean"`` over the elements that count, ``"sum"`` or ``"none"``.
        weight: [N], >= 0.
        mask: [N] bool, True counts. A masked pair is not a candidate either.
    Returns:
        Scalar, or [N] for ``"none"``; nats, at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes do not fit.
    Example:
        >>> siglip_loss(torch.zeros(2, 3), torch.zeros(2, 3), bias=0.0)    # 2 log 2
        tensor(1.3863)

    Source: arXiv 2303.15343 §3.2.
    """
    _check_embeddings(queries=queries, keys=keys)
    check_same_shape(queries=queries, keys=keys)
    visible = torch.ones_like(queries[:, 0], dtype=torch.bool) if mask is None else mask.bool()
    queries = _prepared(queries, visible, normalize)
    keys = _prepared(keys, visible, normalize)
    # +1 on the diagonal, where a query meets its own key, -1 elsewhere.
    pair_signs = 2 * torch.eye(len(queries), dtype=queries.dtype, device=queries.device) - 1
    losses = -F.logsigmoid(pair_signs * (queries @ keys.T * scale + bias))
    # Summed over keys: the paper divides by the number of queries alone.
    # Only N of the N^2 pairs match, hence a bias that starts at -10.
    by_query = torch.where(visible[None], losses, 0.0).sum(1)
    return reduce(by_query, reduction, weight, None if mask is None else visible)


@reducible("first", "second")
def cosine_embedding_loss(first: Tensor, second: Tensor, targets: Tensor, margin: float = 0.0) -> Tensor:
    r"""Cosine of pairs: 1 for matches, and at most ``margin`` for others.

    .. math:: 1 - \cos(a, b) \text{ if } y = 1, \text{ else } \max(0, \cos(a, b) - m)

    Args:
        first: [..., D]; carries the gradient.
        second: [..., D]; carries the gradient.
        targets: [...], +1 for a match, -1 for none.
        margin: m, in [-1, 1].
    Returns:
        Scalar, or [...] for ``"none"``; at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes do not fit, or a margin out of range.
    Example:
        >>> cosine_embedding_loss(torch.eye(2), torch.eye(2), torch.tensor([1, -1]), reduction="none")
        tensor([0., 1.])

    Source: as ``torch.nn.functional.cosine_embedding_loss``.
    """
    check_range("margin", margin, -1.0, math.nextafter(1.0, 2.0))
    check_same_shape(first=first, second=second)
    check_same_shape(targets=targets, first=first[..., 0])
    width = first.size(-1)
    # torch takes [N, D] alone.
    losses = F.cosine_embedding_loss(
        first.reshape(-1, width), second.reshape(-1, width), targets.reshape(-1), margin, reduction="none"
    )
    return losses.view(targets.shape)


def _check_embeddings(**named: Tensor) -> None:
    for name, value in named.items():
        check_tensor(name, value)
        if value.dim() != 2 or not value.is_floating_point():
            raise ValueError(f"{name} must be floating point [N, D], got {value.dtype} {tuple(value.shape)}")


def _prepared(embeddings: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
    """In at least float32, 0 where the mask is False, and of length 1 where that is wanted."""
    embeddings = upcast(embeddings)
    if mask is not None:
        embeddings = torch.where(mask.bool()[..., None], embeddings, 0.0)
    # A row of zeros, such as a hidden one, stays zero: torch divides by at least 1e-12.
    return F.normalize(embeddings, dim=-1) if normalize else embeddings


def _distance(first: Tensor, second: Tensor, kind: Distance) -> Tensor:
    if kind == "cosine":
        return 1 - F.cosine_similarity(first, second, dim=-1)
    # From differences: |a|^2 + |b|^2 - 2ab would cancel for points that are near.
    squared = ((first - second) ** 2).sum(-1)
    if kind == "squared":
        return squared
    if kind != "euclidean":
        raise ValueError(f'distance must be "euclidean", "squared" or "cosine", got {kind!r}')
    # The root has no slope at 0; there the gradient is taken as 0.
    is_apart = squared > 0
    return torch.where(is_apart, torch.where(is_apart, squared, 1.0).sqrt(), 0.0)


def _all_gather(rows: Tensor) -> list[Tensor]:
    # Unlike torch.distributed.all_gather, this one passes gradients back.
    from torch.distributed.nn.functional import all_gather

    return list(all_gather(rows))
