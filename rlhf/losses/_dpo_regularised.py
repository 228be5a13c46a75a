r"""DPO with another hold on the reference: KL token by token, a beta that follows the batch, other divergences.

The call is that of :mod:`rlhf.losses._preference`. :math:`\Delta = s_w - s_l`, :math:`\ell(h) = -\log\sigma(h)`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape
from rlhf.losses._pairs import ell, on_pairs, ratios
from rlhf.losses._reduction import reducible, upcast


def length_desensitized_logps(
    logps: Tensor, sequence: Tensor, public_lengths: Tensor, ld_alpha: float = 0.5
) -> Tensor:  # fmt: skip
    r"""Sums of log-probs in which what an answer has beyond its partner's length weighs less (LD-DPO).

    .. math:: \sum_{t \le n} \log\pi(y_t) + \alpha\sum_{t > n} \log\pi(y_t),\; n = \min(|y_w|, |y_l|)

    Args:
        logps: [N], nats, of the scored tokens, each sequence's in order and together (as ``Targets`` has them).
        sequence: int64 [N] in [0, S), rising. public_lengths: [S], n, the same for both answers of a pair.
        ld_alpha: alpha, in [0, 1]; 1 is the plain sum, 0 leaves the rest out.
    Returns:
        [S], at least float32; use it for policy and reference in any preference loss.
    Raises:
        ValueError: shapes differ, or alpha out of range.
    Example:
        >>> ids = torch.tensor([0, 0, 0, 1])
        >>> length_desensitized_logps(torch.tensor([-1.0, -2.0, -4.0, -3.0]), ids, torch.tensor([1, 1]))
        tensor([-4., -3.])

    Source: arXiv 2409.06411.
    """
    check_range("ld_alpha", ld_alpha, 0.0, math.nextafter(1.0, 2.0))
    check_same_shape(logps=logps, sequence=sequence)
    logps, size = upcast(logps), len(public_lengths)
    counts = torch.bincount(sequence, minlength=size)
    position = torch.arange(len(logps), device=logps.device) - (counts.cumsum(0) - counts)[sequence]
    weighted = torch.where(position < public_lengths[sequence], logps, ld_alpha * logps)
    return logps.new_zeros(size).index_add(0, sequence, weighted)


@reducible("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "chosen_kl", "rejected_kl")
def tdpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    tdpo_alpha: float = 0.5,
) -> Tensor:
    r"""Token-level DPO: the sequences' forward KL to the reference is held even.

    .. math:: \ell(\beta\Delta - \alpha\beta(K_l - \mathrm{sg}\,K_w)),\;
              K = \sum_t \mathrm{KL}(\pi_{ref}(\cdot|y_{<t})\,\|\,\pi(\cdot|y_{<t}))

    Args:
        chosen_kl, rejected_kl: [S], K of each answer, nats; rejected_kl carries gradient.
        tdpo_alpha: >= 0, alpha; 0 is DPO.
    Example:
        >>> z = torch.zeros(1)
        >>> tdpo_loss(z, z, z, z, chosen_kl=z, rejected_kl=z + 2, tdpo_alpha=0.5)
        tensor(0.7444)

    Source: arXiv 2404.11999 (TDPO2).
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    check_range("tdpo_alpha", tdpo_alpha, 0.0, math.inf)
    return ell(beta * (s_w - s_l) - tdpo_alpha * beta * (rejected_kl - chosen_kl.detach()))


@on_pairs
def beta_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    beta_dpo_alpha: float = 0.6,
    threshold: float = 0.0,
    batch_margin: float | Tensor | None = None,
) -> Tensor:
    r"""Beta-DPO: beta follows the quality of the batch's pairs.

    .. math:: \ell(\beta'\Delta),\; \beta' = \beta\,[1 + \alpha(\bar M - M_0)],\; M = \beta\Delta

    Args:
        beta_dpo_alpha: >= 0, alpha. threshold: M_0; the paper keeps a running mean of M there.
        batch_margin: M-bar, the mean of M over what counts on all ranks, a number; by default the mean of the batch
            that is passed. (What a mask hides counts there as a margin of 0, so give it with a mask.)
    Example:
        >>> z = torch.zeros(1)
        >>> beta_dpo_loss(z + 10, z, z, z, beta_dpo_alpha=0.5)    # beta 0.15
        tensor(0.2014)

    Source: arXiv 2407.08639.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    check_range("beta_dpo_alpha", beta_dpo_alpha, 0.0, math.inf)
    mean = beta * (s_w - s_l).detach().mean() if batch_margin is None else batch_margin
    scale = 1 + beta_dpo_alpha * (mean - threshold)
    return ell(beta * torch.as_tensor(scale, dtype=s_w.dtype, device=s_w.device).clamp(min=1e-3) * (s_w - s_l))


@on_pairs
def f_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    r"""DPO under another divergence than reverse KL from the reference.

    .. math:: \ell(\beta(g(s_w) - g(s_l)))

    with g(s) = s for ``"reverse_kl"`` (DPO), :math:`-e^{-s}` for ``"forward_kl"``, :math:`\log\sigma(s)` for
    ``"js"`` and :math:`(1 - e^{-\alpha s})/\alpha` for ``"alpha"`` (alpha → 0 is reverse, alpha = 1 forward KL).

    Args:
        f_divergence_type: one of the four. f_alpha_divergence_coef: alpha, > 0.
    Example:
        >>> z = torch.zeros(1)
        >>> f_dpo_loss(z + 1, z, z, z, beta=1.0, f_divergence_type="js")
        tensor(0.5211)

    Source: arXiv 2309.16240 table 1. Differs from TRL 1.16, whose alpha divergence is that of 1 - alpha. Exponents
    stop at 80, so that a hopeless pair stays finite.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    check_range("f_alpha_divergence_coef", f_alpha_divergence_coef, 0.0, math.inf, open_low=True)
    alpha = f_alpha_divergence_coef
    scores: dict[str, Callable[[Tensor], Tensor]] = {
        "reverse_kl": lambda s: s,
        "forward_kl": lambda s: -torch.exp((-s).clamp(max=80)),
        "js": F.logsigmoid,
        "alpha": lambda s: -torch.expm1((-alpha * s).clamp(max=80)) / alpha,
    }
    if f_divergence_type not in scores:
        raise ValueError(f"f_divergence_type must be one of {', '.join(scores)}, got {f_divergence_type!r}")
    g = scores[f_divergence_type]
    return ell(beta * (g(s_w) - g(s_l)))
