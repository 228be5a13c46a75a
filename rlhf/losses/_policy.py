r"""Policy-gradient losses of single elements, on tensors of one shape: PPO's two losses, actor–critic, KL estimates.

Losses that know which token belongs to which sequence are in :mod:`rlhf.losses._policy_sequences`.
"""

import math

import torch
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape
from rlhf.losses._reduction import reducible, upcast

MAX_LOG_RATIO = 20.0  # e^20 is 5e8: no clip reaches so far, and float32 has room for products


def clamped_log_ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    """``log(pi / pi_old)`` within ±20, so that its exponential stays finite."""
    # In logarithms: once the exponential has overflowed, a clamp leaves a NaN in the gradient.
    return (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    dual_clip: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """The pessimistic surrogate, negated; ``delta`` bounds the ratio from above before it is compared."""
    # Clipped before delta bounds the ratio, as in TRL, so that delta cannot narrow the ordinary clip.
    clipped = ratio.clamp(1 - low, 1 + high) * advantages
    if delta is not None:
        # For A < 0 the clip does not bound a large ratio, and one token can dominate the step.
        check_range("delta", delta, 0.0, math.inf, open_low=True)
        ratio = ratio.clamp(max=delta)
    # The smaller of the two: a ratio beyond the clip adds nothing where it would help, and counts where it hurts.
    surrogate = torch.minimum(ratio * advantages, clipped)
    if dual_clip is not None:
        check_range("dual_clip", dual_clip, 1.0, math.inf, open_low=True)
        # For A >= 0 the minimum is bounded already.
        bounded = torch.maximum(surrogate, dual_clip * advantages)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
    return -surrogate


@reducible("logps", "old_logps", "advantages")
def ppo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    clip_ratio: float = 0.2,
    *,
    clip_ratio_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    r"""PPO's clipped objective: nothing is gained by moving the ratio beyond the clip.

    .. math:: -\min(\rho A, \mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon_{high}) A)

    Args:
        logps: any shape, with ``mask`` where it is padded; nats, carries gradient.
        old_logps: same shape, nats, under the policy that sampled.
        advantages: same shape.
        clip_ratio: in (0, 1), epsilon.
        clip_ratio_high: epsilon above 1, DAPO's clip-higher (0.28); None for ``clip_ratio``.
        dual_clip: > 1; for A < 0 the loss stops at ``-dual_clip * A`` (3 is usual); None for no limit.
    Returns:
        Scalar, or the input's shape for ``"none"``; at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, or a hyper-parameter is out of range.
    Example:
        >>> ppo_loss(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([1.0]))    # ratio 2, clipped
        tensor(-1.2000)

    Source: arXiv 1707.06347 eq. 7; dual clip arXiv 1912.09729 eq. 4; clip-higher arXiv 2503.14476.
    """
    check_range("clip_ratio", clip_ratio, 0.0, 1.0, open_low=True)
    check_same_shape(logps=logps, old_logps=old_logps, advantages=advantages)
    epsilon_above = clip_ratio if clip_ratio_high is None else clip_ratio_high
    return clipped_surrogate(
        clamped_log_ratio(logps, old_logps).exp(), advantages, clip_ratio, epsilon_above, dual_clip
    )


@reducible("values", "old_values", "returns")
def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float | None = 0.2) -> Tensor:
    r"""PPO's value loss: half the squared error, with a clip around the old values.

    .. math:: \tfrac12\max[(V - R)^2, (\mathrm{clip}(V, V_{old}-\epsilon, V_{old}+\epsilon) - R)^2]

    Args:
        values: any shape, carries gradient.
        old_values: same shape, the critic's at sampling; constant.
        returns: same shape, constant.
        cliprange_value: > 0, epsilon, in units of the return; None for the plain squared error.
    Returns:
        Scalar, or the input's shape for ``"none"``; at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, or a hyper-parameter is out of range.
    Example:
        >>> value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0]))    # clipped to 0.2
        tensor(1.6200)

    Source: the PPO authors' code (openai/baselines, ppo2).
    """
    check_same_shape(values=values, old_values=old_values, returns=returns)
    squared_errors = (values - returns) ** 2
    if cliprange_value is not None:
        check_range("cliprange_value", cliprange_value, 0.0, math.inf, open_low=True)
        # Clipped around the old values, which must be those at sampling, before any step of this rollout.
        clipped_values = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
        # The larger of the two errors: moving further than the clip is never rewarded.
        squared_errors = torch.maximum(squared_errors, (clipped_values - returns) ** 2)
    return squared_errors / 2


@reducible("logps", "values", "returns", "entropy")
def actor_critic_loss(
    logps: Tensor,
    values: Tensor,
    returns: Tensor,
    entropy: Tensor | None = None,
    *,
    vf_coef: float = 0.5,
    entropy_coef: float = 0.0,
) -> Tensor:
    r"""Advantage actor–critic: the losses of policy and critic, and an entropy bonus, in one.

    .. math:: -(R - \mathrm{sg}(V))\log\pi(a) + c_V\,(R - V)^2 - c_H H

    Args:
        logps: any shape, nats, carries gradient.
        values: same shape, carries gradient.
        returns: same shape, constant.
        entropy: same shape, nats; None leaves it out.
        vf_coef: >= 0, c_V.
        entropy_coef: >= 0, c_H.
    Returns:
        Scalar, or the input's shape for ``"none"``; at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, or a hyper-parameter is out of range.
    Example:
        >>> actor_critic_loss(torch.tensor([-1.0]), torch.tensor([2.0]), torch.tensor([3.0]))    # 1 + 0.5
        tensor(1.5000)

    Source: arXiv 1602.01783 (A3C), eq. in §4.
    """
    check_range("vf_coef", vf_coef, 0.0, math.inf)
    check_same_shape(logps=logps, values=values, returns=returns, entropy=entropy)
    # A constant for the policy: the critic learns from its own term alone.
    advantages = (returns - values).detach()
    losses = -advantages * logps + vf_coef * (returns - values) ** 2
    return losses if entropy is None else losses - entropy_coef * entropy


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: str = "k3") -> Tensor:
    r"""Estimates of KL(policy, reference) from sampled tokens, one for each element.

    With :math:`r = \log\pi - \log\pi_{ref}`: k1 = r (unbiased, may be negative), k2 = r²/2 (its gradient is the KL's),
    k3 = :math:`e^{-r} - 1 + r` (unbiased, never negative; as a loss its gradient is that of the *forward* KL).

    Args:
        logps: any shape, nats, of tokens that the policy sampled.
        ref_logps: same shape, under the reference.
        kind: ``"k1"``, ``"k2"`` or ``"k3"``.
    Returns:
        Same shape, at least float32. In the reward only k1 is right (detached); in the loss only k2.
    Raises:
        ValueError: shapes differ, or an unknown kind.
    Example:
        >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-2.0]), "k3")
        tensor([0.3679])

    Source: Schulman 2020, "Approximating KL divergence".
    """
    check_same_shape(logps=logps, ref_logps=ref_logps)
    log_ratio = upcast(logps) - upcast(ref_logps)
    match kind:
        case "k1":
            return log_ratio
        case "k2":
            return log_ratio**2 / 2
        case "k3":
            # expm1, as the exponential less 1 loses all digits where the two nearly agree.
            # Only the exponential is clamped, so that the linear part has a gradient at any log-ratio.
            return torch.expm1(-log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) + log_ratio
    raise ValueError(f'kind must be "k1", "k2" or "k3", got {kind!r}')
