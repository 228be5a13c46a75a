"""What the preference losses share."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape
from rlhf.losses._reduction import reducible

on_pairs = reducible("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")


def ell(h: Tensor) -> Tensor:
    """The logistic loss, ``-log sigmoid(h)``."""
    return -F.logsigmoid(h)


def ratios(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None, beta: float
) -> tuple[Tensor, Tensor]:
    """The log-ratios to the reference, ``(s_w, s_l)``."""
    check_range("beta", beta, 0.0, math.inf, open_low=True)
    if ref_chosen is None or ref_rejected is None:
        raise ValueError("ref_chosen and ref_rejected are needed: this loss is relative to a reference")
    check_same_shape(
        policy_chosen=chosen, policy_rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )  # fmt: skip
    return chosen - ref_chosen, rejected - ref_rejected


def per_token(logps: Tensor, lengths: Tensor) -> Tensor:
    check_same_shape(logps=logps, lengths=lengths)
    return logps / lengths.clamp(min=1)


def smoothed(loss: Callable[[Tensor], Tensor], h: Tensor, label_smoothing: float) -> Tensor:
    """Expected loss when each pair is flipped with probability ``label_smoothing`` (cDPO note, eq. 3)."""
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    if label_smoothing == 0:
        return loss(h)
    return (1 - label_smoothing) * loss(h) + label_smoothing * loss(-h)
