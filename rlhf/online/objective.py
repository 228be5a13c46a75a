"""The objective of a policy on its own samples: a registered loss, and KL and entropy beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.logprobs import Scores
from rlhf.losses import POLICY_LOSSES, PolicyLoss, Tokens, arguments_of, kl_estimate


@dataclass(frozen=True)
class Objective:
    r"""A sum over samples, to be divided by :meth:`count` of the whole optimizer step.

    .. math:: \ell(\rho, A) + \beta\,\mathrm{KL} - c_H H

    Most losses are sums over tokens whose factors are known before: those are evaluated while the head's logits are in
    memory. The others couple the tokens of a sequence, which then stay together.

    Args:
        loss: of :data:`rlhf.losses.POLICY_LOSSES`.
        options: its hyper-parameters.
        beta: >= 0, weight of the KL to the reference in the loss.
        kl_estimator: of :func:`rlhf.losses.kl_estimate`; k1 and k3 are weighted by the ratio, with its gradient, k2 by
            the ratio without: each has the gradient of the KL.
        entropy_coef: >= 0, c_H.
        level: ``"sequence"`` gives each token the ratio of its sequence, the geometric mean of its tokens' (GSPO).
        off_policy_threshold: leave out a sequence of negative advantage whose log-probs fell by more than this a token.
    """

    loss: PolicyLoss
    options: Mapping[str, Any] = field(default_factory=dict)
    beta: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    level: str = "token"
    off_policy_threshold: float | None = None

    @property
    def is_coupled(self) -> bool:
        """Whether the loss of a token depends on the other tokens of its sequence."""
        # The ratio of a sequence and the fall of its log-probs are means over its tokens.
        return self.loss.coupled or self.level == "sequence" or self.off_policy_threshold is not None

    @property
    def clip(self) -> tuple[float, float] | None:
        """How far below and above 1 the ratio of a token counts; None where a loss clips something else, or nothing."""
        settings = {**self.loss.defaults, **self.options}
        if "epsilon" not in settings or self.loss.coupled or self.level == "sequence":
            return None
        clip_below, clip_above = settings["epsilon"], settings.get("epsilon_high")
        return clip_below, clip_below if clip_above is None else clip_above

    def count(self, lengths: tuple[int, ...]) -> int:
        """What the sum is divided by.

        Args:
            lengths: S numbers, the tokens that count in each sequence.
        Returns:
            Tokens that count, or sequences with such.
        """
        if self.loss.mean == "tokens":
            return sum(lengths)
        # A sequence without tokens in the loss must not make the mean smaller.
        return sum(length > 0 for length in lengths)

    def token_weights(
        self, lengths: tuple[int, ...], sequence: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:  # fmt: skip
        """The factor of each token's loss in the sum, before it is masked.

        Args:
            lengths: S numbers, the tokens that count in each sequence.
            sequence: int64 [N], the sequence of each token.
            dtype: of the result.
        Returns:
            [N].
        """
        # Of a mean over sequences, each token gets the share of one sequence that it is.
        if self.loss.mean == "sequences":
            # Counted on the device, as a copy from the host would wait for it.
            # Tokens that do not count are masked later.
            ones = torch.ones_like(sequence, dtype=dtype)
            return 1 / ones.new_zeros(len(lengths)).index_add(0, sequence, ones)[sequence]
        return torch.full((len(sequence),), 1 / self._constant_length, device=sequence.device, dtype=dtype)

    @property
    def _constant_length(self) -> int:
        """The length that dr_grpo divides by in place of each sequence's own, and so must KL, entropy and critic."""
        return self.options.get("max_completion_length", 1)

    def _policy_loss(self, tokens: Tokens, weight: Tensor, correction: Tensor) -> Tensor:
        # The term of dr_grpo is divided by its constant already.
        token_terms = self.loss.term(tokens, **self.options) * self._constant_length
        return (token_terms * weight * correction).sum()

    def token_loss(
        self, scores: Scores, advantages: Tensor, weight: Tensor, correction: Tensor, old: Tensor, ref: Tensor
    ) -> Tensor:
        """The summed loss of any tokens; of a loss that is not coupled.

        Args:
            scores: of c tokens under the policy.
            advantages: [c].
            weight: [c], the factor of each token, 0 where it does not count.
            correction: [c], an importance weight.
            old: [c], log-probs before the first step.
            ref: [c], log-probs under the reference.
        Returns:
            Scalar.
        """
        tokens = Tokens(scores.logps, old, advantages)
        return self._policy_loss(tokens, weight, correction) + self.kl_and_entropy(scores, weight, old, ref)

    def sequence_loss(
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
        """The summed loss of whole sequences; of any loss.

        Args:
            scores: of N tokens under the policy.
            advantages: [N].
            weight: [N], the factor of each token, 0 where it does not count.
            correction: [N], an importance weight.
            old: [N], log-probs before the first step.
            ref: [N], log-probs under the reference.
            sequence: int64 [N], the sequence of each token.
            lengths: S numbers, the tokens that count in each sequence.
        Returns:
            Scalar.
        """
        tokens = Tokens.of_sequences(scores.logps, old, advantages, sequence, len(lengths), mask=weight > 0)
        # A bad sequence that the policy has left since it was sampled is not pushed down further.
        if self.off_policy_threshold is not None:
            logp_drop = -tokens.spread(tokens.mean(tokens.logps - tokens.old_logps)).detach()
            is_stale = (logp_drop > self.off_policy_threshold) & (advantages < 0)
            correction = correction * ~is_stale
        if self.level == "sequence":
            tokens = tokens.with_sequence_ratios()
        return self._policy_loss(tokens, weight, correction) + self.kl_and_entropy(scores, weight, old, ref)

    def kl_and_entropy(self, scores: Scores, weight: Tensor, old: Tensor, ref: Tensor) -> Tensor:
        """The sums of KL and entropy, the terms added to the policy's loss.

        Args:
            scores: of c tokens under the policy.
            weight: [c], the factor of each token, 0 where it does not count.
            old: [c], log-probs before the first step.
            ref: [c], log-probs under the reference.
        Returns:
            Scalar.
        """
        total = scores.logps.new_zeros(())
        # The samples come from an older policy: the ratio gives the estimate the gradient of the KL of this one.
        if self.beta:
            # Advantages play no part in the ratio: any numbers will do.
            ratio = Tokens(scores.logps, old, old).ratio
            # The derivative of k2 is that of the KL by itself, so that its ratio is a constant weight.
            if self.kl_estimator == "k2":
                ratio = ratio.detach()
            kl = kl_estimate(scores.logps, ref, self.kl_estimator)
            total = total + self.beta * (weight * kl * ratio).sum()
        if self.entropy_coef and scores.entropy is not None:
            total = total - self.entropy_coef * (weight * scores.entropy).sum()
        return total


def make_objective(
    name: str,
    *,
    epsilon: float | None,
    epsilon_high: float | None,
    max_completion_length: int,
    loss_kwargs: dict[str, Any],
    delta: float | None = None,
    level: str = "token",
    **terms: Any,
) -> Objective:
    """An :class:`Objective` whose loss got the arguments that it takes.

    Args:
        name: of :data:`rlhf.losses.POLICY_LOSSES`, or ``file.py:name``.
        epsilon: the clip below 1; None for the loss's own default.
        epsilon_high: the clip above 1; None for the loss's own default.
        max_completion_length: tokens; for a loss that divides by it.
        loss_kwargs: further hyper-parameters of the loss.
        delta: the largest ratio; None for the loss's own default.
        level: ``"token"`` or ``"sequence"``.
        terms: the other fields of :class:`Objective`.
    Returns:
        The objective, its hyper-parameters checked.
    Raises:
        ValueError: an unknown loss, or options that it does not take.
    """
    loss = POLICY_LOSSES.find(name)
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be token or sequence, got {level!r}")
    # A loss without token ratios has nothing that the sequence's ratio could replace.
    if level == "sequence" and not loss.token_ratios:
        raise ValueError(f"loss_type {name} has no ratios of tokens: leave importance_sampling_level out")
    clip_options = {"epsilon": epsilon, "epsilon_high": epsilon_high, "delta": delta}
    chosen_options = {option: value for option, value in clip_options.items() if value is not None} | loss_kwargs
    for option in chosen_options:
        if option not in loss.hyper_parameters:
            accepted_names = ", ".join(loss.hyper_parameters) or "nothing"
            raise ValueError(f"loss_type {name} takes no {option}; it takes {accepted_names} (--loss_kwargs)")
    options = arguments_of(loss.term, {"max_completion_length": max_completion_length}) | chosen_options
    # The loss itself checks its hyper-parameters: here, rather than at the first step.
    one_token = torch.zeros(1)
    try:
        loss(one_token, one_token, one_token, torch.zeros(1, dtype=torch.int64), num_sequences=1, **options)
    except TypeError as error:
        raise ValueError(f"loss_type {name}: {error}") from error
    return Objective(loss, options, level=level, **terms)


def loss_of_tokens(
    objective: Objective,
    scores: Scores,
    advantages: Tensor,
    weight: Tensor,
    correction: Tensor,
    ref_logps: Tensor,
    old_logps: Tensor | None = None,
) -> Tensor:
    """:meth:`Objective.token_loss` with its columns in the order of a :class:`rlhf.logprobs.TokenLoss`.

    Args:
        objective: not coupled.
        scores: of c tokens under the policy.
        advantages: [c].
        weight: [c], the factor of each token, 0 where it does not count.
        correction: [c], an importance weight.
        ref_logps: [c], under the reference.
        old_logps: [c], before the first step; None where this is the first step.
    Returns:
        Scalar.
    """
    before = scores.logps.detach() if old_logps is None else old_logps
    return objective.token_loss(scores, advantages, weight, correction, before, ref_logps)
