r"""Preference losses that move each answer by itself, not only the margin of a pair.

The first are anchored to the reference. The last need none: for them ``ref_chosen`` and ``ref_rejected`` are accepted
and ignored. The call is that of :mod:`rlhf.losses._preference`. :math:`\ell(h) = -\log\sigma(h)`,
:math:`\bar w = \log\pi(y_w)/|y_w|`, :math:`\bar l` likewise.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape
from rlhf.losses._preference import LENGTHS, POLICY_SUMS, Pair, logistic, preference_loss, smoothed
from rlhf.losses._reduction import reducible


@preference_loss("nca_pair")
def nca_pair_loss(pair: Pair, beta: float = 0.1) -> Tensor:
    r"""NCA: a noise-contrastive loss that keeps the likelihood of the chosen answer from falling.

    .. math:: \ell(\beta s_w) + \tfrac12\ell(-\beta s_w) + \tfrac12\ell(-\beta s_l)

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> nca_pair_loss(z, z, z, z)    # 2 log 2
        tensor(1.3863)

    Source: arXiv 2402.05369 (K = 2).
    """
    chosen_ratio, rejected_ratio = pair.log_ratios()
    # The noise term bounds the rise that the data term asks for.
    # For the chosen answer the sum of both is smallest at a log-ratio of log(2) / beta.
    data_term = logistic(beta * chosen_ratio)
    noise_term = 0.5 * logistic(-beta * chosen_ratio) + 0.5 * logistic(-beta * rejected_ratio)
    return data_term + noise_term


@preference_loss("bco_pair")
def bco_pair_loss(pair: Pair, beta: float = 0.1, *, shift: float | Tensor = 0.0) -> Tensor:
    r"""BCO: binary cross-entropy with the implicit reward as logit; chosen answers are the positives.

    .. math:: \ell(\beta s_w - \delta) + \ell(\delta - \beta s_l)

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
        shift: delta; a running mean of the rewards of both kinds in the paper, 0 in TRL.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> bco_pair_loss(z, z, z, z)
        tensor(1.3863)

    Source: arXiv 2404.04656.
    """
    chosen_ratio, rejected_ratio = pair.log_ratios()
    # Two cross-entropies and no margin: a rising chosen answer does not make up for a rising rejected one.
    chosen_loss = logistic(beta * chosen_ratio - shift)
    rejected_loss = logistic(shift - beta * rejected_ratio)
    return chosen_loss + rejected_loss


@preference_loss("sppo_hard")
def sppo_hard_loss(pair: Pair, beta: float = 0.1) -> Tensor:
    r"""SPPO with hard labels: squared loss with targets of plus and minus ``1 / (2 beta)`` for the log-ratios.

    .. math:: (s_w - \tfrac{1}{2\beta})^2 + (s_l + \tfrac{1}{2\beta})^2

    Args:
        pair: chosen and rejected completions.
        beta: > 0, 1 / eta; larger keeps the policy nearer to the reference.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> sppo_hard_loss(z, z, z, z, beta=0.5)
        tensor(2.)

    Source: arXiv 2405.00675 (P = 1 and 0); ``beta`` is 1 / eta.
    """
    chosen_ratio, rejected_ratio = pair.log_ratios()
    target_ratio = 0.5 / beta
    # A fixed target for each side: the margin cannot grow for ever, and the chosen likelihood cannot fall with it.
    return (chosen_ratio - target_ratio) ** 2 + (rejected_ratio + target_ratio) ** 2


@preference_loss("apo_zero")
def apo_zero_loss(pair: Pair, beta: float = 0.1) -> Tensor:
    r"""APO-zero: raises chosen answers and lowers rejected ones, each against the reference.

    .. math:: 1 - \sigma(\beta s_w) + \sigma(\beta s_l)

    For chosen answers better than what the model writes itself.

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> apo_zero_loss(z, z, z, z)
        tensor(1.)

    Source: arXiv 2408.06266.
    """
    chosen_ratio, rejected_ratio = pair.log_ratios()
    # sigmoid(-h) is 1 - sigmoid(h) with all digits where it is small.
    # Both terms saturate, so that clear pairs and hopeless pairs have almost no gradient.
    return torch.sigmoid(-beta * chosen_ratio) + torch.sigmoid(beta * rejected_ratio)


@preference_loss("apo_down")
def apo_down_loss(pair: Pair, beta: float = 0.1) -> Tensor:
    r"""APO-down: lowers both answers, the rejected one more; for a model better than the chosen answers.

    .. math:: \sigma(\beta s_w) + 1 - \sigma(\beta\Delta)

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> apo_down_loss(z, z, z, z)
        tensor(1.)

    Source: arXiv 2408.06266.
    """
    chosen_ratio, _ = pair.log_ratios()
    # The rejected answer is in the margin alone, so it falls relative to the chosen one.
    return torch.sigmoid(beta * chosen_ratio) + torch.sigmoid(-beta * pair.margin())


@preference_loss("cal_dpo")
def cal_dpo_loss(pair: Pair, beta: float = 0.1) -> Tensor:
    r"""Cal-DPO: DPO plus a squared loss that calibrates the scale of the implicit rewards.

    .. math:: \ell(\Delta) + (s_w - \tfrac{1}{2\beta})^2 + (s_l + \tfrac{1}{2\beta})^2

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> cal_dpo_loss(z, z, z, z, beta=0.5)
        tensor(2.6931)

    Source: arXiv 2412.14516.
    """
    chosen_ratio, rejected_ratio = pair.log_ratios()
    target_ratio = 0.5 / beta
    # DPO's term reads the margin alone and lets both likelihoods fall together; the squares hold each in place.
    calibration = (chosen_ratio - target_ratio) ** 2 + (rejected_ratio + target_ratio) ** 2
    return logistic(pair.margin()) + calibration


@preference_loss("kto_pair")
def kto_pair_loss(pair: Pair, beta: float = 0.1, *, kl: float | Tensor = 0.0) -> Tensor:
    r"""KTO on pairs: the value of each answer against a reference point, as in prospect theory.

    .. math:: \tfrac12 [1 - \sigma(\beta(s_w - z))] + \tfrac12 [1 - \sigma(\beta(z - s_l))]

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
        kl: z >= 0, nats; an estimate of KL(policy to reference), for example the mean log-ratio of mismatched answers,
            bounded below at 0. For answers without a partner: :func:`kto_loss`.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> kto_pair_loss(z, z, z, z)
        tensor(0.5000)

    Source: arXiv 2402.01306 eq. 8, lambda = 1.
    """
    chosen_ratio, rejected_ratio = pair.log_ratios()
    # Gains and losses are relative to the policy's average drift, so moving all answers alike earns nothing.
    chosen_loss = torch.sigmoid(-beta * (chosen_ratio - kl))
    rejected_loss = torch.sigmoid(-beta * (kl - rejected_ratio))
    return 0.5 * chosen_loss + 0.5 * rejected_loss


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
    r"""KTO: for answers marked good or bad, without pairs.

    .. math:: \lambda_D[1 - \sigma(\beta(s - z))] \text{ if desirable, else } \lambda_U[1 - \sigma(\beta(z - s))]

    Args:
        policy_logps: [S], nats, summed over completion tokens; carries gradient.
        ref_logps: [S], the same under the reference; constant.
        labels: [S] bool, True is desirable.
        beta: > 0; larger keeps the policy nearer to the reference.
        kl: z >= 0, nats; an estimate of KL(policy to reference), without gradient.
        desirable_weight: lambda_D. With n_D and n_U examples of each kind, the paper advises lambda_D n_D / (lambda_U
            n_U) in [1, 4/3].
        undesirable_weight: lambda_U.
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
    # Not converted: .bool() would take labels of -1 and +1 as desirable, both of them.
    if labels.dtype != torch.bool:
        raise ValueError(f"labels must be bool (True is desirable), got {labels.dtype}: pass labels > 0")
    scaled_ratio = beta * (policy_logps - ref_logps - kl)
    # These weights stay out of the divisor of the mean, unlike the argument weight: the paper's mean is over examples.
    desirable_loss = desirable_weight * torch.sigmoid(-scaled_ratio)
    undesirable_loss = undesirable_weight * torch.sigmoid(scaled_ratio)
    return torch.where(labels, desirable_loss, undesirable_loss)


