r"""Preference losses on summed log-probabilities of pairs, found by name in :data:`PREFERENCE_LOSSES`.

Every member is called as ``loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=..., **own)`` on [S]
tensors in nats. With :math:`\Delta = (c - c_{ref}) - (r - r_{ref})`, the margin of the implicit rewards is
:math:`\beta\Delta`. To add a loss: one function, one entry in the dict, one test.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_floating, check_range, check_same_shape
from rlhf.losses._reduction import Reduction, reduce, upcast


def _smoothed(loss: Callable[[Tensor], Tensor], margin: Tensor, label_smoothing: float) -> Tensor:
    """Expected loss when each pair is flipped with probability ``label_smoothing`` (cDPO note, eq. 3)."""
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    if label_smoothing == 0:
        return loss(margin)
    return (1 - label_smoothing) * loss(margin) + label_smoothing * loss(-margin)


def _log_ratio_margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    named = dict(
        policy_chosen=chosen, policy_rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )  # fmt: skip
    check_same_shape(**named)
    for name, value in named.items():
        check_floating(name, value)
    return (upcast(chosen) - upcast(ref_chosen)) - (upcast(rejected) - upcast(ref_rejected))


def sigmoid_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""DPO: favour the chosen completion over the rejected one, relative to a reference.

    .. math:: -(1-\epsilon)\log\sigma(\beta\Delta) - \epsilon\log\sigma(-\beta\Delta)

    Args:
        policy_chosen, policy_rejected: [S], nats, summed over completion tokens; carry gradient.
        ref_chosen, ref_rejected: [S], same under the reference; constant.
        beta: > 0; larger stays nearer the reference.
        label_smoothing: chance that a pair is flipped, in [0, 0.5).
        reduction, weight, mask: as everywhere; weight and mask are [S], mask True counts.
    Returns:
        Scalar, or [S] for ``"none"``; at least fp32; 0 if nothing counts. log 2 where policy = reference.
    Raises:
        ValueError: shapes differ, ``beta <= 0``, or smoothing out of range.
    Example:
        >>> z = torch.zeros(2)
        >>> sigmoid_loss(z, z, z, z)
        tensor(0.6931)

    Source: arXiv 2305.18290 eq. 7; cDPO note eq. 3. Differs from TRL, whose ``sigmoid`` ignores label smoothing.
    """
    check_range("beta", beta, 0.0, float("inf"), open_low=True)
    margin = beta * _log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return reduce(_smoothed(lambda h: -F.logsigmoid(h), margin, label_smoothing), reduction, weight, mask)


def hinge_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Hinge on the margin of the implicit rewards: no gradient once a pair is apart by ``1 / beta`` nats.

    .. math:: \max(0, 1 - \beta\Delta)

    Arguments, returns and errors as in :func:`sigmoid_loss`; 1 where policy = reference.

    Source: SLiC-HF, arXiv 2305.10425; on log-ratios in RSO, arXiv 2309.06657.
    """
    check_range("beta", beta, 0.0, float("inf"), open_low=True)
    margin = beta * _log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return reduce(_smoothed(lambda h: F.relu(1 - h), margin, label_smoothing), reduction, weight, mask)


def ipo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""IPO: pull the log-ratio margin to ``1 / (2 beta)`` instead of to infinity.

    .. math:: (\Delta - \tfrac{1}{2\beta})^2

    Args:
        chosen_lengths, rejected_lengths: [S] scored tokens. Given both, log-probabilities are averaged over them
            first, as the authors advise and as TRL and our ``DPOTrainer`` do; without them, the paper's sums.
        The others: as in :func:`sigmoid_loss`. ``beta`` is the paper's tau.
    Returns, Raises:
        As in :func:`sigmoid_loss`; ``1 / (4 beta**2)`` where policy = reference.

    Source: arXiv 2310.12036 eq. 17.
    """
    check_range("beta", beta, 0.0, float("inf"), open_low=True)
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("chosen_lengths and rejected_lengths go together: pass both or neither")
    if chosen_lengths is not None and rejected_lengths is not None:
        check_same_shape(policy_chosen=policy_chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
        of_chosen, of_rejected = chosen_lengths.clamp(min=1), rejected_lengths.clamp(min=1)
        policy_chosen, ref_chosen = upcast(policy_chosen) / of_chosen, upcast(ref_chosen) / of_chosen
        policy_rejected, ref_rejected = upcast(policy_rejected) / of_rejected, upcast(ref_rejected) / of_rejected
    margin = _log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return reduce(_smoothed(lambda h: (h - 1 / (2 * beta)) ** 2, margin, label_smoothing), reduction, weight, mask)


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
}

_INDEX_FORM = ("policy_logps", "ref_logps", "yw_idx", "yl_idx")


def _accepts_indices(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn a call in the paper's index form into the paired form; pass any other call on."""

    @wraps(loss)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        named = dict(zip(_INDEX_FORM, args, strict=False)) | {k: kwargs[k] for k in _INDEX_FORM if k in kwargs}
        chosen, rejected = named.get("yw_idx"), named.get("yl_idx")
        if len(named) < 4 or (torch.is_tensor(chosen) and chosen.is_floating_point()):
            return loss(*args, **kwargs)
        policy, ref = named["policy_logps"], named["ref_logps"]
        check_same_shape(policy_logps=policy, ref_logps=ref)
        own = {k: v for k, v in kwargs.items() if k not in _INDEX_FORM}
        return loss(policy[chosen], policy[rejected], ref[chosen], ref[rejected], *args[4:], **own)

    return call


@_accepts_indices
def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    loss_type: str = "sigmoid",
    **own: Any,
) -> Tensor:
    """The preference loss named ``loss_type``, in either of the two forms that people know.

    * pairs: ``dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1)``, each [S];
    * indices, as the DPO paper prints it: ``dpo_loss(policy_logps, ref_logps, yw_idx, yl_idx, beta=0.1)``, where
      ``policy_logps`` and ``ref_logps`` are [B] and the integer ``yw_idx[i]``, ``yl_idx[i]`` say which rows are the
      chosen and the rejected completion of pair i. (The paper's snippet also returns the rewards; they are
      ``beta * (policy_logps - ref_logps)``.)

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta: as in :func:`sigmoid_loss`.
        loss_type: a key of :data:`PREFERENCE_LOSSES`.
        own: what that loss takes: ``label_smoothing``, ``reduction``, ``weight``, ``mask``, …
    Returns:
        Scalar, or [S] for ``reduction="none"``.
    Raises:
        ValueError: unknown ``loss_type``, or what the loss itself raises.
    Example:
        >>> logps = torch.tensor([-5.0, -7.0, -4.0, -9.0])
        >>> dpo_loss(logps, logps, torch.tensor([0, 2]), torch.tensor([1, 3]))    # policy = reference
        tensor(0.6931)

    Source: arXiv 2305.18290, eq. 7 and appendix B.
    """
    if loss_type not in PREFERENCE_LOSSES:
        raise ValueError(f"loss_type must be one of {', '.join(PREFERENCE_LOSSES)}, got {loss_type!r}")
    return PREFERENCE_LOSSES[loss_type](policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, **own)
