"""The objective of a policy on its own samples: a loss of the catalogue by name, KL and entropy beside it."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.logprobs import Scores
from rlhf.losses import POLICY_LOSSES, arguments_of, kl_estimate, ppo_loss


def _ppo(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence: Tensor, epsilon: float = 0.2,
    epsilon_high: float | None = None, *, num_sequences: int | None = None, mask: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """PPO's loss in the form of :data:`POLICY_LOSSES`: the mean over tokens."""
    clip = dict(clip_ratio=epsilon, clip_ratio_high=epsilon_high)
    total = ppo_loss(logps, old_logps, advantages, reduction="sum", mask=mask, **clip, **options)
    return total / (max(len(logps), 1) if mask is None else mask.sum().clamp(min=1))


LOSSES: dict[str, Callable[..., Tensor]] = {"ppo": _ppo, **POLICY_LOSSES}

# What a loss averages over; a name that is missing is coupled over a sequence, and a mean over sequences.
Mean = Literal["tokens", "sequences", "sums", "coupled"]
_MEANS: dict[str, Mean] = {
    **dict.fromkeys(("ppo", "bnpo", "dapo", "cispo", "reinforce", "vespo"), "tokens"),
    **dict.fromkeys(("grpo", "sapo"), "sequences"),  # of the means over their tokens
    **dict.fromkeys(("dr_grpo", "luspo", "rloo"), "sums"),  # over sequences, of sums over their tokens
}

_COUPLED = ("gspo", "gmpo", "vespo")  # read all tokens of a sequence for the loss of each
_WITHOUT_TOKEN_RATIOS = ("gmpo", "vespo", "reinforce", "rloo")
TOKEN_SUMS = ("ppo", "bnpo", "dapo", "cispo", "dr_grpo")  # a longer sequence has more terms in them


class Objective(NamedTuple):
    r"""A sum over samples, to be divided by :meth:`count` of the whole optimizer step.

    .. math:: \ell(\rho, A) + \beta\,\mathrm{KL} - c_H H

    Most losses are sums over tokens whose factors are known before: those are evaluated while the head's logits live.
    The others (gspo, gmpo) couple the tokens of a sequence.

    Args:
        name: of :data:`LOSSES`. options: its own hyper-parameters.
        beta: weight of the KL to the reference in the loss. kl_estimator: of :func:`rlhf.losses.kl_estimate`; k1 and k3
            are weighted by the ratio, with its gradient, k2 by the ratio without: each has the gradient of the KL.
        entropy_coef: c_H.
        level: ``"sequence"`` gives each token the ratio of its sequence, the geometric mean of its tokens' (GSPO).
        off_policy_threshold: leave out a sequence of negative advantage whose log-probs fell by more than this a token.
    """

    name: str
    options: dict[str, Any]
    beta: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    level: str = "token"
    off_policy_threshold: float | None = None

    @property
    def is_coupled(self) -> bool:
        """Whether the loss of a token depends on the other tokens of its sequence."""
        return self.name in _COUPLED or self.level == "sequence" or self.off_policy_threshold is not None

    @property
    def mean(self) -> Mean:
        return _MEANS.get(self.name, "coupled")

    @property
    def clip(self) -> tuple[float, float] | None:
        """How far below and above 1 the ratio of a token counts; None where a loss clips something else, or nothing."""
        if self.name not in ("ppo", "grpo", "dr_grpo", "dapo", "bnpo", "luspo") or self.level == "sequence":
            return None
        taken = inspect.signature(LOSSES[self.name]).parameters
        low = self.options.get("epsilon", taken["epsilon"].default)
        high = self.options.get("epsilon_high", taken["epsilon_high"].default if "epsilon_high" in taken else None)
        return low, low if high is None else high

    def count(self, lengths: tuple[int, ...]) -> int:
        """What the sum is divided by: tokens that count, or sequences with such."""
        return sum(lengths) if self.mean == "tokens" else sum(length > 0 for length in lengths)

    def token_weights(self, lengths: tuple[int, ...], sequence: Tensor, dtype: Any = torch.float32) -> Tensor:
        """The factor of each token's loss in the sum, [N], before it is masked."""
        counted = torch.tensor(lengths, device=sequence.device, dtype=dtype)[sequence]
        if self.mean == "tokens":
            return torch.ones_like(counted)
        if self.mean == "sums":  # dr_grpo divides by its constant itself, and so must KL and entropy
            return torch.full_like(counted, 1 / self.options.get("max_completion_length", 1))
        return 1 / counted.clamp(min=1)

    def local(
        self, scores: Scores, advantages: Tensor, weight: Tensor, correction: Tensor, old: Tensor, ref: Tensor
    ) -> Tensor:
        """The summed loss of any tokens, [c] each; of a loss that is a sum over tokens.

        Args:
            weight: the factor of each token, 0 where it does not count. correction: an importance weight.
            old: log-probs before the first step. ref: those of the reference.
        """
        count = len(weight)
        each = torch.arange(count, device=weight.device)
        scale = self.options.get("max_completion_length", 1) if self.mean == "sums" else 1
        policy = LOSSES[self.name](
            scores.logps, old, advantages, each,
            num_sequences=count, weight=weight * correction * scale, **self.options,
        )  # fmt: skip
        return policy * count + self.beside(scores, weight, old, ref)

    def coupled(
        self,
        scores: Scores,
        advantages: Tensor,
        weight: Tensor,
        correction: Tensor,
        old: Tensor,
        ref: Tensor,
        sequence: Tensor,
        lengths: tuple[int, ...],
    ) -> Tensor:
        """The same for a loss that is not, of whole sequences."""
        counted, size = weight > 0, len(lengths)
        logps, before = scores.logps, old
        log_ratio = torch.where(counted, logps - old, 0.0)
        shift = _mean_of_sequences(log_ratio, counted, sequence, size)[sequence]
        if self.off_policy_threshold is not None:
            correction = correction * ~((-shift.detach() > self.off_policy_threshold) & (advantages < 0))
        if self.level == "sequence":
            # cispo reads log-probs besides their ratio, and holds the ratio constant
            logps, before = (logps, logps.detach() - shift.detach()) if self.name == "cispo" else (old + shift, old)
        policy = LOSSES[self.name](
            logps, before, advantages, sequence,
            num_sequences=size, weight=correction, mask=counted, **self.options,
        )  # fmt: skip
        return policy * self.count(lengths) + self.beside(scores, weight, old, ref)

    def beside(self, scores: Scores, weight: Tensor, old: Tensor, ref: Tensor) -> Tensor:
        """KL and entropy: [c]-weighted sums."""
        total = scores.logps.new_zeros(())
        if self.beta:
            kl = kl_estimate(scores.logps, ref, self.kl_estimator)
            ratio = (scores.logps - old).clamp(-20, 20).exp()
            total = total + self.beta * (weight * kl * (ratio.detach() if self.kl_estimator == "k2" else ratio)).sum()
        if self.entropy_coef and scores.entropy is not None:
            total = total - self.entropy_coef * (weight * scores.entropy).sum()
        return total


