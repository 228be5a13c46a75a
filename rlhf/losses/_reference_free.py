r"""Preference losses that need no reference: ``ref_chosen`` and ``ref_rejected`` are accepted and not read.

The call is that of :mod:`rlhf.losses._preference`. :math:`\bar w = \log\pi(y_w)/|y_w|`, :math:`\bar l` likewise.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_range
from rlhf.losses._pairs import ell, on_pairs, per_token


@on_pairs
def simpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    beta: float = 2.0,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    simpo_gamma: float = 0.5,
) -> Tensor:
    r"""SimPO: the likelihood per token is the reward, and pairs must be apart by a margin.

    .. math:: \ell(\beta(\bar w - \bar l) - \gamma)

    Args:
        simpo_gamma: >= 0, gamma; the paper finds gamma / beta of 0.3 to 0.5 good, and beta 2 to 10.
    Example:
        >>> z, n = torch.zeros(1), torch.tensor([4])
        >>> simpo_loss(z - 4, z - 8, chosen_lengths=n, rejected_lengths=n, simpo_gamma=1.0)    # 2 * (-1 + 2) - 1
        tensor(0.3133)

    Source: arXiv 2405.14734 eq. 6.
    """
    check_range("beta", beta, 0.0, math.inf, open_low=True)
    check_range("simpo_gamma", simpo_gamma, 0.0, math.inf)
    return ell(
        beta * (per_token(policy_chosen, chosen_lengths) - per_token(policy_rejected, rejected_lengths)) - simpo_gamma
    )


@on_pairs
def cpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    beta: float = 0.1,
    *,
    chosen_lengths: Tensor | None = None,
    cpo_alpha: float = 1.0,
) -> Tensor:
    r"""CPO: DPO against a uniform reference, with the likelihood of the chosen answer beside it.

    .. math:: \ell(\beta(\log\pi(y_w) - \log\pi(y_l))) - \alpha\log\pi(y_w)

    Args:
        chosen_lengths: given, the likelihood term is per token, as TRL's is; without them, the paper's sum.
        cpo_alpha: >= 0, alpha.
    Example:
        >>> z = torch.zeros(1)
        >>> cpo_loss(z - 3, z - 3)
        tensor(3.6931)

    Source: arXiv 2401.08417.
    """
    check_range("beta", beta, 0.0, math.inf, open_low=True)
    check_range("cpo_alpha", cpo_alpha, 0.0, math.inf)
    likelihood = policy_chosen if chosen_lengths is None else per_token(policy_chosen, chosen_lengths)
    return ell(beta * (policy_chosen - policy_rejected)) - cpo_alpha * likelihood


@on_pairs
def orpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    beta: float = 0.1,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Tensor:
    r"""ORPO: fine-tuning on the chosen answer with a preference in odds, in one stage.

    .. math:: -\bar w + \beta\,\ell\!\left(\log\frac{p_w}{1-p_w} - \log\frac{p_l}{1-p_l}\right),\;
              p_w = e^{\bar w},\; p_l = e^{\bar l}

    Args:
        beta: the paper's lambda.
    Example:
        >>> z, n = torch.zeros(1), torch.tensor([4])
        >>> orpo_loss(z - 4, z - 4, chosen_lengths=n, rejected_lengths=n)    # 1 + 0.1 log 2
        tensor(1.0693)

    Source: arXiv 2403.07691 eq. 6 and 7. Differs from TRL, whose likelihood term covers the prompt as well.
    """
    check_range("beta", beta, 0.0, math.inf, open_low=True)
    w, l_ = per_token(policy_chosen, chosen_lengths), per_token(policy_rejected, rejected_lengths)
    return -w + beta * ell(_log_odds(w) - _log_odds(l_))


def _log_odds(logp: Tensor) -> Tensor:
    """``log(p / (1 - p))``; the log-prob stops one rounding step short of 0, so that certainty stays finite."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


@on_pairs
def slic_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    beta: float = 1.0,
    *,
    slic_lambda: float = 0.1,
) -> Tensor:
    r"""SLiC-HF: a hinge on the difference of log-probs, with the likelihood of the chosen answer beside it.

    .. math:: \max(0, \beta - \log\pi(y_w) + \log\pi(y_l)) - \lambda\log\pi(y_w)

    Args:
        beta: the margin, nats. slic_lambda: >= 0, lambda.
    Example:
        >>> z = torch.zeros(1)
        >>> slic_loss(z - 3, z - 3)
        tensor(1.3000)

    Source: arXiv 2305.10425 eq. 1, with the chosen answer as the regularising target.
    """
    check_range("beta", beta, 0.0, math.inf, open_low=True)
    check_range("slic_lambda", slic_lambda, 0.0, math.inf)
    return F.relu(beta - policy_chosen + policy_rejected) - slic_lambda * policy_chosen


@on_pairs
def chosen_nll_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor | None = None,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    beta: float = 0.1,
    *,
    chosen_lengths: Tensor,
) -> Tensor:
    r"""The chosen answer's negative log-likelihood per token: the fine-tuning part of a mixture.

    .. math:: -\bar w

    ``beta`` is not read. The mean is over pairs, so a short answer weighs as much as a long one.

    Example:
        >>> chosen_nll_loss(torch.tensor([-6.0]), chosen_lengths=torch.tensor([3]))
        tensor(2.)

    Source: MPO, arXiv 2411.10442. TRL divides by the tokens of the micro-batch instead.
    """
    return -per_token(policy_chosen, chosen_lengths)
