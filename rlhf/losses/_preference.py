r"""Preference losses on summed log-probabilities of pairs, found by name in :data:`PREFERENCE_LOSSES`.

Every member is called as ``loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=..., **options)``:

* ``policy_chosen``, ``policy_rejected``: [S], nats, summed over completion tokens; carry gradient;
* ``ref_chosen``, ``ref_rejected``: [S], the same under the reference; constant. None where a loss reads none;
* ``beta``: > 0; unless the docstring differs, larger keeps the policy nearer to the reference;
* ``chosen_lengths``, ``rejected_lengths``: [S], completion tokens, where a loss names them;
* ``reduction``, ``weight``, ``mask``: as everywhere; weight and mask are [S], mask True counts.

It returns a scalar, or [S] for ``reduction="none"``; at least float32; 0 if nothing counts; and raises ValueError where
shapes differ or a hyper-parameter is out of range. A docstring holds only what is different. Notation:
:math:`s_w = \log\frac{\pi(y_w)}{\pi_{ref}(y_w)}`, :math:`s_l` likewise, :math:`\Delta = s_w - s_l`,
:math:`\ell(h) = -\log\sigma(h)`. To add a loss: one decorated function, one formula in the tests.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import update_wrapper, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_floating, check_range, check_same_shape
from rlhf.losses._reduction import SHARED_HELP, SHARED_OPTIONS, Reduction, document_options, hide, reduce
from rlhf.losses._suspicions import check_sum
from rlhf.losses.registry import Registry, arguments_of

# In the order of the call: the signatures of all losses are built from it.
SUMS = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
POLICY_SUMS = SUMS[:2]
LENGTHS = ("chosen_lengths", "rejected_lengths")
SUMS_HELP = {
    "policy_chosen": "[S], nats, summed over the tokens of the chosen completion; carries gradient.",
    "policy_rejected": "[S], the same of the rejected completion.",
    "ref_chosen": "[S], the chosen completion under the reference; constant.",
    "ref_rejected": "[S], the rejected completion under the reference; constant.",
}
COLUMN_HELP = {
    "chosen_lengths": "[S], tokens of the chosen completion.",
    "rejected_lengths": "[S], tokens of the rejected completion.",
    "margin": "[S] or a number, the wanted difference of the rewards.",
    "chosen_kl": "[S], nats, KL of the chosen completion to the reference.",
    "rejected_kl": "[S], nats, KL of the rejected completion to the reference.",
}


@dataclass(frozen=True)
class Pair:
    """Chosen and rejected completions, as a preference loss reads them.

    Args:
        columns: [S] each, by name: the four sums of log-probs, in nats, and what else the loss asked for, such as
            ``chosen_lengths`` or ``margin``. At least float32, and 0 where the mask is False.
        mask: [S] bool, True counts; None where all count.
    """

    columns: Mapping[str, Tensor | None]
    mask: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        value = self.columns.get(name)
        if value is None:
            # Only declared columns are checked, masked and passed on by trainers, so an undeclared one is never here.
            raise ValueError(f"this loss reads {name}, which was not given: name it where the loss is registered")
        return value

    def get(self, name: str, default: float) -> Tensor | float:
        """A column that may be absent, or ``default``."""
        value = self.columns.get(name)
        return default if value is None else value

    def has(self, *names: str) -> bool:
        """Whether all of these columns were given."""
        return all(self.columns.get(name) is not None for name in names)

    @property
    def chosen(self) -> Tensor:
        """Summed log-probs of the chosen completions under the policy, [S]."""
        return self["policy_chosen"]

    @property
    def rejected(self) -> Tensor:
        """Summed log-probs of the rejected completions under the policy, [S]."""
        return self["policy_rejected"]

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Log-ratios of policy to reference, chosen and rejected: ``(s_w, s_l)``, [S] each."""
        return self.chosen - self["ref_chosen"], self.rejected - self["ref_rejected"]

    def margin(self) -> Tensor:
        r"""How much more than the reference the policy prefers the chosen completion: :math:`\Delta`, [S]."""
        chosen_ratio, rejected_ratio = self.log_ratios()
        return chosen_ratio - rejected_ratio

    def chosen_per_token(self) -> Tensor:
        """Mean log-prob of a token of the chosen completion, [S]."""
        return per_token(self.chosen, self["chosen_lengths"])

    def rejected_per_token(self) -> Tensor:
        """Mean log-prob of a token of the rejected completion, [S]."""
        return per_token(self.rejected, self["rejected_lengths"])


