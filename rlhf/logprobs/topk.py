r"""A teacher of whom a part is kept, and a student's divergence from it: in chunks, never ``[tokens, vocab]``.

The student's side is LOCAL (see :mod:`rlhf.logprobs.score`): the gradient is taken while a chunk's logits live, so it
costs 3 products of the head, 2 where the head is frozen, 1 without a gradient; the teacher's costs none. With q the
student's probabilities, :math:`g_j` the slopes of the divergence in :math:`\log q_j` of the kept tokens, :math:`g_r` in
:math:`\log q_{rest}` and :math:`G` the sum of them all,

.. math:: \frac{\partial D}{\partial z_v} = [v \in K]\, g_v + [v \notin K]\, \frac{q_v}{q_{rest}} g_r - q_v G

so automatic differentiation sees k + 1 numbers a token, and the vocabulary is passed over twice.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rlhf.logprobs.bridge import own_logits, without_adapter
from rlhf.logprobs.chunks import Step, Walk, learning, plan, sum_over_chunks
from rlhf.logprobs.head import Head, backbone_of, read_head, verified_settings
from rlhf.logprobs.targets import Targets
from rlhf.losses import top_k_jsd
from rlhf.losses._top_k import between, outcomes

Estimate = Literal["tail", "truncate"]


class TopK(NamedTuple):
    """What is kept of a teacher's predictions, one row for each scored token.

    Args:
        ids: int64 [N, k], its likeliest tokens, the likeliest first.
        logps: [N, k], their log-probs over the whole vocabulary, nats.
        rest: [N], log of the mass of all other tokens; without meaning at k = V.
    """

    ids: Tensor
    logps: Tensor
    rest: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TopK":
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def rows(self, chunk: slice) -> "TopK":
        return self._each(lambda x: x[chunk])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TopK":
        return TopK(change(self.ids), change(self.logps), change(self.rest))


class TopKScores(NamedTuple):
    """``loss`` is a scalar sum and carries the gradient; ``divergence`` and ``logps`` are [N], nats, without one.

    ``logps`` are those of the targets at temperature 1, whatever the divergence's.
    """

    loss: Tensor
    divergence: Tensor
    logps: Tensor


class _Terms(NamedTuple):
    """What is added up for each token."""

    estimate: Estimate
    beta: float
    soft: float
    hard: float


@torch.compiler.disable
def top_k_divergence(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    teacher: TopK,
    *,
    estimate: Estimate = "tail",
    beta: float = 0.0,
    soft: float = 1.0,
    hard: float = 0.0,
    chunk_size: int | None = None,
) -> TopKScores:
    r"""The student's divergence from what was kept of a teacher, mixed with the hard labels' loss in the same pass.

    .. math:: L = \sum_t \left[ s\, D(p_t, q_t) - h \log q_t(y_t) \right]

    Args:
        hidden: [..., H], the student's last hidden states; flattened, ``targets.source`` indexes its rows.
        head: the student's; its temperature is that of the divergence and must be the one that ``teacher`` was kept
            at. The hard labels are scored at temperature 1.
        teacher: of the same N tokens, in the order of ``targets``.
        estimate: ``"tail"`` over k + 1 outcomes, the last of them "any other token"; ``"truncate"`` over the k,
            renormalised on both sides.
        beta: 0 is the forward KL(p, q), 1 the reverse KL(q, p), between them the generalised JSD.
        soft, hard: weights s and h. Against the fall of gradients with the temperature, s takes a factor T².
        chunk_size: rows of logits at a time, as in :func:`rlhf.logprobs.score`.
    Returns:
        The sum with its gradient, the divergence before its weight, and the log-probs of the targets.
    Raises:
        ValueError: sizes do not fit, an id lies outside the student's vocabulary (checked on CPU), or beta outside
            [0, 1].

    Source: arXiv 2503.16870 for the sparse estimates; the gradient above is our own.
    """
    terms = _Terms(estimate, beta, soft, hard)
    if hidden.size(-1) != head.weight.size(1):
        raise ValueError(f"hidden states have size {hidden.size(-1)}, the head {head.weight.size(1)}")
    _check(targets, teacher, terms, head.weight.size(0))
    rows = hidden.reshape(-1, hidden.size(-1)).index_select(0, targets.source)
    size = _size(rows, head, chunk_size)
    step = _step(targets.token, teacher, terms, head.temperature)
    with torch.autocast(rows.device.type, enabled=False):
        (divergence, logps), loss = sum_over_chunks(rows, head, size, step, learning(rows, head)[0])
    return TopKScores(loss, divergence, logps)


def model_top_k_divergence(
    model: nn.Module,
    targets: Targets,
    teacher: TopK,
    *,
    temperature: float = 1.0,
    estimate: Estimate = "tail",
    beta: float = 0.0,
    soft: float = 1.0,
    hard: float = 0.0,
    **inputs: Any,
) -> TopKScores:
    """:func:`top_k_divergence` of a causal LM or PEFT around one, whatever its head.

    ``inputs`` are what its forward takes. Inside DDP, FSDP or ZeRO, call this from the wrapped module's forward.
    """
    model = without_adapter(model)
    terms = _Terms(estimate, beta, soft, hard)
    settings = verified_settings(model)
    if settings is not None:
        hidden = backbone_of(model)(**inputs, use_cache=False)[0]
        return top_k_divergence(hidden, read_head(model, settings, temperature), targets, teacher, **terms._asdict())
    logits, row = own_logits(model, targets, temperature, inputs)
    _check(targets, teacher, terms, logits.size(1))
    z = logits[row]
    kept = (teacher.logps.to(z.dtype), teacher.ids, beta, 1.0, teacher.rest.to(z.dtype))
    divergence = top_k_jsd(z, *kept, tail=estimate == "tail", reduction="none")
    logps = (z * temperature).log_softmax(-1).gather(1, targets.token[:, None]).squeeze(1)
    return TopKScores((soft * divergence - hard * logps).sum(), divergence.detach(), logps.detach())


def _check(targets: Targets, teacher: TopK, terms: _Terms, vocabulary: int) -> None:
    if not 0 <= terms.beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {terms.beta}")
    if terms.estimate not in ("tail", "truncate"):
        raise ValueError(f'estimate must be "tail" or "truncate", got {terms.estimate!r}')
    ids = teacher.ids
    if len(ids) != len(targets) or not ids.size(1):
        seen = tuple(ids.shape)
        raise ValueError(f"{len(targets)} tokens are scored, but the teacher's ids are {seen}: expected a row for each")
    if ids.device.type == "cpu" and len(ids):
        for what, found in (("teacher id", ids), ("target token", targets.token)):
            low, high = int(found.min()), int(found.max())
            if low < 0 or high >= vocabulary:
                wrong = low if low < 0 else high
                raise ValueError(f"{what} {wrong} is outside the student's vocabulary [0, {vocabulary})")


def _size(rows: Tensor, head: Head, chunk_size: int | None) -> int:
    vocabulary = head.weight.size(0)
    return plan(len(rows), vocabulary, rows.device, learns=False, head_learns=False, chunk_size=chunk_size).chunk_size


def _step(token: Tensor, teacher: TopK, terms: _Terms, temperature: float) -> Step:
    def step(chunk: slice, dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        divergence, logps, dz = _chunk(dense, token[chunk], teacher.rows(chunk), terms, temperature)
        return torch.stack([divergence, logps]), (terms.soft * divergence - terms.hard * logps).sum(), dz

    return step


def _chunk(
    dense: Tensor, token: Tensor, teacher: TopK, terms: _Terms, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Divergence [c], log-probs of the targets [c], and the gradient with respect to ``logits / temperature``.

    ``dense`` are the student's log-probs [c, V]; the gradient is written over them.
    """
    y = token[:, None]
    hot = dense if temperature == 1 else (dense * temperature).log_softmax(1)  # the hard labels' distribution
    logps = hot.gather(1, y).squeeze(1)
    ids = teacher.ids
    own = dense.gather(1, ids)
    q = torch.exp(dense, out=dense)
    rest = None
    if terms.estimate == "tail" and ids.size(1) < q.size(1):
        rest = q.scatter_(1, ids, 0.0).sum(1)  # of the others alone: 1 minus the kept would be rounding
        rest = rest.clamp_(min=torch.finfo(q.dtype).tiny)
    value, slopes, slope_rest = _slopes(own, rest, teacher, terms, q.size(1))
    total = slopes.sum(1) if slope_rest is None else slopes.sum(1) + slope_rest
    if terms.estimate == "truncate":
        total = torch.zeros_like(total)  # which it is: renormalised probabilities do not see a common factor
    hard = terms.hard if temperature == 1 else 0.0
    common = hard - total  # q_v times this is in the gradient of every token
    if rest is not None and slope_rest is not None:
        dz = q.mul_((slope_rest / rest + common)[:, None]).scatter_(1, ids, slopes + own.exp() * common[:, None])
    else:
        dz = q.mul_(common[:, None]).scatter_add_(1, ids, slopes)
    if temperature != 1 and terms.hard:
        dz.add_(hot.exp_(), alpha=terms.hard * temperature)
    if terms.hard:
        dz.scatter_add_(1, y, dz.new_full((1, 1), -terms.hard * temperature).expand_as(y))
    return value, logps, dz