def _aot(better: Tensor, worse: Tensor, pair: Pair, beta: float, label_smoothing: float) -> Tensor:
    """The loss of each quantile, [S], at the places that the mask leaves."""
    if pair.mask is not None:
        # Hidden pairs are sorted behind all others: their 0 would be a quantile of the sample. Selecting the others
        # would make the host wait for a GPU.
        better, worse = (value.masked_fill(~pair.mask.bool(), math.inf) for value in (better, worse))
    # The i-th smallest of one sample against the i-th smallest of the other: no pair is compared with its own partner.
    quantile_gaps = better.sort().values - worse.sort().values
    if pair.mask is None:
        return smoothed(logistic, beta * quantile_gaps, label_smoothing)
    num_visible = pair.mask.sum()
    quantile_gaps = torch.where(torch.arange(len(better), device=better.device) < num_visible, quantile_gaps, 0.0)
    losses = smoothed(logistic, beta * quantile_gaps, label_smoothing)
    # Element i is the i-th quantile, not pair i: only the mean or the sum has a meaning.
    return torch.zeros_like(losses).masked_scatter(pair.mask.bool(), losses)


@preference_loss("aot", coupled=True)
def aot_loss(pair: Pair, beta: float = 0.1, *, label_smoothing: float = 0.0) -> Tensor:
    r"""AOT: stochastic dominance of the policy's margins over the reference's, by quantiles of the batch.

    .. math:: \ell(\beta[\mathrm{sort}(\pi_w - \pi_l)_i - \mathrm{sort}(ref_w - ref_l)_i])

    The batch that is passed is the sample: the loss depends on what is in it, so pass all the pairs of a step.

    There is no ``weight``, because a quantile belongs to no single pair.

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
        label_smoothing: chance that a pair is flipped, in [0, 0.5).
    Returns:
        The loss of each quantile, [S], before the reduction.
    Example:
        >>> z = torch.zeros(2)
        >>> aot_loss(z, z, z, z)
        tensor(0.6931)

    Source: arXiv 2406.05882.
    """
    # The sample to beat is the reference's margins, so policy and reference are sorted apart.
    policy_margin = pair.chosen - pair.rejected
    ref_margin = pair["ref_chosen"] - pair["ref_rejected"]
    return _aot(policy_margin, ref_margin, pair, beta, label_smoothing)


