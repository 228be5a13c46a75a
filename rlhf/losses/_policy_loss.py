r"""Policy-gradient losses: a term for each token, and how the terms are averaged.

Every member of :data:`POLICY_LOSSES` is called as ``loss(logps, old_logps, advantages, sequence, ...)``:

* ``logps``: [N], nats, of the tokens that the policy sampled; carry gradient;
* ``old_logps``: [N], the same at sampling time; None where the policy that sampled is this one;
* ``advantages``: [N], or [S]: one for each sequence, spread over its tokens; constant;
* ``sequence``: int64 [N] in [0, S), the sequence of each token (``Targets.sequence``);
* ``num_sequences``: S; by default the largest sequence + 1;
* ``mask``: [N], True counts;
* ``weight``: [N], a factor on each token's loss, for instance :func:`truncated_importance_weights`; the divisor stays
  the number of tokens or sequences;
* ``ref_logps``, ``beta``: [N], nats, and >= 0: adds ``beta`` times :func:`kl_estimate` k3 to each token's loss.

It returns a scalar, at least float32; 0 if nothing counts. A loss that is a mean over sequences divides by those with a
token that counts. ValueError: shapes do not fit, or a hyper-parameter is out of range. The *value* of these losses
has little meaning (it is 0 on the first step with centred advantages); only the gradient matters. Notation:
:math:`\rho_t = \pi(a_t)/\pi_{old}(a_t)`; log-ratios stop at ±20.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import update_wrapper
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rlhf.losses._checks import check_floating, check_same_shape, check_tensors
from rlhf.losses._policy import MAX_LOG_RATIO, clamped_log_ratio, kl_estimate
from rlhf.losses._reduction import document_options, reduce, upcast
from rlhf.losses.registry import Registry

TENSORS_HELP = {
    "logps": "[N], nats, of the tokens that the policy sampled; carries gradient.",
    "old_logps": "[N], nats, at sampling time; None where the policy that sampled is this one.",
    "advantages": "[N], or [S]: one for each sequence; constant.",
    "sequence": "int64 [N] in [0, S), the sequence of each token.",
}
OPTIONS_HELP = {
    "ref_logps": "[N], nats, under the reference.",
    "beta": ">= 0, weight of the KL to the reference (k3) in each token's loss.",
    "num_sequences": "S; by default the largest sequence + 1.",
    "weight": "[N], a factor on each token's loss; the divisor of the mean stays.",
    "mask": "[N] bool, True counts.",
}
Mean = Literal["tokens", "sequences", "sums"]
"""How terms are averaged: over tokens; over sequences, of the means over their tokens; over sequences, of the sums."""


# eq=False: equality of two tensors is a tensor, so that a comparison of fields would raise.
@dataclass(frozen=True, eq=False)
class Tokens:
    """Sampled tokens, as a policy loss reads them. What the mask hides is 0.

    Args:
        logps: [N], nats, under the policy; carry gradient.
        old_logps: [N], nats, under the policy that sampled.
        advantages: [N].
        sequence: int64 [N], the sequence of each; None where the tokens are a part of their sequences.
        num_sequences: S.
        mask: bool [N], True counts.
        sequence_log_ratio: [N], that of its sequence, where it stands for a token's own.
    """

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    sequence: Tensor | None = None
    num_sequences: int = 0
    mask: Tensor | None = None
    sequence_log_ratio: Tensor | None = None

    @classmethod
    def of_sequences(
        cls,
        logps: Tensor,
        old_logps: Tensor | None,
        advantages: Tensor,
        sequence: Tensor,
        num_sequences: int | None = None,
        mask: Tensor | None = None,
    ) -> "Tokens":
        """Checked tokens of whole sequences.

        Args:
            logps: [N], nats.
            old_logps: [N], nats; None where the policy that sampled is this one.
            advantages: [N], or [S]: one for each sequence.
            sequence: int64 [N] in [0, S).
            num_sequences: S; by default the largest sequence + 1.
            mask: [N], True counts.
        Returns:
            Tokens in at least float32, 0 where the mask is False.
        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        check_tensors(logps=logps, advantages=advantages, sequence=sequence)
        if logps.dim() != 1 or sequence.is_floating_point():
            raise ValueError(
                f"logps must be flat [N] with integer sequence ids, got {tuple(logps.shape)} and {sequence.dtype}: "
                "select the tokens that count (logps[mask]) and number their rows"
            )
        # In the first step after sampling the ratio is 1, but its gradient is not 0.
        old_logps = logps.detach() if old_logps is None else old_logps
        check_same_shape(logps=logps, old_logps=old_logps, sequence=sequence, mask=mask)
        if num_sequences is None:
            # Reading the largest id waits for an accelerator; pass num_sequences to avoid that.
            num_sequences = int(sequence.max()) + 1 if sequence.numel() else 0
        # One advantage for each sequence; where S = N, a sequence is a token anyway.
        if advantages.shape == (num_sequences,) != logps.shape:
            advantages = advantages[sequence]
        check_same_shape(logps=logps, advantages=advantages)
        # Where hidden tokens are 0 on all sides, their ratio is 1 and their loss 0, whatever NaN they held.
        visible = torch.ones_like(sequence, dtype=torch.bool) if mask is None else mask.bool()

        def prepared(name: str, values: Tensor) -> Tensor:
            check_floating(name, values)
            return torch.where(visible, upcast(values), 0.0)

        return cls(
            prepared("logps", logps),
            prepared("old_logps", old_logps),
            prepared("advantages", advantages),
            sequence,
            num_sequences,
            visible,
        )

    @property
    def log_ratio(self) -> Tensor:
        """``logps - old_logps`` within ±20, [N]; with :meth:`with_sequence_ratios`, the mean over the sequence."""
        if self.sequence_log_ratio is not None:
            return self.sequence_log_ratio
        return clamped_log_ratio(self.logps, self.old_logps)

    @property
    def ratio(self) -> Tensor:
        """How much likelier each token is than when it was sampled, [N]."""
        return self.log_ratio.exp()

    @property
    def lengths(self) -> Tensor:
        """Tokens that count in each sequence, [S]."""
        return self.sum(torch.ones_like(self.logps))

    def sum(self, values: Tensor) -> Tensor:
        """Over the tokens of each sequence that count, [N] to [S]."""
        visible = values if self.mask is None else torch.where(self.mask, values, 0.0)
        return values.new_zeros(self.num_sequences).index_add(0, self._whole_sequences(), visible)

    def mean(self, values: Tensor) -> Tensor:
        """Over the tokens of each sequence that count, [N] to [S]."""
        # A sequence with all of its tokens hidden has the sum 0, and 0 / 1 is no NaN.
        return self.sum(values) / self.lengths.clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """A number of each sequence at all of its tokens, [S] to [N]."""
        return values[self._whole_sequences()]

    def with_sequence_ratios(self) -> "Tokens":
        """The same with one ratio for all tokens of a sequence: the geometric mean of theirs (GSPO)."""
        # Clamped after the mean: it is the mean that is exponentiated.
        mean_log_ratio = self.mean(self.logps - self.old_logps)
        return replace(self, sequence_log_ratio=self.spread(mean_log_ratio).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))

    def _whole_sequences(self) -> Tensor:
        # A loss that is not coupled is evaluated on chunks of tokens, which cut through sequences.
        if self.sequence is None:
            raise ValueError("this loss reads whole sequences: register it with policy_loss(..., coupled=True)")
        return self.sequence