def _slopes(
    own: Tensor, rest: Tensor | None, teacher: TopK, terms: _Terms, vocabulary: int
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Divergence [c]; ``soft`` times its slopes in the log-probs of the ids [c, n] and in that of the rest [c]."""
    p, p_rest = teacher.logps.to(own.dtype), teacher.rest.to(own.dtype)
    with torch.enable_grad():
        own = own.detach().requires_grad_()
        log_rest = None if rest is None else rest.log().requires_grad_()
        q_rest = p_rest if log_rest is None else log_rest  # without a tail it is not looked at
        pair = outcomes(own, q_rest, p, p_rest, vocabulary, terms.estimate == "tail")
        value = between(*pair, terms.beta)
        leaves = [own] if log_rest is None else [own, log_rest]
        slopes = torch.autograd.grad(terms.soft * value.sum(), leaves)
    return value.detach(), slopes[0], slopes[1] if log_rest is not None else None


def top_k(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    k: int,
    *,
    chunk_size: int | None = None,
) -> TopK:
    """What is to be kept of a teacher: its ``k`` likeliest tokens at each target, and the mass of the others.

    Args:
        hidden, head, targets, chunk_size: the teacher's, as in :func:`rlhf.logprobs.score`; one product, no gradient.
            The head's temperature divides its logits.
        k: in [1, V].
    Raises:
        ValueError: k outside its range.
    """
    _check_k(k, head.weight.size(0))
    rows = hidden.detach().reshape(-1, hidden.size(-1)).index_select(0, targets.source)
    parts = []
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        walk = Walk(rows, head, _size(rows, head, chunk_size))
        for chunk in walk.chunks():
            parts.append(_keep(walk.log_probs(chunk)[0], k))
    ids, logps, rest = zip(*parts, strict=True)
    return TopK(torch.cat(ids), torch.cat(logps), torch.cat(rest))


def model_top_k(
    model: nn.Module,
    targets: Targets,
    k: int,
    *,
    temperature: float = 1.0,
    **inputs: Any,
) -> TopK:
    """:func:`top_k` of a causal LM, whatever its head; ``inputs`` are what its forward takes."""
    model = without_adapter(model)
    settings = verified_settings(model)
    with torch.no_grad():
        if settings is not None:
            hidden = backbone_of(model)(**inputs, use_cache=False)[0]
            return top_k(hidden, read_head(model, settings, temperature), targets, k)
        logits, row = own_logits(model, targets, temperature, inputs)
        _check_k(k, logits.size(1))
        return _keep(logits.log_softmax(-1)[row], k)


def _check_k(k: int, vocabulary: int) -> None:
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be in [1, {vocabulary}], the teacher's vocabulary; got {k}")


def _keep(dense: Tensor, k: int) -> TopK:
    """Of log-probs [c, V], which are written over."""
    logps, ids = dense.topk(k, dim=1)
    p = dense.exp_()
    rest = p.scatter_(1, ids, 0.0).sum(1).clamp_(min=torch.finfo(p.dtype).tiny)
    return TopK(ids, logps, rest.log())