class PreferenceLoss:
    """A loss of a :class:`Pair` in the form in which all of :data:`PREFERENCE_LOSSES` are called.

    Args:
        function: ``function(pair, beta, **hyper_parameters)`` gives the loss of each pair, [S].
        sums: which of the four sums it reads; the others are accepted and ignored.
        needs: further columns that must be given.
        optional: further columns that may be given.
        coupled: the loss of a pair depends on the other pairs of the batch; such a loss takes no ``weight``.
    """

    __name__: str

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        sums: Sequence[str] = SUMS,
        needs: Sequence[str] = (),
        optional: Sequence[str] = (),
        coupled: bool = False,
    ) -> None:
        update_wrapper(self, function)
        self.function = function
        self.sums, self.needs, self.optional, self.coupled = tuple(sums), tuple(needs), tuple(optional), coupled
        parameters = list(inspect.signature(function).parameters.values())
        if len(parameters) < 2 or parameters[1].name != "beta":
            raise ValueError(f"loss_type {self.__name__} must be a function (pair, beta, ...) of rlhf.losses.Pair")
        _, beta, *hyper_parameters = parameters
        # Each loss has its own: beta scales rewards in DPO (0.1) and SimPO (2), and is a margin in SLiC (1).
        self.default_beta = beta.default
        self.hyper_parameters = tuple(parameter.name for parameter in hyper_parameters)
        self.__signature__ = self._signature(beta, hyper_parameters)
        self.__doc__ = self._document(function.__doc__ or "")

    @property
    def columns(self) -> tuple[str, ...]:
        """The further columns that it reads."""
        return self.needs + self.optional

    def __call__(
        self,
        policy_chosen: Tensor,
        policy_rejected: Tensor | None = None,
        ref_chosen: Tensor | None = None,
        ref_rejected: Tensor | None = None,
        beta: float | None = None,
        *,
        reduction: Reduction = "mean",
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        beta = self.default_beta if beta is None else beta
        check_range("beta", beta, 0.0, math.inf, open_low=True)
        # In a coupled loss element i is a quantile of the batch, so the weight of pair i would go to another pair.
        if self.coupled and weight is not None:
            raise TypeError(f"{self.__name__} takes no weight: its values belong to no single pair")
        # What is left of the options after the columns are hyper-parameters.
        further_columns = {name: options.pop(name, None) for name in self.columns}
        self._check_options(options)
        all_sums = dict(zip(SUMS, (policy_chosen, policy_rejected, ref_chosen, ref_rejected), strict=True))
        # A mixture passes all four sums to each loss; the ones that a loss does not read are dropped unchecked.
        sums = {name: all_sums[name] for name in self.sums}
        self._check_columns(sums, further_columns)
        columns = {name: _hidden(name, value, mask) for name, value in (sums | further_columns).items()}
        pair_losses = self.function(Pair(columns, mask), beta, **options)
        if not torch.is_tensor(pair_losses):
            kind = type(pair_losses).__name__
            raise TypeError(f"{self.__name__} returns a {kind}; expected a tensor: the loss of each pair")
        check_sum(self.__name__, reduction, pair_losses.numel())
        return reduce(pair_losses, reduction, weight, mask)

    def _document(self, docstring: str) -> str:
        """The docstring of the function, with the parameters of the call instead of the pair."""
        sums_help = {name: help_text if name in self.sums else "not read." for name, help_text in SUMS_HELP.items()}
        docstring = document_options(docstring, sums_help, instead_of="pair")
        columns_help = {name: COLUMN_HELP.get(name, "[S], a column of the rows.") for name in self.columns}
        shared_help = {
            name: help_text for name, help_text in SHARED_HELP.items() if name in inspect.signature(self).parameters
        }
        return document_options(docstring, columns_help | shared_help)

    def _check_options(self, options: dict[str, Any]) -> None:
        for name in options:
            if name not in self.hyper_parameters:
                accepted = ", ".join((*self.hyper_parameters, *self.columns)) or "nothing besides beta"
                raise TypeError(f"{self.__name__} takes no {name}; it takes {accepted}")

    def _check_columns(self, sums: Mapping[str, Tensor | None], further: Mapping[str, Any]) -> None:
        for name, value in sums.items():
            # The commonest mistake gets its own message.
            if value is None and name.startswith("ref_"):
                raise ValueError("ref_chosen and ref_rejected are needed: this loss is relative to a reference")
            if value is None:
                raise TypeError(f"{self.__name__} needs {name}")
            check_floating(name, value)
        if missing_columns := [name for name in self.needs if further[name] is None]:
            raise TypeError(f"{self.__name__} needs {', '.join(missing_columns)}")
        check_same_shape(**sums)

    def _signature(
        self, beta: inspect.Parameter, hyper_parameters: list[inspect.Parameter]
    ) -> inspect.Signature:  # fmt: skip
        def parameter(name: str, kind: Any, required: bool) -> inspect.Parameter:
            default = inspect.Parameter.empty if required else None
            return inspect.Parameter(name, kind, default=default, annotation=Tensor if required else Tensor | None)

        # What follows a parameter with a default must have one too, whether the loss reads it or not.
        first_unread = next((index for index, name in enumerate(SUMS) if name not in self.sums), len(SUMS))
        positional_parameters = [
            parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, index < first_unread)
            for index, name in enumerate(SUMS)
        ]
        keyword_parameters = [
            parameter(name, inspect.Parameter.KEYWORD_ONLY, name in self.needs) for name in self.columns
        ]
        shared_options = [option for option in SHARED_OPTIONS if not (self.coupled and option.name == "weight")]
        parameters = [*positional_parameters, beta, *keyword_parameters, *hyper_parameters, *shared_options]
        return inspect.Signature(parameters, return_annotation=Tensor)