@preference_loss("aot_unpaired", coupled=True)
def aot_unpaired_loss(pair: Pair, beta: float = 0.1, *, label_smoothing: float = 0.0) -> Tensor:
    r"""AOT without pairs: stochastic dominance of chosen rewards over rejected ones, by quantiles of the batch.

    .. math:: \ell(\beta[\mathrm{sort}(s_w)_i - \mathrm{sort}(s_l)_i])

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
        label_smoothing: chance that a pair is flipped, in [0, 0.5).
    Returns:
        The loss of each quantile, [S], before the reduction.
    Example:
        >>> z = torch.zeros(2)
        >>> aot_unpaired_loss(z, z, z, z)
        tensor(0.6931)

    Source: arXiv 2406.05882.
    """
    chosen_ratio, rejected_ratio = pair.log_ratios()
    return _aot(chosen_ratio, rejected_ratio, pair, beta, label_smoothing)


@preference_loss("simpo", sums=POLICY_SUMS, needs=LENGTHS)
def simpo_loss(pair: Pair, beta: float = 2.0, *, simpo_gamma: float = 0.5) -> Tensor:
    r"""SimPO: the reward is the log-likelihood per token, with a target margin and no reference.

    .. math:: \ell(\beta(\bar w - \bar l) - \gamma)

    Args:
        pair: chosen and rejected completions.
        beta: > 0, the scale of the reward; 2 to 10 in the paper.
        simpo_gamma: >= 0, gamma; the paper finds gamma / beta of 0.3 to 0.5 good.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z, n = torch.zeros(1), torch.tensor([4])
        >>> simpo_loss(z - 4, z - 8, chosen_lengths=n, rejected_lengths=n, simpo_gamma=1.0)    # 2 * (-1 + 2) - 1
        tensor(0.3133)

    Source: arXiv 2405.14734 eq. 6.
    """
    check_range("simpo_gamma", simpo_gamma, 0.0, math.inf)
    # gamma is a margin of rewards, after beta. TRL subtracts gamma / beta from the log-probs before: the same.
    reward_margin = beta * (pair.chosen_per_token() - pair.rejected_per_token())
    return logistic(reward_margin - simpo_gamma)


