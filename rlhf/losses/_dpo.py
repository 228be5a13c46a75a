r"""DPO and its relatives: losses of one margin, how much more the policy than the reference prefers the chosen answer.

The call is that of :mod:`rlhf.losses._preference`. With :math:`\Delta = s_w - s_l`, the margin of the implicit rewards
is :math:`\beta\Delta`; :math:`\ell(h) = -\log\sigma(h)`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_range
from rlhf.losses._pairs import ell, on_pairs, per_token, ratios, smoothed


@on_pairs
def dpo_sigmoid_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""DPO: favour the chosen completion over the rejected one, relative to a reference.

    .. math:: (1-\epsilon)\,\ell(\beta\Delta) + \epsilon\,\ell(-\beta\Delta)

    Args:
        label_smoothing: chance that a pair is flipped, in [0, 0.5).
    Returns:
        log 2 where policy = reference.
    Example:
        >>> z = torch.zeros(2)
        >>> dpo_sigmoid_loss(z, z, z, z)
        tensor(0.6931)

    Source: arXiv 2305.18290 eq. 7; cDPO note eq. 3. Differs from TRL, whose ``sigmoid`` ignores label smoothing.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return smoothed(ell, beta * (s_w - s_l), label_smoothing)


@on_pairs
def dpo_hinge_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Hinge on the margin of the implicit rewards: no gradient once a pair is apart by ``1 / beta`` nats.

    .. math:: \max(0, 1 - \beta\Delta)

    Args:
        label_smoothing: chance that a pair is flipped, in [0, 0.5).
    Example:
        >>> z = torch.zeros(2)
        >>> dpo_hinge_loss(z, z, z, z)
        tensor(1.)

    Source: SLiC-HF, arXiv 2305.10425; on log-ratios in RSO, arXiv 2309.06657.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return smoothed(lambda h: F.relu(1 - h), beta * (s_w - s_l), label_smoothing)


@on_pairs
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
) -> Tensor:
    r"""IPO: pull the log-ratio margin to ``1 / (2 beta)`` instead of to infinity.

    .. math:: (\Delta - \tfrac{1}{2\beta})^2

    Args:
        chosen_lengths, rejected_lengths: given both, log-ratios are averaged over them first, as the authors advise
            and as TRL and our ``DPOTrainer`` do; without them, the paper's sums.
        label_smoothing: chance that a pair is flipped, in [0, 0.5).
    Returns:
        ``1 / (4 beta**2)`` where policy = reference.
    Example:
        >>> z = torch.zeros(2)
        >>> ipo_loss(z, z, z, z, beta=0.1)
        tensor(25.)

    Source: arXiv 2310.12036 eq. 17; ``beta`` is its tau.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("chosen_lengths and rejected_lengths go together: pass both or neither")
    if chosen_lengths is not None and rejected_lengths is not None:
        s_w, s_l = per_token(s_w, chosen_lengths), per_token(s_l, rejected_lengths)
    return smoothed(lambda h: (h - 1 / (2 * beta)) ** 2, s_w - s_l, label_smoothing)


@on_pairs
def sigmoid_norm_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Tensor:
    r"""DPO on log-ratios per token: long answers weigh no more than short ones.

    .. math:: \ell(\beta(s_w/|y_w| - s_l/|y_l|))

    Example:
        >>> z, n = torch.zeros(1), torch.tensor([3])
        >>> sigmoid_norm_loss(z + 3, z, z, z, beta=2.0, chosen_lengths=n, rejected_lengths=n)
        tensor(0.1269)

    Source: Tulu 3, arXiv 2411.15124 (length-normalised DPO). TRL credits SimPO, which has no reference.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return ell(beta * (per_token(s_w, chosen_lengths) - per_token(s_l, rejected_lengths)))


@on_pairs
def robust_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""DPO that is unbiased when a known share of the pairs is flipped.

    .. math:: \frac{(1-\epsilon)\,\ell(\beta\Delta) - \epsilon\,\ell(-\beta\Delta)}{1-2\epsilon}

    Args:
        label_smoothing: that share, in [0, 0.5).
    Example:
        >>> z = torch.zeros(1)
        >>> robust_loss(z + 5, z, z, z, label_smoothing=0.1)
        tensor(0.4116)

    Source: arXiv 2403.00409.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    h, eps = beta * (s_w - s_l), label_smoothing
    return ((1 - eps) * ell(h) - eps * ell(-h)) / (1 - 2 * eps)


@on_pairs
def exo_pair_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    label_smoothing: float = 1e-3,
) -> Tensor:
    r"""EXO: reverse KL from the policy's preference to the data's, instead of DPO's forward KL.

    .. math:: q\log\frac{q}{1-\epsilon} + (1-q)\log\frac{1-q}{\epsilon},\; q = \sigma(\beta\Delta)

    Args:
        label_smoothing: the data's doubt, in (0, 0.5); it cannot be 0.
    Example:
        >>> z = torch.zeros(1)
        >>> exo_pair_loss(z, z, z, z)
        tensor(2.7612)

    Source: arXiv 2402.00856.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    check_range("label_smoothing", label_smoothing, 0.0, 0.5, open_low=True)
    h = beta * (s_w - s_l)
    q, p = torch.sigmoid(h), torch.sigmoid(-h)  # 1 - q would lose the digits of a small p
    return q * (-ell(h) - math.log1p(-label_smoothing)) + p * (-ell(-h) - math.log(label_smoothing))