def _hidden(name: str, value: Any, mask: Tensor | None) -> Any:
    """A column with 0 where the mask is False; numbers and integer columns as they are."""
    # hide() takes floating point alone. Lengths are integers, and a number has no rows to hide.
    return hide(name, value, mask) if torch.is_tensor(value) and value.is_floating_point() else value


def _adapted(loss: Callable[..., Tensor]) -> PreferenceLoss:
    return loss if isinstance(loss, PreferenceLoss) else PreferenceLoss(loss)


PREFERENCE_LOSSES: Registry[PreferenceLoss] = Registry("loss_type", _adapted)
"""Preference losses by name. Filled by :func:`preference_loss`."""


def preference_loss(
    name: str,
    *,
    sums: Sequence[str] = SUMS,
    needs: Sequence[str] = (),
    optional: Sequence[str] = (),
    coupled: bool = False,
) -> Callable[[Callable[..., Tensor]], PreferenceLoss]:
    """Register a function of a :class:`Pair` as a preference loss.

    Args:
        name: its key in :data:`PREFERENCE_LOSSES`, and what ``--loss_type`` takes.
        sums: which of the four sums of log-probs it reads; the policy's two for a loss without a reference.
        needs: further columns [S] that it reads, such as ``margin``: a trainer passes them on from the data.
        optional: columns that it reads where they are given.
        coupled: the loss of a pair depends on the other pairs of the batch; such a loss takes no ``weight``.
    Returns:
        A decorator of ``loss(pair, beta=..., *, hyper_parameters)``, which returns the loss of each pair, [S].
    Example:
        >>> @preference_loss("squared", needs=("margin",))
        ... def squared_loss(pair, beta=0.1, *, power=2):
        ...     return (beta * pair.margin() - pair["margin"]) ** power
        >>> zeros = torch.zeros(1)
        >>> squared_loss(zeros + 10, zeros, zeros, zeros, margin=zeros + 3)
        tensor(4.)
        >>> del PREFERENCE_LOSSES["squared"]
    """

    def register(function: Callable[..., Tensor]) -> PreferenceLoss:
        loss = PreferenceLoss(function, sums=sums, needs=needs, optional=optional, coupled=coupled)
        PREFERENCE_LOSSES[name] = loss
        return loss

    return register


def logistic(logits: Tensor) -> Tensor:
    """The logistic loss, ``-log sigmoid(logits)``."""
    # The logarithm of a sigmoid would be -inf below logits of about -100.
    return -F.logsigmoid(logits)


def per_token(logps: Tensor, lengths: Tensor) -> Tensor:
    """Sums [S] divided by numbers of tokens [S]; an empty completion counts as one token."""
    check_same_shape(logps=logps, lengths=lengths)
    # The sum of an empty completion is 0, and 0 / 0 would be NaN.
    return logps / lengths.clamp(min=1)


def smoothed(loss: Callable[[Tensor], Tensor], logits: Tensor, label_smoothing: float) -> Tensor:
    """Expected loss when each pair is flipped with probability ``label_smoothing`` (cDPO note, eq. 3)."""
    # At 0.5 the labels hold no information; above it the flipped ones would be right.
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    # Returned early: 0 times an infinite loss of the flipped pair is NaN, and half of the work is saved.
    if label_smoothing == 0:
        return loss(logits)
    return (1 - label_smoothing) * loss(logits) + label_smoothing * loss(-logits)


_INDEX_FORM = ("policy_logps", "ref_logps", "yw_idx", "yl_idx")