@preference_loss("cpo", sums=POLICY_SUMS, optional=("chosen_lengths",))
def cpo_loss(pair: Pair, beta: float = 0.1, *, cpo_alpha: float = 1.0) -> Tensor:
    r"""CPO: DPO without a reference, plus the negative log-likelihood of the chosen answer.

    .. math:: \ell(\beta(\log\pi(y_w) - \log\pi(y_l))) - \alpha\log\pi(y_w)

    With ``chosen_lengths`` the likelihood term is per token, as TRL's is. Without them it is the paper's sum.

    Args:
        pair: chosen and rejected completions.
        beta: > 0, the scale of the margin.
        cpo_alpha: >= 0, alpha.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> cpo_loss(z - 3, z - 3)
        tensor(3.6931)

    Source: arXiv 2401.08417.
    """
    check_range("cpo_alpha", cpo_alpha, 0.0, math.inf)
    # The margin is of sums, also where the likelihood is per token: TRL mixes the two in the same way.
    preference = logistic(beta * (pair.chosen - pair.rejected))
    # Without a reference nothing else keeps the chosen answer's likelihood from falling with the rejected one's.
    log_likelihood = pair.chosen_per_token() if pair.has("chosen_lengths") else pair.chosen
    return preference - cpo_alpha * log_likelihood


@preference_loss("orpo", sums=POLICY_SUMS, needs=LENGTHS)
def orpo_loss(pair: Pair, beta: float = 0.1) -> Tensor:
    r"""ORPO: negative log-likelihood of the chosen answer plus a preference in odds, in one stage.

    .. math:: -\bar w + \beta\,\ell\!\left(\log\frac{p_w}{1-p_w} - \log\frac{p_l}{1-p_l}\right),\;
              p_w = e^{\bar w},\; p_l = e^{\bar l}

    Args:
        pair: chosen and rejected completions.
        beta: > 0, the paper's lambda.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z, n = torch.zeros(1), torch.tensor([4])
        >>> orpo_loss(z - 4, z - 4, chosen_lengths=n, rejected_lengths=n)    # 1 + 0.1 log 2
        tensor(1.0693)

    Source: arXiv 2403.07691 eq. 6 and 7. Differs from TRL, whose likelihood term covers the prompt as well.
    """
    chosen, rejected = pair.chosen_per_token(), pair.rejected_per_token()
    # Odds, not probabilities: they tell apart answers that are both nearly certain.
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    # The likelihood is the main term here; beta only scales the preference.
    return -chosen + beta * logistic(log_odds_ratio)


def _log_odds(logp: Tensor) -> Tensor:
    """``log(p / (1 - p))``; the log-prob stops one rounding step short of 0, so that certainty stays finite."""
    # Past the clamp the gradient is 0: an answer that is certain has nothing to gain.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    # 1 - exp(logp) would round to 0 well before the answer is certain.
    return logp - torch.log(-torch.expm1(logp))


@preference_loss("slic", sums=POLICY_SUMS)
def slic_loss(pair: Pair, beta: float = 1.0, *, slic_lambda: float = 0.1) -> Tensor:
    r"""SLiC-HF: hinge loss on log-probs, plus the negative log-likelihood of the chosen answer.

    .. math:: \max(0, \beta - \log\pi(y_w) + \log\pi(y_l)) - \lambda\log\pi(y_w)

    Args:
        pair: chosen and rejected completions.
        beta: > 0, the margin, nats.
        slic_lambda: >= 0, lambda.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> slic_loss(z - 3, z - 3)
        tensor(1.3000)

    Source: arXiv 2305.10425 eq. 1, with the chosen answer as the regularising target.
    """
    check_range("slic_lambda", slic_lambda, 0.0, math.inf)
    # On sums of log-probs, as in the paper; here beta is nats of margin and not a scale of rewards.
    hinge = F.relu(beta - pair.chosen + pair.rejected)
    return hinge - slic_lambda * pair.chosen


@preference_loss("sft", sums=("policy_chosen",), needs=("chosen_lengths",))
def chosen_nll_loss(pair: Pair, beta: float = 0.1) -> Tensor:
    r"""Negative log-likelihood per token of the chosen answer: the fine-tuning part of a mixture.

    .. math:: -\bar w

    The mean is over pairs, so a short answer has the same weight as a long one.

    Args:
        pair: chosen and rejected completions.
        beta: not read.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> chosen_nll_loss(torch.tensor([-6.0]), chosen_lengths=torch.tensor([3]))
        tensor(2.)

    Source: MPO, arXiv 2411.10442. TRL divides by the tokens of the micro-batch instead.
    """
    # beta is not read, but a mixture calls all of its losses with the same arguments.
    return -pair.chosen_per_token()
