r"""Divergences from a teacher of which only a part is stored: its k most likely tokens, or tokens sampled from it.

With :math:`K` the stored tokens, :math:`p_{rest} = 1 - \sum_{v\in K} p_v` and :math:`q_{rest}` likewise, there are
three estimates of a divergence between teacher p and student q: over the k + 1 outcomes "each of K" and "any other"
(the tail), over K alone with both sides renormalised (truncated), and from samples of p. `docs/teacher-cache.md` has
their bias, their variance and a measured table.
"""

import math

import torch
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape
from rlhf.losses._divergences import interpolated_kl
from rlhf.losses._reduction import reducible

_top_k = reducible("student_logits", "teacher_top_logps", "teacher_rest")


def top_k_outcomes(
    log_q: Tensor, log_q_rest: Tensor, log_p: Tensor, log_p_rest: Tensor, vocabulary: int, tail: bool
) -> tuple[Tensor, Tensor]:
    """Log-probs of the stored tokens and of the rest, as two distributions over the same outcomes.

    Args:
        log_q: [..., k], of the kept tokens under the student.
        log_q_rest: [...], log of the student's mass of all others.
        log_p: [..., k], of the kept tokens under the teacher.
        log_p_rest: [...], log of the teacher's mass of all others.
        vocabulary: V; at k = V there are no others.
        tail: keep the others, as one outcome; without it the k are renormalised.
    Returns:
        ``(log_q, log_p)``, [..., k + 1], or [..., k] without others.
    Example:
        >>> half, rest = torch.tensor([0.5]).log(), torch.tensor(0.5).log()
        >>> top_k_outcomes(half, rest, half, rest, 4, tail=True)[0].exp()
        tensor([0.5000, 0.5000])
    """
    # log_softmax of log-probs subtracts the logarithm of their sum: it renormalises them.
    if not tail:
        return log_q.log_softmax(-1), log_p.log_softmax(-1)
    if log_q.size(-1) == vocabulary:
        return log_q, log_p
    smallest_log = math.log(torch.finfo(log_p.dtype).tiny)  # a rest of nothing: log 0 would make NaN of 0 * log 0
    log_p_rest = log_p_rest.clamp(min=smallest_log)
    return torch.cat([log_q, log_q_rest[..., None]], -1), torch.cat([log_p, log_p_rest[..., None]], -1)


def _log_rest(top_logps: Tensor) -> Tensor:
    """Log of the mass that the k kept tokens leave, [...]."""
    # expm1 keeps the digits of a small rest.
    rest_mass = -torch.expm1(top_logps.logsumexp(-1))
    # Below this it is the rounding of a whole distribution.
    smallest_mass = torch.finfo(rest_mass.dtype).eps * top_logps.size(-1)
    return torch.where(rest_mass > smallest_mass, rest_mass, torch.finfo(rest_mass.dtype).tiny).log()


