r"""Policy-gradient losses on flat token vectors, found by name in :data:`POLICY_LOSSES`.

The call is that of :mod:`rlhf.losses._policy_loss`. Each function gives the loss of a token; its decorator holds how
these are averaged. :math:`\rho_t = \pi(a_t)/\pi_{old}(a_t)`.
"""

import math

import torch
from torch import Tensor

from rlhf.losses._checks import check_range
from rlhf.losses._policy import MAX_LOG_RATIO, clipped_surrogate
from rlhf.losses._policy_loss import Tokens, policy_loss


def _clipped(
    tokens: Tokens,
    epsilon: float,
    epsilon_high: float | None,
    *,
    delta: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's surrogate of each token, [N]; the clip above is the one below where it is None."""
    check_range("epsilon", epsilon, 0.0, 1.0, open_low=True)
    epsilon_above = epsilon if epsilon_high is None else epsilon_high
    return clipped_surrogate(tokens.ratio, tokens.advantages, epsilon, epsilon_above, dual_clip, delta)


@policy_loss("ppo", mean="tokens")
def ppo_tokens_loss(
    tokens: Tokens, epsilon: float = 0.2, epsilon_high: float | None = None, *, dual_clip: float | None = None
) -> Tensor:
    r"""PPO's clip, averaged over tokens: :func:`ppo_loss` among the losses of sequences.

    .. math:: -\frac1N\sum_t\min(\rho_t A_t, \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon_{high}) A_t)

    Args:
        tokens: the sampled tokens.
        epsilon: in (0, 1), the clip below 1.
        epsilon_high: the clip above 1; None for ``epsilon``.
        dual_clip: > 1; for A < 0 the loss stops at ``-dual_clip * A``; None for no limit.
    Returns:
        The loss of each token, [N]; a call returns their average, a scalar.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> ppo_tokens_loss(x, x, torch.tensor([1.0, -3.0]), ids)
        tensor(0.3333)

    Source: arXiv 1707.06347 eq. 7.
    """
    return _clipped(tokens, epsilon, epsilon_high, dual_clip=dual_clip)


# All sequences have the same weight, so a token of a long one has less: the length bias that Dr. GRPO removes.
@policy_loss("grpo", mean="sequences")
def grpo_loss(
    tokens: Tokens, epsilon: float = 0.2, epsilon_high: float | None = None, *, delta: float | None = None
) -> Tensor:
    r"""GRPO: PPO's clip, averaged over each sequence and then over sequences.

    .. math:: \frac1S\sum_s\frac{1}{|s|}\sum_{t\in s}\mathrm{clip}_t

    Args:
        tokens: the sampled tokens.
        epsilon: in (0, 1), the clip below 1.
        epsilon_high: the clip above 1; None for ``epsilon``.
        delta: > 0, an upper bound of the ratio (two-sided clip; above 1 + epsilon); None for no limit.
    Returns:
        The loss of each token, [N]; a call returns their average, a scalar.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> grpo_loss(x, x, torch.tensor([1.0, -3.0]), ids)
        tensor(1.)

    Source: arXiv 2402.03300 eq. 3 and 4; delta arXiv 2505.07291 (INTELLECT-2) §3.4.
    """
    return _clipped(tokens, epsilon, epsilon_high, delta=delta)


@policy_loss("dr_grpo", mean="sums")
def dr_grpo_loss(
    tokens: Tokens,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    *,
    # No default: the value sets the size of the step.
    max_completion_length: int,
    delta: float | None = None,
) -> Tensor:
    r"""Dr. GRPO: PPO's clip, divided by a constant instead of the length of each answer.

    .. math:: \frac{1}{S\,L_{max}}\sum_t \mathrm{clip}_t

    Args:
        tokens: the sampled tokens.
        epsilon: in (0, 1), the clip below 1.
        epsilon_high: the clip above 1; None for ``epsilon``.
        max_completion_length: > 0, L_max.
        delta: > 0, an upper bound of the ratio (two-sided clip; above 1 + epsilon); None for no limit.
    Returns:
        The loss of each token, [N]; a call returns their average, a scalar.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> dr_grpo_loss(x, x, torch.tensor([1.0, -3.0]), ids, max_completion_length=2)    # (-2 + 3) / 4
        tensor(0.2500)

    Source: arXiv 2503.20783. Its advantages are not divided by the group's standard deviation.
    """
    check_range("max_completion_length", max_completion_length, 0, math.inf, open_low=True)
    # The mean is over sequences of sums, so this constant is the only length in the divisor.
    return _clipped(tokens, epsilon, epsilon_high, delta=delta) / max_completion_length


# epsilon_high above epsilon: an unlikely token may rise further before it is clipped, which keeps entropy up.
@policy_loss("dapo", mean="tokens")
def dapo_loss(
    tokens: Tokens, epsilon: float = 0.2, epsilon_high: float | None = 0.28, *, delta: float | None = None
) -> Tensor:
    r"""DAPO: PPO's clip with a higher upper bound, averaged over all tokens of the batch.

    Args:
        tokens: the sampled tokens.
        epsilon: in (0, 1), the clip below 1.
        epsilon_high: the clip above 1; None for ``epsilon``.
        delta: > 0, an upper bound of the ratio (two-sided clip; above 1 + epsilon); None for no limit.
    Returns:
        The loss of each token, [N]; a call returns their average, a scalar.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> dapo_loss(x, x, torch.tensor([1.0, -3.0]), ids)    # (-1 - 1 + 3) / 3
        tensor(0.3333)

    Source: arXiv 2503.14476 eq. 8.
    """
    return _clipped(tokens, epsilon, epsilon_high, delta=delta)


@policy_loss("bnpo", mean="tokens")
def bnpo_loss(
    tokens: Tokens, epsilon: float = 0.2, epsilon_high: float | None = None, *, delta: float | None = None
) -> Tensor:
    r"""PPO's clip averaged over the tokens of the batch (TRL's ``bnpo``): DAPO's without clip-higher.

    Args:
        tokens: the sampled tokens.
        epsilon: in (0, 1), the clip below 1.
        epsilon_high: the clip above 1; None for ``epsilon``.
        delta: > 0, an upper bound of the ratio (two-sided clip; above 1 + epsilon); None for no limit.
    Returns:
        The loss of each token, [N]; a call returns their average, a scalar.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> bnpo_loss(x, x, torch.tensor([1.0, -3.0]), ids)
        tensor(0.3333)

    Source: arXiv 1707.06347 eq. 7; the name is TRL's.
    """
    return _clipped(tokens, epsilon, epsilon_high, delta=delta)


# TRL advises the ratio of the sequence for this loss; in our trainer that is importance_sampling_level.
@policy_loss("luspo", mean="sums")
def luspo_loss(
    tokens: Tokens, epsilon: float = 0.2, epsilon_high: float | None = None, *, delta: float | None = None
) -> Tensor:
    r"""LUSPO: PPO's clip, summed over each sequence and averaged over sequences.

    Args:
        tokens: the sampled tokens.
        epsilon: in (0, 1), the clip below 1.
        epsilon_high: the clip above 1; None for ``epsilon``.
        delta: > 0, an upper bound of the ratio (two-sided clip; above 1 + epsilon); None for no limit.
    Returns:
        The loss of each token, [N]; a call returns their average, a scalar.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> luspo_loss(x, x, torch.tensor([1.0, -3.0]), ids)    # (-2 + 3) / 2
        tensor(0.5000)

    Source: as TRL 1.16 has it.
    """
    return _clipped(tokens, epsilon, epsilon_high, delta=delta)


@policy_loss("gspo", mean="sequences", coupled=True)
def gspo_loss(tokens: Tokens, epsilon: float = 3e-4, epsilon_high: float | None = 4e-4) -> Tensor:
    r"""GSPO: clips one ratio for each sequence, the geometric mean of its token ratios.

    .. math:: -\frac1S\sum_s\min(\rho_s A_s, \mathrm{clip}(\rho_s) A_s),\; \rho_s = e^{\frac1{|s|}\sum_t\log\rho_t}

    Args:
        tokens: the sampled tokens.
        epsilon: in (0, 1), the clip below 1; a thousandth of PPO's, because a mean of log-ratios moves little.
        epsilon_high: the clip above 1; None for ``epsilon``.
    Returns:
        The loss of each token, [N]; a call returns their average, a scalar.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> gspo_loss(x, x, torch.tensor([1.0, -3.0]), ids)
        tensor(1.)

    Source: arXiv 2507.18071 eq. 5 and 7.
    """
    check_range("epsilon", epsilon, 0.0, 1.0, open_low=True)
    epsilon_above = epsilon if epsilon_high is None else epsilon_high
    # The geometric mean of the tokens' ratios; their product would be far from 1 for a long sequence.
    sequence_ratio = tokens.mean(tokens.log_ratio).exp()
    # The ratio is that of the whole sequence, so advantages that differ by token are averaged.
    sequence_losses = clipped_surrogate(sequence_ratio, tokens.mean(tokens.advantages), epsilon, epsilon_above)
    return tokens.spread(sequence_losses)


# No sequence ratio in place of the tokens': each token is clipped before the mean, which sets it apart from GSPO.
# The clip of exp(±0.4), 0.67 to 1.49, is wider than PPO's, because a geometric mean damps outliers.
@policy_loss("gmpo", mean="sequences", coupled=True, token_ratios=False)
def gmpo_loss(tokens: Tokens, epsilon: float = 0.4) -> Tensor:
    r"""GMPO: the geometric mean of token ratios, each clipped in logarithms first.

    .. math:: -\frac1S\sum_s A_s \exp\Big(\frac{1}{|s|}\sum_t \mathrm{pess}_t\Big),\;
              \mathrm{pess}_t = \min \text{ or } \max \text{ (by the sign of A) of } \log\rho_t,
              \mathrm{clip}(\log\rho_t, -\epsilon, \epsilon)

    Args:
        tokens: the sampled tokens.
        epsilon: > 0, of the log-ratio.
    Returns:
        The loss of each token, [N]; a call returns their average, a scalar.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> gmpo_loss(x, x, torch.tensor([1.0, -3.0]), ids)
        tensor(1.)

    Source: arXiv 2507.20673.
    """
    check_range("epsilon", epsilon, 0.0, math.inf, open_low=True)
    advantage_sign = tokens.advantages.sign()
    # With the sign of the advantage, the pessimistic choice between two log-ratios is a minimum for both signs.
    signed_log_ratio = advantage_sign * tokens.log_ratio
    signed_clipped_log_ratio = advantage_sign * tokens.log_ratio.clamp(-epsilon, epsilon)
    pessimistic = advantage_sign * torch.minimum(signed_log_ratio, signed_clipped_log_ratio)
    sequence_losses = -tokens.mean(pessimistic).exp() * tokens.mean(tokens.advantages)
    return tokens.spread(sequence_losses)


@policy_loss("cispo", mean="tokens")
def cispo_loss(tokens: Tokens, max_ratio: float = 5.0) -> Tensor:
    r"""CISPO: clips the importance weight instead of the update, so that every token keeps its gradient.

    .. math:: -\frac1N\sum_t\mathrm{sg}(\min(\rho_t, \rho_{max}))\,A_t\log\pi(a_t)

    Args:
        tokens: the sampled tokens.
        max_ratio: > 0, the cap of the ratio *itself* (TRL's ``epsilon_high``; verl's is this minus 1).
    Returns:
        The loss of each token, [N]; a call returns their average, a scalar.
    Example:
        >>> x, ids = torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([0, 0, 1])
        >>> cispo_loss(x, x, torch.tensor([1.0, -3.0]), ids)    # (1 + 1 - 6) / 3
        tensor(-1.3333)

    Source: arXiv 2506.13585 eq. 4 and 5.
    """
    check_range("max_ratio", max_ratio, 0.0, math.inf, open_low=True)
    # The gradient flows through the log-prob alone, so that a clipped ratio still passes it on.
    # Bounded above alone, as in the paper's experiments.
    constant_ratio = tokens.ratio.detach().clamp(max=max_ratio)
    return -constant_ratio * tokens.advantages * tokens.logps


@policy_loss("sapo", mean="sequences")
def sapo_loss(tokens: Tokens, temperature: float = 1.0, temperature_negative: float = 1.05) -> Tensor:
    r"""SAPO: a smooth gate around a ratio of 1 replaces the clip.

    .. math:: -\frac{4}{\tau}\sigma(\tau(\rho - 1)) A,\; \tau \text{ by the sign of A}

    Args:
        tokens: the sampled tokens.
        temperature: > 0, tau for A > 0.
        temperature_negative: > 0, tau for A <= 0.
    Returns:
        The loss of each token, [N]; a call returns their average, a scalar.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0]), torch.tensor([0, 1])
        >>> sapo_loss(x, x, torch.tensor([1.0, 1.0]), ids)    # 4 sigmoid(0)
        tensor(-2.)

    Source: arXiv 2511.20347.
    """
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    check_range("temperature_negative", temperature_negative, 0.0, math.inf, open_low=True)
    # Negative advantages get the narrower gate: lowering one token raises all others, which is less stable.
    tau = torch.full_like(tokens.logps, temperature_negative).masked_fill(tokens.advantages > 0, temperature)
    # 4 / tau makes the slope at ratio 1 that of the plain ratio.
    gate = torch.sigmoid(tau * (tokens.ratio - 1)) * 4 / tau
    return -gate * tokens.advantages


@policy_loss("vespo", mean="tokens", coupled=True, token_ratios=False)
def vespo_loss(
    tokens: Tokens, k_pos: float = 2.0, lambda_pos: float = 3.0, k_neg: float = 3.0, lambda_neg: float = 2.0
) -> Tensor:
    r"""VESPO: a smooth weight from the ratio of the whole sequence replaces the clip; averaged over tokens.

    .. math:: -\frac1N\sum_t\mathrm{sg}(\phi(w_s))\,A_t\log\pi(a_t),\;
              \phi(w) = e^{\lambda(1 - w)} w^k,\; w_s = \prod_{t\in s}\rho_t

    Args:
        tokens: the sampled tokens.
        k_pos: >= 0, power for A >= 0.
        lambda_pos: >= 0, decay for A >= 0.
        k_neg: >= 0, power for A < 0.
        lambda_neg: >= 0, decay for A < 0.
    Returns:
        The loss of each token, [N]; a call returns their average, a scalar.
    Example:
        >>> x, ids = torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([0, 0, 1])
        >>> vespo_loss(x, x, torch.tensor([1.0, -3.0]), ids)    # phi(1) = 1: (1 + 1 - 6) / 3
        tensor(-1.3333)

    Source: arXiv 2602.10693; log w is kept within [log 1e-8, 20], as TRL 1.16 has it.
    """
    for name, value in dict(k_pos=k_pos, lambda_pos=lambda_pos, k_neg=k_neg, lambda_neg=lambda_neg).items():
        check_range(name, value, 0.0, math.inf)
    # The product of the ratios, not their geometric mean: the weight is smooth, so an extreme ratio does no harm.
    # The weight is a constant; the gradient flows through the log-probs alone.
    sequence_log_ratio = tokens.sum(tokens.log_ratio.detach()).clamp(math.log(1e-8), MAX_LOG_RATIO)
    log_weight = tokens.spread(sequence_log_ratio)
    is_nonnegative = tokens.advantages >= 0
    power = torch.full_like(log_weight, k_neg).masked_fill(is_nonnegative, k_pos)
    # TRL raises lambda to at least 1e-4; here 0 means no decay.
    decay = torch.full_like(log_weight, lambda_neg).masked_fill(is_nonnegative, lambda_pos)
    # exp(decay (1 - w)) w^power, in logarithms: neither factor overflows.
    phi = (decay + power * log_weight - decay * log_weight.exp()).exp()
    return -phi * tokens.advantages * tokens.logps


# Without a ratio nothing corrects for an older policy: one step for each rollout.
@policy_loss("reinforce", mean="tokens", token_ratios=False)
def reinforce_loss(tokens: Tokens) -> Tensor:
    r"""REINFORCE: the plain policy gradient, averaged over tokens; ``old_logps`` is ignored.

    .. math:: -\frac1N\sum_t A_t\log\pi(a_t)

    Args:
        tokens: the sampled tokens.
    Returns:
        The loss of each token, [N]; a call returns their average, a scalar.
    Example:
        >>> reinforce_loss(torch.tensor([-1.0, -2.0]), None, torch.tensor([1.0, 3.0]), torch.tensor([0, 1]))
        tensor(3.5000)

    Source: Williams 1992.
    """
    return -tokens.advantages * tokens.logps


# Sums, because the log-prob of an answer is the sum of its tokens'. TRL's RLOOTrainer adds PPO's clip.
@policy_loss("rloo", mean="sums", token_ratios=False)
def rloo_loss(tokens: Tokens) -> Tensor:
    r"""REINFORCE on whole answers: the mean over sequences of the advantage times the summed log-prob.

    .. math:: -\frac1S\sum_s A_s\sum_{t\in s}\log\pi(a_t)

    Args:
        tokens: the sampled tokens.
    Returns:
        The loss of each token, [N]; a call returns their average, a scalar.
    Example:
        >>> ids = torch.tensor([0, 0, 1])
        >>> rloo_loss(torch.tensor([-1.0, -2.0, -4.0]), None, torch.tensor([1.0, -1.0]), ids)    # (3 - 4) / 2
        tensor(-0.5000)

    Source: arXiv 2402.14740.
    """
    return -tokens.advantages * tokens.logps