def _mean_of_sequences(values: Tensor, counted: Tensor, sequence: Tensor, size: int) -> Tensor:
    """Over the tokens of each sequence that count, [S]."""
    sums = values.new_zeros(size).index_add(0, sequence, torch.where(counted, values, 0.0))
    return sums / values.new_zeros(size).index_add(0, sequence, counted.to(values.dtype)).clamp(min=1)


def make_objective(
    name: str,
    *,
    epsilon: float | None,
    epsilon_high: float | None,
    max_completion_length: int,
    loss_kwargs: dict[str, Any],
    delta: float | None = None,
    level: str = "token",
    **beside: Any,
) -> Objective:
    """An :class:`Objective` whose loss got what it takes of these; its own defaults for what is None.

    Raises:
        ValueError: an unknown loss, or options that it does not take.
    """
    if name not in LOSSES:
        raise ValueError(f"loss_type {name!r} is unknown: one of {', '.join(LOSSES)}")
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be token or sequence, got {level!r}")
    if level == "sequence" and name in _WITHOUT_TOKEN_RATIOS:
        raise ValueError(f"loss_type {name} has no ratios of tokens: leave importance_sampling_level out")
    given: dict[str, Any] = dict(epsilon=epsilon, epsilon_high=epsilon_high, delta=delta)
    given["max_completion_length"] = max_completion_length
    offered = {key: value for key, value in given.items() if value is not None}
    taken = arguments_of(LOSSES[name], offered)
    for key in offered.keys() - taken.keys() - {"max_completion_length"}:
        own = [key for key in list(inspect.signature(LOSSES[name]).parameters)[4:] if key != "options"]
        raise ValueError(f"loss_type {name} takes no {key}; it takes {', '.join(own) or 'nothing'} (--loss_kwargs)")
    options = taken | loss_kwargs
    objective = Objective(name, options, level=level, **beside)
    one, sequence = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    try:  # the loss itself checks its hyper-parameters, now rather than at the first step
        LOSSES[name](one, one, one, sequence, num_sequences=1, **options)
    except TypeError as error:
        raise ValueError(f"loss_type {name}: {error}") from error
    return objective
