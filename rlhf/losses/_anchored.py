r"""Preference losses that move each answer by itself against the reference, not only their margin.

The call is that of :mod:`rlhf.losses._preference`. :math:`\ell(h) = -\log\sigma(h)`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape
from rlhf.losses._pairs import ell, on_pairs, ratios, smoothed
from rlhf.losses._reduction import reduce, reducible, upcast


@on_pairs
def nca_pair_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    r"""NCA: noise-contrastive, keeps the chosen answer's likelihood from falling.

    .. math:: \ell(\beta s_w) + \tfrac12\ell(-\beta s_w) + \tfrac12\ell(-\beta s_l)

    Example:
        >>> z = torch.zeros(1)
        >>> nca_pair_loss(z, z, z, z)    # 2 log 2
        tensor(1.3863)

    Source: arXiv 2402.05369 (K = 2).
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return ell(beta * s_w) + 0.5 * ell(-beta * s_w) + 0.5 * ell(-beta * s_l)


@on_pairs
def bco_pair_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    shift: float | Tensor = 0.0,
) -> Tensor:
    r"""BCO: a classifier whose logit is the implicit reward, for chosen against rejected.

    .. math:: \ell(\beta s_w - \delta) + \ell(\delta - \beta s_l)

    Args:
        shift: delta; the paper keeps a running mean of the rewards of both kinds there, TRL 0.
    Example:
        >>> z = torch.zeros(1)
        >>> bco_pair_loss(z, z, z, z)
        tensor(1.3863)

    Source: arXiv 2404.04656.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return ell(beta * s_w - shift) + ell(shift - beta * s_l)


@on_pairs
def sppo_hard_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    r"""SPPO with hard labels: each log-ratio is pulled to plus or minus ``1 / (2 beta)``.

    .. math:: (s_w - \tfrac{1}{2\beta})^2 + (s_l + \tfrac{1}{2\beta})^2

    Example:
        >>> z = torch.zeros(1)
        >>> sppo_hard_loss(z, z, z, z, beta=0.5)
        tensor(2.)

    Source: arXiv 2405.00675 (P = 1 and 0); ``beta`` is 1 / eta.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return (s_w - 0.5 / beta) ** 2 + (s_l + 0.5 / beta) ** 2


@on_pairs
def apo_zero_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    r"""APO-zero: chosen answers up, rejected answers down, each against the reference.

    .. math:: 1 - \sigma(\beta s_w) + \sigma(\beta s_l)

    For chosen answers better than what the model writes itself.

    Example:
        >>> z = torch.zeros(1)
        >>> apo_zero_loss(z, z, z, z)
        tensor(1.)

    Source: arXiv 2408.06266.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return torch.sigmoid(-beta * s_w) + torch.sigmoid(beta * s_l)


@on_pairs
def apo_down_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    r"""APO-down: both down, the rejected one more; for a model better than the chosen answers.

    .. math:: \sigma(\beta s_w) + 1 - \sigma(\beta\Delta)

    Example:
        >>> z = torch.zeros(1)
        >>> apo_down_loss(z, z, z, z)
        tensor(1.)

    Source: arXiv 2408.06266.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return torch.sigmoid(beta * s_w) + torch.sigmoid(-beta * (s_w - s_l))


