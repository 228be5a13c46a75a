r"""Policy-gradient losses on flat token vectors, found by name in :data:`POLICY_LOSSES`.

Every member is called as ``loss(logps, old_logps, advantages, sequence, ...)``:

* ``logps``: [N], nats, of the tokens that the policy sampled; carry gradient;
* ``old_logps``: [N], the same at sampling time (``logps.detach()`` in the first step);
* ``advantages``: [N], or [S]: one for each sequence, spread over its tokens; constant;
* ``sequence``: int64 [N] in [0, S), the sequence of each token (``Targets.sequence``);
* ``num_sequences``: S; by default the largest sequence + 1;
* ``mask``: [N], True counts;
* ``weight``: [N], a factor on each token's loss, for instance :func:`truncated_importance_weights`; the divisor stays
  the number of tokens or sequences.

It returns a scalar, at least float32; 0 if nothing counts. A loss that is a mean over sequences divides by those with a
token that counts. ValueError: shapes do not fit, or a hyper-parameter is out of range. The *value* of these losses says
little (it is 0 on the first step with centred advantages); the gradient is what they are for. Notation:
:math:`\rho_t = \pi(a_t)/\pi_{old}(a_t)`; log-ratios stop at ±20.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.losses._checks import check_floating, check_range, check_same_shape
from rlhf.losses._policy import clipped_surrogate, kl_estimate, stopped_log_ratio
from rlhf.losses._reduction import reduce, upcast


class _Tokens:
    """Checked inputs of a loss over sequences: what is hidden is 0 and counts nowhere."""

    def __init__(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        sequence: Tensor,
        num_sequences: int | None,
        weight: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        if logps.dim() != 1 or sequence.is_floating_point():
            raise ValueError(
                f"logps must be flat [N] with integer sequence ids, got {tuple(logps.shape)} and {sequence.dtype}: "
                "select the tokens that count (logps[mask]) and number their rows"
            )
        check_same_shape(logps=logps, old_logps=old_logps, sequence=sequence, weight=weight, mask=mask)
        self.size = int(sequence.max()) + 1 if num_sequences is None and sequence.numel() else num_sequences or 0
        if advantages.shape == (self.size,) != logps.shape:
            advantages = advantages[sequence]
        check_same_shape(logps=logps, advantages=advantages)
        for name, value in (("logps", logps), ("old_logps", old_logps), ("advantages", advantages)):
            check_floating(name, value)
        visible = torch.ones_like(sequence, dtype=torch.bool) if mask is None else mask.bool()
        self.logps, self.old_logps, self.advantages = (
            torch.where(visible, upcast(x), 0.0) for x in (logps, old_logps, advantages)
        )
        self.sequence, self.visible, self.weight = sequence, visible, weight
        self.log_ratio = stopped_log_ratio(self.logps, self.old_logps)
        self.lengths = self.sum(visible.to(self.logps.dtype))

    def sum(self, values: Tensor) -> Tensor:
        """Over each sequence, [S]."""
        return values.new_zeros(self.size).index_add(0, self.sequence, values)

    def mean(self, values: Tensor) -> Tensor:
        """Over the tokens of each sequence that count, [S]."""
        return self.sum(torch.where(self.visible, values, 0.0)) / self.lengths.clamp(min=1)

    def over_tokens(self, values: Tensor) -> Tensor:
        return reduce(values if self.weight is None else values * self.weight, mask=self.visible)

    def over_sequences(self, values: Tensor, per_token: bool = True) -> Tensor:
        """Mean over sequences of the mean (or sum) over their tokens."""
        values = values if self.weight is None else values * self.weight
        sums = self.sum(torch.where(self.visible, values, 0.0))
        return reduce(sums / self.lengths.clamp(min=1) if per_token else sums, mask=self.lengths > 0)

    def clipped(self, epsilon: float, epsilon_high: float | None, delta: float | None = None) -> Tensor:
        check_range("epsilon", epsilon, 0.0, 1.0, open_low=True)
        high = epsilon if epsilon_high is None else epsilon_high
        return clipped_surrogate(self.log_ratio.exp(), self.advantages, epsilon, high, delta=delta)


_Options = dict[str, Any]


def _tokens(args: tuple[Tensor, Tensor, Tensor, Tensor], options: _Options) -> _Tokens:
    known = {name: options.pop(name, None) for name in ("num_sequences", "weight", "mask")}
    if options:
        raise TypeError(f"unknown argument {next(iter(options))!r}; besides its own, a loss takes {', '.join(known)}")
    return _Tokens(*args, **known)


def grpo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence: Tensor, epsilon: float = 0.2,
    epsilon_high: float | None = None, *, delta: float | None = None, ref_logps: Tensor | None = None,
    beta: float = 0.0, **options: Any,
) -> Tensor:  # fmt: skip
    r"""GRPO: PPO's clip, averaged over each sequence and then over sequences, with KL to a reference.

    .. math:: \frac1S\sum_s\frac{1}{|s|}\sum_{t\in s}[\mathrm{clip}_t + \beta\,k_3(t)]

    Args:
        epsilon, epsilon_high: the clip below and above. delta: > 0, the largest ratio that counts (two-sided clip,
            above 1 + epsilon); None for none. ref_logps: [N]; beta: >= 0, weight of :func:`kl_estimate` k3.
        options: ``num_sequences``, ``weight``, ``mask``.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> grpo_loss(x, x, torch.tensor([1.0, -3.0]), ids)
        tensor(1.)

    Source: arXiv 2402.03300 eq. 3 and 4; delta arXiv 2505.07291 (INTELLECT-2) §3.4.
    """
    tokens = _tokens((logps, old_logps, advantages, sequence), options)
    losses = tokens.clipped(epsilon, epsilon_high, delta)
    if beta and ref_logps is not None:
        losses = losses + beta * kl_estimate(tokens.logps, torch.where(tokens.visible, ref_logps, 0.0), "k3")
    return tokens.over_sequences(losses)


def dapo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence: Tensor, epsilon: float = 0.2,
    epsilon_high: float | None = 0.28, *, delta: float | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    r"""DAPO: clip-higher, averaged over all tokens, so that long answers are not diluted.

    Args:
        epsilon, epsilon_high: the clip below and above. delta: as in :func:`grpo_loss`.
        options: ``num_sequences``, ``weight``, ``mask``.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> dapo_loss(x, x, torch.tensor([1.0, -3.0]), ids)    # (-1 - 1 + 3) / 3
        tensor(0.3333)

    Source: arXiv 2503.14476 eq. 8.
    """
    tokens = _tokens((logps, old_logps, advantages, sequence), options)
    return tokens.over_tokens(tokens.clipped(epsilon, epsilon_high, delta))


def bnpo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence: Tensor, epsilon: float = 0.2,
    epsilon_high: float | None = None, *, delta: float | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    r"""PPO's clip averaged over the tokens of the batch (TRL's ``bnpo``): DAPO's without clip-higher.

    Args:
        epsilon, epsilon_high: the clip below and above. delta: as in :func:`grpo_loss`.
        options: ``num_sequences``, ``weight``, ``mask``.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> bnpo_loss(x, x, torch.tensor([1.0, -3.0]), ids)
        tensor(0.3333)

    Source: arXiv 1707.06347 eq. 7; the name is TRL's.
    """
    return dapo_loss(logps, old_logps, advantages, sequence, epsilon, epsilon_high, delta=delta, **options)


def dr_grpo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence: Tensor, epsilon: float = 0.2,
    epsilon_high: float | None = None, *, max_completion_length: int, delta: float | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    r"""Dr. GRPO: divided by a constant, so that length is neither rewarded nor punished.

    .. math:: \frac{1}{S\,L_{max}}\sum_t \mathrm{clip}_t

    Args:
        max_completion_length: > 0, L_max. epsilon, epsilon_high, delta: as in :func:`grpo_loss`.
        options: ``num_sequences``, ``weight``, ``mask``.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> dr_grpo_loss(x, x, torch.tensor([1.0, -3.0]), ids, max_completion_length=2)    # (-2 + 3) / 4
        tensor(0.2500)

    Source: arXiv 2503.20783. Its advantages are not divided by the group's standard deviation.
    """
    check_range("max_completion_length", max_completion_length, 0, math.inf, open_low=True)
    tokens = _tokens((logps, old_logps, advantages, sequence), options)
    losses = tokens.clipped(epsilon, epsilon_high, delta)
    return tokens.over_sequences(losses, per_token=False) / max_completion_length


def luspo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence: Tensor, epsilon: float = 0.2,
    epsilon_high: float | None = None, *, delta: float | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    r"""Length-unbiased: the mean over sequences of their summed clipped losses.

    Args:
        epsilon, epsilon_high: the clip below and above. delta: as in :func:`grpo_loss`.
        options: ``num_sequences``, ``weight``, ``mask``.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> luspo_loss(x, x, torch.tensor([1.0, -3.0]), ids)    # (-2 + 3) / 2
        tensor(0.5000)

    Source: as TRL 1.16 has it.
    """
    tokens = _tokens((logps, old_logps, advantages, sequence), options)
    return tokens.over_sequences(tokens.clipped(epsilon, epsilon_high, delta), per_token=False)


def gspo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence: Tensor, epsilon: float = 3e-4,
    epsilon_high: float | None = 4e-4, **options: Any,
) -> Tensor:  # fmt: skip
    r"""GSPO: one ratio for a sequence, the geometric mean of its tokens', clipped as a whole.

    .. math:: -\frac1S\sum_s\min(\rho_s A_s, \mathrm{clip}(\rho_s) A_s),\; \rho_s = e^{\frac1{|s|}\sum_t\log\rho_t}

    Args:
        epsilon, epsilon_high: a thousandth of PPO's: a mean of log-ratios moves little.
        options: ``num_sequences``, ``weight``, ``mask``. Advantages are averaged over a sequence.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> gspo_loss(x, x, torch.tensor([1.0, -3.0]), ids)
        tensor(1.)

    Source: arXiv 2507.18071 eq. 5 and 7.
    """
    check_range("epsilon", epsilon, 0.0, 1.0, open_low=True)
    tokens = _tokens((logps, old_logps, advantages, sequence), options)
    ratio, advantage = tokens.mean(tokens.log_ratio).exp(), tokens.mean(tokens.advantages)
    losses = clipped_surrogate(ratio, advantage, epsilon, epsilon if epsilon_high is None else epsilon_high)
    weights = None if tokens.weight is None else tokens.mean(tokens.weight)
    return reduce(losses if weights is None else losses * weights, mask=tokens.lengths > 0)


def gmpo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence: Tensor, epsilon: float = 0.4, **options: Any
) -> Tensor:
    r"""GMPO: the geometric mean of token ratios, each clipped in logarithm first.

    .. math:: -\frac1S\sum_s A_s \exp\Big(\frac{1}{|s|}\sum_t \mathrm{pess}_t\Big),\;
              \mathrm{pess}_t = \min \text{ or } \max \text{ (by the sign of A) of } \log\rho_t,
              \mathrm{clip}(\log\rho_t, -\epsilon, \epsilon)

    Args:
        epsilon: > 0, of the log-ratio. options: ``num_sequences``, ``weight``, ``mask``.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0, 0, 1])
        >>> gmpo_loss(x, x, torch.tensor([1.0, -3.0]), ids)
        tensor(1.)

    Source: arXiv 2507.20673.
    """
    check_range("epsilon", epsilon, 0.0, math.inf, open_low=True)
    tokens = _tokens((logps, old_logps, advantages, sequence), options)
    sign = tokens.advantages.sign()
    log_ratio = tokens.log_ratio
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-epsilon, epsilon))
    losses = -tokens.mean(pessimistic).exp() * tokens.mean(tokens.advantages)
    weights = None if tokens.weight is None else tokens.mean(tokens.weight)
    return reduce(losses if weights is None else losses * weights, mask=tokens.lengths > 0)


def cispo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence: Tensor, max_ratio: float = 5.0, **options: Any
) -> Tensor:
    r"""CISPO: the importance weight is clipped, not the update, so that no token loses its gradient.

    .. math:: -\frac1N\sum_t\mathrm{sg}(\min(\rho_t, \rho_{max}))\,A_t\log\pi(a_t)

    Args:
        max_ratio: > 0, the cap of the ratio *itself* (TRL's ``epsilon_high``; verl's is this minus 1).
        options: ``num_sequences``, ``weight``, ``mask``.
    Example:
        >>> x, ids = torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([0, 0, 1])
        >>> cispo_loss(x, x, torch.tensor([1.0, -3.0]), ids)    # (1 + 1 - 6) / 3
        tensor(-1.3333)

    Source: arXiv 2506.13585 eq. 4 and 5.
    """
    check_range("max_ratio", max_ratio, 0.0, math.inf, open_low=True)
    tokens = _tokens((logps, old_logps, advantages, sequence), options)
    ratio = tokens.log_ratio.detach().exp().clamp(max=max_ratio)
    return tokens.over_tokens(-ratio * tokens.advantages * tokens.logps)


def sapo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence: Tensor, temperature: float = 1.0,
    temperature_negative: float = 1.05, **options: Any,
) -> Tensor:  # fmt: skip
    r"""SAPO: a smooth gate around ratio 1 in place of the clip.

    .. math:: -\frac{4}{\tau}\sigma(\tau(\rho - 1)) A,\; \tau \text{ by the sign of A}

    Args:
        temperature, temperature_negative: > 0, tau for A > 0 and for A <= 0.
        options: ``num_sequences``, ``weight``, ``mask``.
    Example:
        >>> x, ids = torch.tensor([0.0, 0.0]), torch.tensor([0, 1])
        >>> sapo_loss(x, x, torch.tensor([1.0, 1.0]), ids)    # 4 sigmoid(0)
        tensor(-2.)

    Source: arXiv 2511.20347.
    """
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    check_range("temperature_negative", temperature_negative, 0.0, math.inf, open_low=True)
    tokens = _tokens((logps, old_logps, advantages, sequence), options)
    tau = torch.full_like(tokens.logps, temperature_negative).masked_fill(tokens.advantages > 0, temperature)
    gate = torch.sigmoid(tau * (tokens.log_ratio.exp() - 1)) * 4 / tau
    return tokens.over_sequences(-gate * tokens.advantages)


def reinforce_loss(
    logps: Tensor, old_logps: Tensor | None, advantages: Tensor, sequence: Tensor, **options: Any
) -> Tensor:  # fmt: skip
    r"""REINFORCE: the policy gradient itself, averaged over tokens; ``old_logps`` is not read.

    .. math:: -\frac1N\sum_t A_t\log\pi(a_t)

    Args:
        options: ``num_sequences``, ``weight``, ``mask``.
    Example:
        >>> reinforce_loss(torch.tensor([-1.0, -2.0]), None, torch.tensor([1.0, 3.0]), torch.tensor([0, 1]))
        tensor(3.5000)

    Source: Williams 1992.
    """
    tokens = _tokens((logps, logps.detach(), advantages, sequence), options)
    return tokens.over_tokens(-tokens.advantages * tokens.logps)


def rloo_loss(
    logps: Tensor, old_logps: Tensor | None, advantages: Tensor, sequence: Tensor, **options: Any
) -> Tensor:  # fmt: skip
    r"""REINFORCE on whole answers: the mean over sequences of advantage times summed log-prob.

    .. math:: -\frac1S\sum_s A_s\sum_{t\in s}\log\pi(a_t)

    Args:
        advantages: [S] from :func:`rloo_advantages`. options: ``num_sequences``, ``weight``, ``mask``.
    Example:
        >>> ids = torch.tensor([0, 0, 1])
        >>> rloo_loss(torch.tensor([-1.0, -2.0, -4.0]), None, torch.tensor([1.0, -1.0]), ids)    # (3 - 4) / 2
        tensor(-0.5000)

    Source: arXiv 2402.14740.
    """
    tokens = _tokens((logps, logps.detach(), advantages, sequence), options)
    return tokens.over_sequences(-tokens.advantages * tokens.logps, per_token=False)


def vespo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence: Tensor, k_pos: float = 2.0,
    lambda_pos: float = 3.0, k_neg: float = 3.0, lambda_neg: float = 2.0, **options: Any,
) -> Tensor:  # fmt: skip
    r"""VESPO: a smooth weight of the whole sequence's ratio in place of a clip, averaged over tokens.

    .. math:: -\frac1N\sum_t\mathrm{sg}(\phi(w_s))\,A_t\log\pi(a_t),\;
              \phi(w) = e^{\lambda(1 - w)} w^k,\; w_s = \prod_{t\in s}\rho_t

    Args:
        k_pos, lambda_pos: power and decay for A >= 0; k_neg, lambda_neg: for A < 0. All >= 0.
        options: ``num_sequences``, ``weight``, ``mask``.
    Example:
        >>> x, ids = torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([0, 0, 1])
        >>> vespo_loss(x, x, torch.tensor([1.0, -3.0]), ids)    # phi(1) = 1: (1 + 1 - 6) / 3
        tensor(-1.3333)

    Source: arXiv 2602.10693; log w is kept within [log 1e-8, 20], as TRL 1.16 has it.
    """
    for name, value in dict(k_pos=k_pos, lambda_pos=lambda_pos, k_neg=k_neg, lambda_neg=lambda_neg).items():
        check_range(name, value, 0.0, math.inf)
    tokens = _tokens((logps, old_logps, advantages, sequence), options)
    log_w = tokens.sum(tokens.log_ratio.detach()).clamp(math.log(1e-8), 20.0)[tokens.sequence]
    gains = tokens.advantages >= 0
    k = torch.full_like(log_w, k_neg).masked_fill(gains, k_pos)
    decay = torch.full_like(log_w, lambda_neg).masked_fill(gains, lambda_pos)
    phi = (decay + k * log_w - decay * log_w.exp()).exp()
    return tokens.over_tokens(-phi * tokens.advantages * tokens.logps)


POLICY_LOSSES: dict[str, Callable[..., Tensor]] = {
    "grpo": grpo_loss,
    "dr_grpo": dr_grpo_loss,
    "dapo": dapo_loss,
    "bnpo": bnpo_loss,
    "luspo": luspo_loss,
    "gspo": gspo_loss,
    "gmpo": gmpo_loss,
    "cispo": cispo_loss,
    "sapo": sapo_loss,
    "vespo": vespo_loss,
    "reinforce": reinforce_loss,
    "rloo": rloo_loss,
}