@on_pairs
def discopop_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    discopop_tau: float = 0.05,
) -> Tensor:
    r"""DiscoPOP: a mixture of the logistic and the exponential loss, found by search.

    .. math:: (1-m)\,\ell(h) + m\,e^{-h},\; h = \beta\Delta,\; m = \sigma(h/\tau)

    Args:
        discopop_tau: > 0, tau.
    Example:
        >>> z = torch.zeros(1)
        >>> discopop_loss(z, z, z, z)
        tensor(0.8466)

    Source: arXiv 2406.08414. The factors of the exponential part are joined, so that it cannot overflow.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    check_range("discopop_tau", discopop_tau, 0.0, math.inf, open_low=True)
    h = beta * (s_w - s_l)
    return torch.sigmoid(-h / discopop_tau) * ell(h) + torch.exp(-h - ell(h / discopop_tau))


@on_pairs
def dpop_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    dpop_lambda: float = 50.0,
) -> Tensor:
    r"""DPO-Positive: a penalty inside the sigmoid when the chosen answer becomes less likely than under the reference.

    .. math:: \ell(\beta(\Delta - \lambda\max(0, -s_w)))

    Args:
        dpop_lambda: >= 0, lambda.
    Example:
        >>> z = torch.zeros(1)
        >>> dpop_loss(z - 1, z - 2, z, z, dpop_lambda=5.0)    # 1 - 5 * 1 = -4
        tensor(0.9130)

    Source: arXiv 2402.13228 eq. 3.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    check_range("dpop_lambda", dpop_lambda, 0.0, math.inf)
    return ell(beta * (s_w - s_l - dpop_lambda * F.relu(-s_w)))


@on_pairs
def odpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    margin: float | Tensor = 0.0,
) -> Tensor:
    r"""DPO with an offset: pairs must be apart by how much better the chosen answer is.

    .. math:: \ell(\beta\Delta - m)

    Args:
        margin: [S] or a number, in units of the reward; 0 is DPO.
    Example:
        >>> z = torch.zeros(1)
        >>> odpo_loss(z, z, z, z, margin=1.0)
        tensor(1.3133)

    Source: arXiv 2402.10571.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return ell(beta * (s_w - s_l) - margin)


@on_pairs
def rpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    chosen_lengths: Tensor,
    rpo_alpha: float = 1.0,
) -> Tensor:
    r"""DPO with the likelihood of the chosen answer beside it.

    .. math:: \ell(\beta\Delta) - \alpha \log\pi(y_w)/|y_w|

    Args:
        rpo_alpha: >= 0, alpha.
    Example:
        >>> z, n = torch.zeros(1), torch.tensor([4])
        >>> rpo_loss(z - 8, z - 8, z - 8, z - 8, chosen_lengths=n)    # log 2 + 8 / 4
        tensor(2.6931)

    Source: arXiv 2404.19733 eq. 1.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    check_range("rpo_alpha", rpo_alpha, 0.0, math.inf)
    return ell(beta * (s_w - s_l)) - rpo_alpha * per_token(policy_chosen, chosen_lengths)