@on_pairs
def cal_dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    r"""Cal-DPO: DPO with the scale of the implicit rewards calibrated.

    .. math:: \ell(\Delta) + (s_w - \tfrac{1}{2\beta})^2 + (s_l + \tfrac{1}{2\beta})^2

    Example:
        >>> z = torch.zeros(1)
        >>> cal_dpo_loss(z, z, z, z, beta=0.5)
        tensor(2.6931)

    Source: arXiv 2412.14516.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return ell(s_w - s_l) + (s_w - 0.5 / beta) ** 2 + (s_l + 0.5 / beta) ** 2


@on_pairs
def kto_pair_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    *,
    kl: float | Tensor = 0.0,
) -> Tensor:
    r"""KTO on pairs: prospect theory's value of each answer against a reference point.

    .. math:: \tfrac12 [1 - \sigma(\beta(s_w - z))] + \tfrac12 [1 - \sigma(\beta(z - s_l))]

    Args:
        kl: z >= 0, nats; an estimate of KL(policy to reference), e.g. the mean log-ratio of mismatched answers,
            bounded below at 0. For answers without a partner: :func:`kto_loss`.
    Example:
        >>> z = torch.zeros(1)
        >>> kto_pair_loss(z, z, z, z)
        tensor(0.5000)

    Source: arXiv 2402.01306 eq. 8, lambda = 1.
    """
    s_w, s_l = ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return 0.5 * torch.sigmoid(-beta * (s_w - kl)) + 0.5 * torch.sigmoid(-beta * (kl - s_l))


@reducible("policy_logps", "ref_logps")
def kto_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    beta: float = 0.1,
    *,
    kl: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    r"""KTO: answers that are good or bad by themselves, without partners.

    .. math:: \lambda_D[1 - \sigma(\beta(s - z))] \text{ if desirable, else } \lambda_U[1 - \sigma(\beta(z - s))]

    Args:
        policy_logps, ref_logps: [S], nats, summed over completion tokens. labels: [S] bool, True is desirable.
        beta: > 0. kl: z >= 0, nats; an estimate of KL(policy to reference), without gradient.
        desirable_weight, undesirable_weight: lambdas; with n_D and n_U examples of each kind the paper advises
            lambda_D n_D / (lambda_U n_U) in [1, 4/3].
        reduction, weight, mask: as everywhere, [S].
    Returns:
        Scalar, or [S] for ``"none"``; at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, labels are not bool, ``beta <= 0``.
    Example:
        >>> kto_loss(torch.zeros(2), torch.zeros(2), torch.tensor([True, False]))
        tensor(0.5000)

    Source: arXiv 2402.01306 eq. 8.
    """
    check_range("beta", beta, 0.0, math.inf, open_low=True)
    check_same_shape(policy_logps=policy_logps, ref_logps=ref_logps, labels=labels)
    if labels.dtype != torch.bool:
        raise ValueError(f"labels must be bool (True is desirable), got {labels.dtype}: pass labels > 0")
    h = beta * (policy_logps - ref_logps - kl)
    return torch.where(labels, desirable_weight * torch.sigmoid(-h), undesirable_weight * torch.sigmoid(h))


def _aot(better: Tensor, worse: Tensor, beta: float, label_smoothing: float, options: dict[str, Any]) -> Tensor:
    reduction, mask = options.pop("reduction", "mean"), options.pop("mask", None)
    if options:
        raise TypeError(f"AOT takes no {next(iter(options))}: a quantile belongs to no single pair")
    count = torch.ones_like(better, dtype=torch.bool) if mask is None else mask.bool()
    gaps = better[count].sort().values - worse[count].sort().values
    losses = torch.zeros_like(better).masked_scatter(count, smoothed(ell, beta * gaps, label_smoothing))
    return reduce(losses, reduction, mask=mask)


def aot_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1,
    *, label_smoothing: float = 0.0, **options: Any,
) -> Tensor:  # fmt: skip
    r"""AOT: the policy's margins dominate the reference's in distribution, quantile by quantile, over the batch.

    .. math:: \ell(\beta[\mathrm{sort}(\pi_w - \pi_l)_i - \mathrm{sort}(ref_w - ref_l)_i])

    The batch that is passed is the sample: the loss depends on what is in it, so pass all the pairs of a step.

    Args:
        label_smoothing: in [0, 0.5). options: ``reduction`` and ``mask``; there is no ``weight``.
    Example:
        >>> z = torch.zeros(2)
        >>> aot_loss(z, z, z, z)
        tensor(0.6931)

    Source: arXiv 2406.05882.
    """
    ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    policy, ref = upcast(policy_chosen) - upcast(policy_rejected), upcast(ref_chosen) - upcast(ref_rejected)
    return _aot(policy, ref, beta, label_smoothing, options)


def aot_unpaired_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1,
    *, label_smoothing: float = 0.0, **options: Any,
) -> Tensor:  # fmt: skip
    r"""AOT without pairs: the rewards of chosen answers dominate those of rejected ones, over the batch.

    .. math:: \ell(\beta[\mathrm{sort}(s_w)_i - \mathrm{sort}(s_l)_i])

    Arguments as in :func:`aot_loss`.

    Example:
        >>> z = torch.zeros(2)
        >>> aot_unpaired_loss(z, z, z, z)
        tensor(0.6931)

    Source: arXiv 2406.05882.
    """
    s_w, s_l = ratios(upcast(policy_chosen), upcast(policy_rejected), upcast(ref_chosen), upcast(ref_rejected), beta)
    return _aot(s_w, s_l, beta, label_smoothing, options)
