r"""Divergences of known form with their gradient, on a chunk of log-probs: fewer passes over it than autograd makes.

With q and p the probabilities of student and teacher at temperature T, and :math:`g_v = \partial D/\partial q_v` up to
a constant,

.. math:: \frac{\partial D}{\partial z_v} = \frac{1}{T}\Big(q_v g_v - q_v\sum_u q_u g_u\Big)

Constants are chosen such that g is exactly 0 where the two agree. The definitions are those of ``rlhf.losses``; a
divergence that is not in :data:`FUSED` gets autograd's gradient instead.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.logprobs.chunk_scores import dot
from rlhf.losses import alpha_divergence, generalized_jsd, kl_divergence, skew_kl, total_variation

MAX_LOG_RATIO = 80.0  # log-ratios beyond it change nothing in float32, whose exp overflows at 88


class Terms(NamedTuple):
    """A divergence of c tokens and the parts of its gradient.

    Args:
        value: [c], D.
        probs: [c, V], q.
        q_times_grad: [c, V], q g.
        mean_grad: the sum of q g over v, [c, 1] or a number.
    """

    value: Tensor
    probs: Tensor
    q_times_grad: Tensor
    mean_grad: Tensor | float


Fused = Callable[[Tensor, Tensor], Terms]
"""From log q and log p at the divergence's temperature, [c, V], both of which it overwrites."""


def _forward_kl(log_q: Tensor, log_p: Tensor) -> Terms:
    p = log_p.exp()
    divergences = dot(p, log_p.sub_(log_q))
    # g = -p/q, so the sum of q g is -1.
    return Terms(divergences, log_q.exp_(), p.neg_(), -1.0)


def _reverse_kl(log_q: Tensor, log_p: Tensor) -> Terms:
    log_ratio = torch.sub(log_q, log_p, out=log_p)
    q = log_q.exp_()
    # g = log q/p up to a constant, so the sum of q g is the divergence itself.
    q_times_grad = log_ratio.mul_(q)
    divergences = q_times_grad.sum(1)
    return Terms(divergences, q, q_times_grad, divergences[:, None])


def _jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Terms:
    p = log_p.exp()
    log_ratio = log_p.sub_(log_q).clamp_(max=MAX_LOG_RATIO)
    q = log_q.exp_()
    divergences = beta * dot(p, log_ratio)
    log_m_over_q = log_ratio.expm1_().mul_(beta).log1p_()
    # KL(p, m) and KL(q, m) from one logarithm: log p/m = log p/q - log m/q.
    mixture = p.mul_(beta).add_(q, alpha=1 - beta)
    divergences -= dot(mixture, log_m_over_q)
    q_times_grad = log_m_over_q.mul_(q).mul_(beta - 1)
    return Terms(divergences, q, q_times_grad, q_times_grad.sum(1, keepdim=True))


def _skew_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Terms:
    p = log_p.exp()
    log_ratio = torch.sub(log_q, log_p, out=log_p).clamp_(max=MAX_LOG_RATIO)
    q = log_q.exp_()
    log_m_over_p = log_ratio.expm1_().mul_(1 - alpha).log1p_()
    divergences = -dot(p, log_m_over_p)
    # g = (alpha - 1) (p/m - 1), which is 0 where q = p.
    q_times_grad = log_m_over_p.neg_().expm1_().mul_(q).mul_(alpha - 1)
    return Terms(divergences, q, q_times_grad, q_times_grad.sum(1, keepdim=True))


def _reverse_skew_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Terms:
    log_ratio = log_p.sub_(log_q).clamp_(max=MAX_LOG_RATIO)
    log_m_over_q = log_ratio.expm1_().mul_(1 - alpha).log1p_()
    q = log_q.exp_()
    divergences = -dot(q, log_m_over_q)
    # g = -(alpha (q/m - 1) + log m/q), which is 0 where q = p.
    q_times_grad = log_m_over_q.neg().expm1_().mul_(alpha).add_(log_m_over_q).mul_(q).neg_()
    return Terms(divergences, q, q_times_grad, q_times_grad.sum(1, keepdim=True))


def _alpha(log_q: Tensor, log_p: Tensor, alpha: float) -> Terms:
    # p^alpha q^(1 - alpha), from logarithms: neither power underflows by itself.
    overlap = log_p.sub_(log_q).mul_(alpha).add_(log_q).exp_()
    q = log_q.exp_()
    # The sum of q in place of 1: it has the rounding that the sum of the overlap has.
    total_q, total_overlap = q.sum(1, keepdim=True), overlap.sum(1, keepdim=True)
    divergences = ((total_q - total_overlap) / (alpha * (1 - alpha))).squeeze(1)
    return Terms(divergences, q, overlap.mul_(-1 / alpha), total_overlap / total_q / -alpha)


def _total_variation(log_q: Tensor, log_p: Tensor) -> Terms:
    q = log_q.exp_()
    difference = log_p.exp_().sub_(q)
    divergences = difference.abs().sum(1) / 2  # vector_norm adds one after another, as bmm does
    q_times_grad = difference.sign_().mul_(q).mul_(-0.5)
    return Terms(divergences, q, q_times_grad, q_times_grad.sum(1, keepdim=True))


def _of_kl(options: dict[str, Any]) -> Fused:
    return _reverse_kl if options["reverse"] else _forward_kl


def _of_jsd(options: dict[str, Any]) -> Fused:
    beta = options["beta"]
    limits = {0: _forward_kl, 1: _reverse_kl}
    return limits.get(beta, partial(_jsd, beta=beta))


def _of_skew_kl(options: dict[str, Any]) -> Fused:
    alpha = options["alpha"]
    if alpha == 0:
        return _of_kl(options)
    return partial(_reverse_skew_kl if options["reverse"] else _skew_kl, alpha=alpha)


def _of_alpha_divergence(options: dict[str, Any]) -> Fused:
    alpha = options["alpha"]
    limits = {0: _reverse_kl, 1: _forward_kl}
    return limits.get(alpha, partial(_alpha, alpha=alpha))


def _of_total_variation(options: dict[str, Any]) -> Fused:
    return _total_variation


# By the function, not by its name: another function that is registered under the name has a gradient of its own.
FUSED: dict[Callable[..., Tensor], Callable[[dict[str, Any]], Fused]] = {
    kl_divergence: _of_kl,
    generalized_jsd: _of_jsd,
    skew_kl: _of_skew_kl,
    alpha_divergence: _of_alpha_divergence,
    total_variation: _of_total_variation,
}
"""From the options of a divergence (all of them, with their defaults) to the function of a chunk."""


def interpolation(fused: Fused) -> float | None:
    """The divergence as a generalised JSD, which the kernels of a GPU know.

    Args:
        fused: of :data:`FUSED`.
    Returns:
        0 for the forward KL, 1 for the reverse KL, between them beta; None for others.
    """
    limits: dict[Fused, float] = {_forward_kl: 0.0, _reverse_kl: 1.0}
    if isinstance(fused, partial):
        return float(fused.keywords["beta"]) if fused.func is _jsd else None
    return limits.get(fused)
