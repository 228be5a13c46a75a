r"""Divergences from a teacher of whom only a part was kept: its k likeliest tokens, or tokens that it sampled.

With :math:`K` the kept tokens, :math:`p_{rest} = 1 - \sum_{v\in K} p_v` and :math:`q_{rest}` likewise, there are three
estimates of a divergence between teacher p and student q: over the k + 1 outcomes "each of K" and "any other" (the
tail), over K alone with both sides renormalised (truncated), and from samples of p. `docs/teacher-cache.md` has their
bias, their variance and a measured table.
"""

import math

import torch
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape
from rlhf.losses._divergences import _kl, _scaled
from rlhf.losses._reduction import reducible

_top_k = reducible("student_logits", "teacher_top_logps", "teacher_rest")


def outcomes(
    q: Tensor, q_rest: Tensor, p: Tensor, p_rest: Tensor, vocabulary: int, tail: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probs ``(q, p)`` [..., k + 1] of the kept tokens and of all others; [..., k] renormalised without the tail.

    Args:
        q, p: [..., k], log-probs of the kept tokens. q_rest, p_rest: [...], log of the mass of all others.
        vocabulary: V; at k = V there are no others.
    """
    if not tail:
        return q.log_softmax(-1), p.log_softmax(-1)
    if q.size(-1) == vocabulary:
        return q, p
    least = math.log(torch.finfo(p.dtype).tiny)  # a rest of nothing: log 0 would make NaN of 0 * log 0
    return torch.cat([q, q_rest[..., None]], -1), torch.cat([p, p_rest.clamp(min=least)[..., None]], -1)


def between(q: Tensor, p: Tensor, beta: float) -> Tensor:
    """KL(p, q) at beta 0, KL(q, p) at beta 1, the generalised JSD between, of log-probs: [..., n] to [...]."""
    if beta in (0, 1):
        return _kl(p, q) if beta == 0 else _kl(q, p)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _values(
    student_logits: Tensor,
    teacher_top_logps: Tensor,
    teacher_top_ids: Tensor,
    teacher_rest: Tensor | None,
    temperature: float,
    tail: bool,
    beta: float,
) -> Tensor:
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    check_same_shape(teacher_top_logps=teacher_top_logps, teacher_top_ids=teacher_top_ids)
    if teacher_rest is None:
        mass = -torch.expm1(teacher_top_logps.logsumexp(-1))
        # Below this it is the rounding of a whole distribution.
        least = torch.finfo(mass.dtype).eps * teacher_top_logps.size(-1)
        teacher_rest = torch.where(mass > least, mass, torch.finfo(mass.dtype).tiny).log()
    check_same_shape(teacher_rest=teacher_rest, teacher_top_logps=teacher_top_logps[..., 0])
    log_q = (student_logits / temperature).log_softmax(-1)
    rest = teacher_rest
    if tail and teacher_top_ids.size(-1) < log_q.size(-1):
        rest = log_q.scatter(-1, teacher_top_ids, -math.inf).logsumexp(-1)
    q = log_q.gather(-1, teacher_top_ids)
    return between(*outcomes(q, rest, teacher_top_logps, teacher_rest, log_q.size(-1), tail), beta)


@_top_k
def top_k_kl(
    student_logits: Tensor,
    teacher_top_logps: Tensor,
    teacher_top_ids: Tensor,
    temperature: float = 1.0,
    teacher_rest: Tensor | None = None,
    *,
    reverse: bool = False,
    tail: bool = True,
    scale_by_temperature: bool = False,
) -> Tensor:
    r"""KL from a teacher of whom only the k likeliest tokens were kept; the rest is one bucket.

    .. math:: \sum_{v\in K} p_v\log\frac{p_v}{q_v} + p_{rest}\log\frac{p_{rest}}{q_{rest}} \le \mathrm{KL}(p\,\|\,q)

    Args:
        student_logits: [..., V].
        teacher_top_logps: [..., k], log-probabilities over the whole vocabulary, at this temperature.
        teacher_top_ids: int64 [..., k], which tokens they are; no token twice.
        teacher_rest: [...], log of the mass that was not kept; by default what the k leave, which is rounding where
            they hold nearly all.
        reverse: KL(student, teacher) instead of KL(teacher, student), also never above its whole.
        tail: keep the bucket of the rest; without it the k are renormalised on both sides, and mass that the student
            puts elsewhere costs nothing.
    Returns:
        Equal to :func:`kl_divergence` at k = V, never above it with the tail.
    Example:
        >>> top_k_kl(torch.zeros(1, 4), torch.tensor([[0.5]]).log(), torch.tensor([[2]]))
        tensor(0.1438)

    Source: the data-processing inequality; top-k caches: arXiv 2503.16870.
    """
    values = _values(
        student_logits, teacher_top_logps, teacher_top_ids, teacher_rest, temperature, tail, float(reverse)
    )
    return _scaled(values, temperature, scale_by_temperature)


@_top_k
def top_k_jsd(
    student_logits: Tensor,
    teacher_top_logps: Tensor,
    teacher_top_ids: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_rest: Tensor | None = None,
    *,
    tail: bool = True,
    scale_by_temperature: bool = False,
) -> Tensor:
    r"""The generalised Jensen–Shannon divergence over the k kept tokens and one bucket of the rest.

    .. math:: \beta\,\mathrm{KL}(p'\,\|\,m) + (1-\beta)\,\mathrm{KL}(q'\,\|\,m),\; m = \beta p' + (1-\beta) q'

    Args:
        beta: in [0, 1], as in :func:`generalized_jsd`: 0 is KL(p', q'), 1 is KL(q', p').
        teacher_top_logps, teacher_top_ids, teacher_rest, tail: as in :func:`top_k_kl`.
    Returns:
        Equal to :func:`generalized_jsd` at k = V, never above it with the tail.
    Example:
        >>> top_k_jsd(torch.zeros(1, 4), torch.tensor([[0.5]]).log(), torch.tensor([[2]]))
        tensor(0.0338)

    Source: arXiv 2306.13649 eq. 1, after the data-processing inequality.
    """
    check_range("beta", beta, 0.0, math.nextafter(1.0, 2.0))
    values = _values(student_logits, teacher_top_logps, teacher_top_ids, teacher_rest, temperature, tail, beta)
    return _scaled(values, temperature, scale_by_temperature)


@reducible("student_logits")
def sampled_distillation_loss(student_logits: Tensor, teacher_samples: Tensor, temperature: float = 1.0) -> Tensor:
    r"""The student's cross-entropy on m tokens that the teacher sampled, its mean over them.

    .. math:: -\frac1m\sum_{i=1}^m \log q_{v_i},\; v_i \sim p,\qquad
              \mathbb{E} = \mathrm{KL}(p\,\|\,q) + H(p)

    Args:
        student_logits: [..., V].
        teacher_samples: int64 [..., m], drawn from the teacher at this temperature, with replacement.
    Returns:
        An estimate without bias of the forward KL up to the teacher's entropy, a constant; so is its gradient.
    Raises:
        ValueError: samples that are no [..., m] of integers.
    Example:
        >>> sampled_distillation_loss(torch.zeros(1, 2), torch.tensor([[0, 1, 1]]))    # log 2
        tensor(0.6931)

    Source: arXiv 2503.16870 §4; for whole sequences arXiv 1606.07947.
    """
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    if teacher_samples.is_floating_point() or teacher_samples.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"teacher_samples must be integers [..., m] beside student_logits {tuple(student_logits.shape)}, "
            f"got {teacher_samples.dtype} {tuple(teacher_samples.shape)}"
        )
    return -(student_logits / temperature).log_softmax(-1).gather(-1, teacher_samples).mean(-1)