class PolicyLoss:
    """A loss of :class:`Tokens` in the form in which all of :data:`POLICY_LOSSES` are called.

    Args:
        term: ``term(tokens, **hyper_parameters)`` gives the loss of each token, [N].
        mean: how terms are averaged.
        coupled: the term of a token depends on the other tokens of its sequence.
        token_ratios: the term reads a ratio for each token, for which that of its sequence can stand.
    """

    __name__: str

    def __init__(
        self, term: Callable[..., Tensor], mean: Mean, *, coupled: bool = False, token_ratios: bool = True
    ) -> None:
        if mean not in get_args(Mean):
            raise ValueError(f"mean must be one of {', '.join(get_args(Mean))}, got {mean!r}")
        update_wrapper(self, term)
        self.term, self.mean, self.coupled, self.token_ratios = term, mean, coupled, token_ratios
        # Without the tokens: the call makes them from the tensors that it gets.
        loss_parameters = list(inspect.signature(term).parameters.values())[1:]
        self.defaults = {parameter.name: parameter.default for parameter in loss_parameters}
        self.__signature__ = _signature(loss_parameters)
        docstring = document_options(term.__doc__ or "", TENSORS_HELP, instead_of="tokens")
        self.__doc__ = document_options(docstring, OPTIONS_HELP)

    @property
    def hyper_parameters(self) -> tuple[str, ...]:
        """The names of its own arguments, in order."""
        return tuple(self.defaults)

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise TypeError for a name that is no hyper-parameter of this loss."""
        for name in options:
            if name not in self.defaults:
                accepted = ", ".join(self.defaults) or "nothing"
                raise TypeError(f"unknown argument {name!r}: {self.__name__} takes {accepted}")

    def __call__(
        self,
        logps: Tensor,
        old_logps: Tensor | None,
        advantages: Tensor,
        sequence: Tensor,
        *positional: Any,
        ref_logps: Tensor | None = None,
        beta: float = 0.0,
        num_sequences: int | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        # Hyper-parameters may follow the tensors by position, as in the formula of a paper.
        options |= dict(zip(self.hyper_parameters, positional, strict=False))
        self.check_options(options)
        tokens = Tokens.of_sequences(logps, old_logps, advantages, sequence, num_sequences, mask)
        check_same_shape(logps=logps, weight=weight, ref_logps=ref_logps)
        token_losses = self.term(tokens, **options)
        # k3 is what GRPO and TRL use, although as a loss its gradient is that of the forward KL.
        if beta and ref_logps is not None:
            # Hidden places are 0 on both sides, and so is their KL, whatever the reference holds there.
            visible_ref = torch.where(tokens.mask, ref_logps, 0.0) if tokens.mask is not None else ref_logps
            token_losses = token_losses + beta * kl_estimate(tokens.logps, visible_ref, "k3")
        if weight is not None:
            # The KL term is weighted too. The trainer and TRL add the KL after the weight.
            token_losses = token_losses * weight
        return self._average(token_losses, tokens)

    def _average(self, losses: Tensor, tokens: Tokens) -> Tensor:
        match self.mean:
            case "tokens":
                return reduce(losses, mask=tokens.mask)
            case "sequences":
                by_sequence = tokens.mean(losses)
            # Dr. GRPO is such a mean: its term holds the constant divisor.
            case "sums":
                by_sequence = tokens.sum(losses)
        # A sequence without a token that counts is not one of those that the mean is over.
        return reduce(by_sequence, mask=tokens.lengths > 0)


def _signature(own: list[inspect.Parameter]) -> inspect.Signature:
    """That of the call: the tensors, the loss's own arguments, and what all losses take."""
    # Without self; *positional is left out, as the hyper-parameters stand there by name.
    call_parameters = list(inspect.signature(PolicyLoss.__call__).parameters.values())[1:]
    tensors = [parameter for parameter in call_parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    options = [parameter for parameter in call_parameters if parameter.kind is parameter.KEYWORD_ONLY]
    return inspect.Signature([*tensors, *own, *options], return_annotation=Tensor)


def _registered(loss: Any) -> PolicyLoss:
    if isinstance(loss, PolicyLoss):
        return loss
    # A bare function does not tell how its terms are averaged, and a wrong guess would train without an error.
    name = getattr(loss, "__name__", repr(loss))
    raise ValueError(
        f"loss_type {name} is not registered: decorate it with @policy_loss({name!r}, mean=...), which decides how the "
        f"losses of tokens are averaged ({', '.join(get_args(Mean))})"
    )


POLICY_LOSSES: Registry[PolicyLoss] = Registry("loss_type", _registered)
"""Policy-gradient losses by name. Filled by :func:`policy_loss`."""


def policy_loss(
    name: str, *, mean: Mean, coupled: bool = False, token_ratios: bool = True
) -> Callable[[Callable[..., Tensor]], PolicyLoss]:
    """Register a function of :class:`Tokens` as a policy-gradient loss.

    Args:
        name: its key in :data:`POLICY_LOSSES`, and what ``--loss_type`` takes.
        mean: how terms are averaged: ``"tokens"`` over all tokens, ``"sequences"`` over sequences the means over their
            tokens, ``"sums"`` over sequences the sums over their tokens.
        coupled: the term of a token depends on the other tokens of its sequence, so that sequences stay whole.
            Otherwise a trainer evaluates terms in chunks, while the logits of a chunk are in memory.
        token_ratios: the term reads a ratio for each token. False refuses ``importance_sampling_level="sequence"``.
    Returns:
        A decorator of ``term(tokens, ..., *, hyper_parameters)``, which returns the loss of each token, [N].
    Example:
        >>> @policy_loss("squared", mean="tokens")
        ... def squared_loss(tokens, scale=1.0):
        ...     return -tokens.ratio * tokens.advantages + scale * tokens.log_ratio**2
        >>> zeros, ids = torch.zeros(2), torch.tensor([0, 1])
        >>> squared_loss(zeros, zeros, torch.tensor([1.0, 2.0]), ids)
        tensor(-1.5000)
        >>> del POLICY_LOSSES["squared"]
    """

    def register(term: Callable[..., Tensor]) -> PolicyLoss:
        loss = PolicyLoss(term, mean, coupled=coupled, token_ratios=token_ratios)
        POLICY_LOSSES[name] = loss
        return loss

    return register