def _accepts_indices(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn a call in the paper's index form into the paired form; pass any other call on."""

    @wraps(loss)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        by_position = dict(zip(_INDEX_FORM, args, strict=False))
        by_name = {name: kwargs[name] for name in _INDEX_FORM if name in kwargs}
        index_form = by_position | by_name
        chosen, rejected = index_form.get("yw_idx"), index_form.get("yl_idx")
        # Only indices are integers: in the paired form this place holds the reference's log-probs.
        if len(index_form) < 4 or not torch.is_tensor(chosen) or chosen.is_floating_point():
            return loss(*args, **kwargs)
        policy_logps, ref_logps = index_form["policy_logps"], index_form["ref_logps"]
        check_same_shape(policy_logps=policy_logps, ref_logps=ref_logps)
        other_options = {name: value for name, value in kwargs.items() if name not in _INDEX_FORM}
        sums = (policy_logps[chosen], policy_logps[rejected], ref_logps[chosen], ref_logps[rejected])
        return loss(*sums, *args[4:], **other_options)

    return call


@_accepts_indices
def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    loss_type: str | Callable[..., Tensor] | Sequence[str | Callable[..., Tensor]] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    **options: Any,
) -> Tensor:
    """A preference loss by name, or a weighted sum of several.

    It is called in one of two forms:

    * pairs: ``dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1)``, each [S];
    * indices, as the DPO paper prints it: ``dpo_loss(policy_logps, ref_logps, yw_idx, yl_idx, beta=0.1)``, where
      ``policy_logps`` and ``ref_logps`` are [B], and the integers ``yw_idx[i]``, ``yl_idx[i]`` are the rows of the
      chosen and the rejected completion of pair i. (The paper's snippet also returns the rewards; they are
      ``beta * (policy_logps - ref_logps)``.)

    Args:
        policy_chosen: [S], nats, summed over the tokens of the chosen completion; carries gradient.
        policy_rejected: [S], the same of the rejected completion.
        ref_chosen: [S], the chosen completion under the reference; constant.
        ref_rejected: [S], the rejected completion under the reference; constant.
        beta: > 0; larger keeps the policy nearer to the reference.
        loss_type: a key of :data:`PREFERENCE_LOSSES`, a callable, or ``file.py:name``; or several: MPO is
            ``["sigmoid", "bco_pair", "sft"]``.
        loss_weights: one weight for each of several, default 1; MPO's are ``[0.8, 0.2, 1.0]``.
        options: what the losses take: ``label_smoothing``, ``chosen_lengths``, ``reduction``, ``weight``, ``mask``, …
            Each of several losses gets the arguments that it names.
    Returns:
        Scalar, or [S] for ``reduction="none"``.
    Raises:
        ValueError: unknown ``loss_type``, another number of weights than of losses, or what the loss itself raises.
        TypeError: an argument that none of the losses takes.
    Example:
        >>> logps = torch.tensor([-5.0, -7.0, -4.0, -9.0])
        >>> dpo_loss(logps, logps, torch.tensor([0, 2]), torch.tensor([1, 3]))    # policy = reference
        tensor(0.6931)

    Source: arXiv 2305.18290, eq. 7 and appendix B; mixtures: MPO, arXiv 2411.10442.
    """
    given_losses = [loss_type] if isinstance(loss_type, str) or callable(loss_type) else list(loss_type)
    loss_names = [PREFERENCE_LOSSES.name_of(loss) for loss in given_losses]
    weights = [1.0] * len(loss_names) if loss_weights is None else list(loss_weights)
    if len(weights) != len(loss_names) or not loss_names:
        raise ValueError(f"loss_weights must have one entry for each of {loss_names}, got {weights}")
    losses = [PREFERENCE_LOSSES.find(name) for name in loss_names]
    sums = (policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    # A single loss checks its options itself, with an error that lists what it takes.
    if len(losses) == 1:
        return weights[0] * losses[0](*sums, **options)
    # The losses of a mixture take different options, so each gets its own; one that none of them takes is a mistake.
    options_of_losses = [arguments_of(loss, options) for loss in losses]
    if unknown := sorted(set(options).difference(*options_of_losses)):
        raise TypeError(f"none of {', '.join(loss_names)} takes {', '.join(unknown)}; {_what_they_take(loss_names)}")
    weighted_losses = [
        loss_weight * loss(*sums, **loss_options)
        for loss_weight, loss, loss_options in zip(weights, losses, options_of_losses, strict=True)
    ]
    return torch.stack(weighted_losses).sum(0)


def _what_they_take(names: Sequence[str]) -> str:
    losses = {name: PREFERENCE_LOSSES.find(name) for name in names}
    return "; ".join(
        f"{name} takes {', '.join((*loss.hyper_parameters, *loss.columns)) or 'nothing besides beta'}"
        for name, loss in losses.items()
    )