def _divergence_of_top_k(
    student_logits: Tensor,
    teacher_top_logps: Tensor,
    teacher_top_ids: Tensor,
    teacher_rest: Tensor | None,
    *,
    beta: float,
    temperature: float,
    tail: bool,
    scale_by_temperature: bool,
) -> Tensor:
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    check_same_shape(teacher_top_logps=teacher_top_logps, teacher_top_ids=teacher_top_ids)
    if teacher_rest is None:
        teacher_rest = _log_rest(teacher_top_logps)
    check_same_shape(teacher_rest=teacher_rest, teacher_top_logps=teacher_top_logps[..., 0])
    log_q = (student_logits / temperature).log_softmax(-1)
    log_q_rest = teacher_rest  # not read without a tail
    vocabulary = log_q.size(-1)
    if tail and teacher_top_ids.size(-1) < vocabulary:
        # The student's rest is summed from its tokens: 1 less the kept mass would lose its digits where that is near 1.
        # For the teacher there is no other way, as its other tokens were not kept.
        log_q_rest = log_q.scatter(-1, teacher_top_ids, -math.inf).logsumexp(-1)
    log_q_kept = log_q.gather(-1, teacher_top_ids)
    outcomes = top_k_outcomes(log_q_kept, log_q_rest, teacher_top_logps, teacher_rest, vocabulary, tail)
    values = interpolated_kl(*outcomes, beta)
    return values * temperature**2 if scale_by_temperature else values


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
    r"""KL to a teacher of which only the k most likely tokens are stored; the rest is one bucket.

    .. math:: \sum_{v\in K} p_v\log\frac{p_v}{q_v} + p_{rest}\log\frac{p_{rest}}{q_{rest}} \le \mathrm{KL}(p\,\|\,q)

    Args:
        student_logits: [..., V]; carries gradient.
        teacher_top_logps: [..., k], log-probabilities over the whole vocabulary, at this temperature.
        teacher_top_ids: int64 [..., k], which tokens they are; no token twice.
        temperature: > 0, divides the student's logits; the teacher's are divided already.
        teacher_rest: [...], log of the mass that was not kept; by default what the k leave, which is rounding where
            they hold nearly all.
        reverse: KL(student, teacher) instead of KL(teacher, student), also never above its whole.
        tail: keep the bucket of the rest; without it the k are renormalised on both sides, and mass that the student
            puts elsewhere costs nothing.
        scale_by_temperature: multiply by the temperature squared, so that gradients keep their size.
    Returns:
        [...], nats, before the reduction. Equal to :func:`kl_divergence` at k = V, never above it with the tail.
    Example:
        >>> top_k_kl(torch.zeros(1, 4), torch.tensor([[0.5]]).log(), torch.tensor([[2]]))
        tensor(0.1438)

    Source: the data-processing inequality; top-k caches: arXiv 2503.16870.
    """
    return _divergence_of_top_k(
        student_logits,
        teacher_top_logps,
        teacher_top_ids,
        teacher_rest,
        # The two KLs are the ends of the Jensen–Shannon family, so that one function serves both losses.
        beta=1.0 if reverse else 0.0,
        temperature=temperature,
        tail=tail,
        scale_by_temperature=scale_by_temperature,
    )


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
    r"""Generalised Jensen–Shannon divergence over the teacher's k most likely tokens and one bucket for the rest.

    .. math:: \beta\,\mathrm{KL}(p'\,\|\,m) + (1-\beta)\,\mathrm{KL}(q'\,\|\,m),\; m = \beta p' + (1-\beta) q'

    Args:
        student_logits: [..., V]; carries gradient.
        teacher_top_logps: [..., k], log-probabilities over the whole vocabulary, at this temperature.
        teacher_top_ids: int64 [..., k], which tokens they are; no token twice.
        beta: in [0, 1], as in :func:`generalized_jsd`: 0 is KL(p', q'), 1 is KL(q', p').
        temperature: > 0, divides the student's logits; the teacher's are divided already.
        teacher_rest: [...], log of the mass that was not kept; by default what the k leave.
        tail: keep the bucket of the rest; without it the k are renormalised on both sides.
        scale_by_temperature: multiply by the temperature squared, so that gradients keep their size.
    Returns:
        [...], nats, before the reduction. Equal to :func:`generalized_jsd` at k = V, never above it with the tail.
    Example:
        >>> top_k_jsd(torch.zeros(1, 4), torch.tensor([[0.5]]).log(), torch.tensor([[2]]))
        tensor(0.0338)

    Source: arXiv 2306.13649 eq. 1, after the data-processing inequality.
    """
    check_range("beta", beta, 0.0, math.nextafter(1.0, 2.0))
    return _divergence_of_top_k(
        student_logits,
        teacher_top_logps,
        teacher_top_ids,
        teacher_rest,
        beta=beta,
        temperature=temperature,
        tail=tail,
        scale_by_temperature=scale_by_temperature,
    )


@reducible("student_logits")
def sampled_distillation_loss(student_logits: Tensor, teacher_samples: Tensor, temperature: float = 1.0) -> Tensor:
    r"""The student's mean cross-entropy on m tokens that were sampled from the teacher.

    .. math:: -\frac1m\sum_{i=1}^m \log q_{v_i},\; v_i \sim p,\qquad
              \mathbb{E} = \mathrm{KL}(p\,\|\,q) + H(p)

    Args:
        student_logits: [..., V]; carries gradient.
        teacher_samples: int64 [..., m], drawn from the teacher at this temperature, with replacement.
        temperature: > 0, divides the student's logits.
    Returns:
        [...], nats, before the reduction. Its expectation is the forward KL plus the teacher's entropy, a constant; so
        its gradient has no bias.
    Raises:
        ValueError: samples that are no [..., m] of integers.
    Example:
        >>> sampled_distillation_loss(torch.zeros(1, 2), torch.tensor([[0, 1, 1]]))    # log 2
        tensor(0.6931)

    Source: arXiv 2503.16870 §4; for whole sequences arXiv 1606.07947.
    """
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    # gather reads a smaller index without an error, and would score the wrong positions.
    if teacher_samples.is_floating_point() or teacher_samples.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"teacher_samples must be integers [..., m] beside student_logits {tuple(student_logits.shape)}, "
            f"got {teacher_samples.dtype} {tuple(teacher_samples.shape)}"
        )
    # A token drawn twice counts twice, without which the estimate would be biased.
    return -(student_logits / temperature).log_softmax(-1).gather(-1, teacher_samples).mean(-1)
