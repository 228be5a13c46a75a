r"""Preference losses on summed log-probabilities of pairs, found by name in :data:`PREFERENCE_LOSSES`.

Every member is called as ``loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=..., **own)``:

* ``policy_chosen``, ``policy_rejected``: [S], nats, summed over completion tokens; carry gradient;
* ``ref_chosen``, ``ref_rejected``: [S], the same under the reference; constant. None where a loss reads none;
* ``beta``: > 0; unless the loss says otherwise, larger stays nearer the reference;
* ``chosen_lengths``, ``rejected_lengths``: [S], completion tokens, where a loss names them;
* ``reduction``, ``weight``, ``mask``: as everywhere; weight and mask are [S], mask True counts.

It returns a scalar, or [S] for ``reduction="none"``; at least float32; 0 if nothing counts; and raises ValueError where
shapes differ or a hyper-parameter is out of range. A docstring says only what is different. Notation:
:math:`s_w = \log\frac{\pi(y_w)}{\pi_{ref}(y_w)}`, :math:`s_l` likewise, :math:`\Delta = s_w - s_l`,
:math:`\ell(h) = -\log\sigma(h)`. To add a loss: one function, one entry in the dict, one formula in the tests.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from rlhf.losses import _anchored, _dpo, _dpo_regularised, _reference_free
from rlhf.losses._checks import check_same_shape

PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": _dpo.dpo_sigmoid_loss,
    "hinge": _dpo.dpo_hinge_loss,
    "ipo": _dpo.ipo_loss,
    "sigmoid_norm": _dpo.sigmoid_norm_loss,
    "robust": _dpo.robust_loss,
    "exo_pair": _dpo.exo_pair_loss,
    "discopop": _dpo.discopop_loss,
    "dpop": _dpo.dpop_loss,
    "odpo": _dpo.odpo_loss,
    "rpo": _dpo.rpo_loss,
    "tdpo": _dpo_regularised.tdpo_loss,
    "beta_dpo": _dpo_regularised.beta_dpo_loss,
    "f_dpo": _dpo_regularised.f_dpo_loss,
    "nca_pair": _anchored.nca_pair_loss,
    "bco_pair": _anchored.bco_pair_loss,
    "sppo_hard": _anchored.sppo_hard_loss,
    "apo_zero": _anchored.apo_zero_loss,
    "apo_down": _anchored.apo_down_loss,
    "cal_dpo": _anchored.cal_dpo_loss,
    "kto_pair": _anchored.kto_pair_loss,
    "aot": _anchored.aot_loss,
    "aot_unpaired": _anchored.aot_unpaired_loss,
    "simpo": _reference_free.simpo_loss,
    "cpo": _reference_free.cpo_loss,
    "orpo": _reference_free.orpo_loss,
    "slic": _reference_free.slic_loss,
    "sft": _reference_free.chosen_nll_loss,
}

_INDEX_FORM = ("policy_logps", "ref_logps", "yw_idx", "yl_idx")


def _accepts_indices(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn a call in the paper's index form into the paired form; pass any other call on."""

    @wraps(loss)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        named = dict(zip(_INDEX_FORM, args, strict=False)) | {k: kwargs[k] for k in _INDEX_FORM if k in kwargs}
        chosen, rejected = named.get("yw_idx"), named.get("yl_idx")
        if len(named) < 4 or not torch.is_tensor(chosen) or chosen.is_floating_point():
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
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    **own: Any,
) -> Tensor:
    """The preference loss named ``loss_type``, or a weighted sum of several, in either of the forms that people know.

    * pairs: ``dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1)``, each [S];
    * indices, as the DPO paper prints it: ``dpo_loss(policy_logps, ref_logps, yw_idx, yl_idx, beta=0.1)``, where
      ``policy_logps`` and ``ref_logps`` are [B] and the integer ``yw_idx[i]``, ``yl_idx[i]`` say which rows are the
      chosen and the rejected completion of pair i. (The paper's snippet also returns the rewards; they are
      ``beta * (policy_logps - ref_logps)``.)

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta: as for every preference loss.
        loss_type: a key of :data:`PREFERENCE_LOSSES`, or several: MPO is ``["sigmoid", "bco_pair", "sft"]``.
        loss_weights: one weight for each of several, default 1; MPO's are ``[0.8, 0.2, 1.0]``.
        own: what the losses take: ``label_smoothing``, ``chosen_lengths``, ``reduction``, ``weight``, ``mask``, …
            Of several losses each is passed what it names.
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
    several = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    weights = [1.0] * len(several) if loss_weights is None else list(loss_weights)
    if len(weights) != len(several) or not several:
        raise ValueError(f"loss_weights must have one entry for each of {several}, got {weights}")
    for name in several:
        if name not in PREFERENCE_LOSSES:
            raise ValueError(f"loss_type must be one of {', '.join(PREFERENCE_LOSSES)}, got {name!r}")
    pairs = (policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    if len(several) == 1:
        return weights[0] * PREFERENCE_LOSSES[several[0]](*pairs, **own)
    takes = {name: arguments_of(PREFERENCE_LOSSES[name], own) for name in several}
    if stray := set(own) - {key for taken in takes.values() for key in taken}:
        raise TypeError(f"none of {', '.join(several)} takes {', '.join(sorted(stray))}")
    parts = [w * PREFERENCE_LOSSES[name](*pairs, **takes[name]) for name, w in zip(several, weights, strict=True)]
    return torch.stack(parts).sum(0)


def arguments_of(loss: Callable[..., Tensor], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that the loss names (or that AOT's ``**options`` takes)."""
    named = inspect.signature(loss).parameters
    extra = {"reduction", "mask"} if "options" in named else set()
    return {name: value for name, value in offered.items() if name in named or name in extra}
