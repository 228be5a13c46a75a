r"""DPO and its relatives: losses of one margin: how much more than the reference the policy prefers the chosen answer.

The call is that of :mod:`rlhf.losses._preference`. With :math:`\Delta = s_w - s_l`, the margin of the implicit rewards
is :math:`\beta\Delta`; :math:`\ell(h) = -\log\sigma(h)`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape
from rlhf.losses._preference import LENGTHS, Pair, logistic, per_token, preference_loss, smoothed
from rlhf.losses._reduction import upcast

MAX_EXPONENT = 80.0  # float32's exp overflows at 88


@preference_loss("sigmoid")
def dpo_sigmoid_loss(pair: Pair, beta: float = 0.1, *, label_smoothing: float = 0.0) -> Tensor:
    r"""DPO: favour the chosen completion over the rejected one, relative to a reference.

    .. math:: (1-\epsilon)\,\ell(\beta\Delta) + \epsilon\,\ell(-\beta\Delta)

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
        label_smoothing: chance that a pair is flipped, in [0, 0.5).
    Returns:
        The loss of each pair, [S], before the reduction; log 2 where policy = reference.
    Example:
        >>> z = torch.zeros(2)
        >>> dpo_sigmoid_loss(z, z, z, z)
        tensor(0.6931)

    Source: arXiv 2305.18290 eq. 7; cDPO note eq. 3. Differs from TRL, whose ``sigmoid`` ignores label smoothing.
    """
    return smoothed(logistic, beta * pair.margin(), label_smoothing)


@preference_loss("hinge")
def dpo_hinge_loss(pair: Pair, beta: float = 0.1, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Hinge loss on the margin of the implicit rewards: no gradient beyond ``1 / beta`` nats.

    .. math:: \max(0, 1 - \beta\Delta)

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
        label_smoothing: chance that a pair is flipped, in [0, 0.5).
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(2)
        >>> dpo_hinge_loss(z, z, z, z)
        tensor(1.)

    Source: SLiC-HF, arXiv 2305.10425; on log-ratios in RSO, arXiv 2309.06657.
    """
    # With smoothing, a pair beyond the margin has the slope of the flipped label, which makes its margin smaller.
    return smoothed(lambda logits: F.relu(1 - logits), beta * pair.margin(), label_smoothing)


@preference_loss("ipo", optional=LENGTHS)
def ipo_loss(pair: Pair, beta: float = 0.1, *, label_smoothing: float = 0.0) -> Tensor:
    r"""IPO: squared loss with a target of ``1 / (2 beta)`` for the margin, which DPO drives to infinity.

    .. math:: (\Delta - \tfrac{1}{2\beta})^2

    With ``chosen_lengths`` and ``rejected_lengths``, log-ratios are averaged over tokens first, as the authors advise
    and as TRL and our ``DPOTrainer`` do. Without them they are the paper's sums.

    Args:
        pair: chosen and rejected completions.
        beta: > 0, the paper's tau; larger keeps the policy nearer to the reference.
        label_smoothing: chance that a pair is flipped, in [0, 0.5).
    Returns:
        The loss of each pair, [S], before the reduction; ``1 / (4 beta**2)`` where policy = reference.
    Example:
        >>> z = torch.zeros(2)
        >>> ipo_loss(z, z, z, z, beta=0.1)
        tensor(25.)

    Source: arXiv 2310.12036 eq. 17; ``beta`` is its tau.
    """
    # One of the lengths alone would compare a mean with a sum.
    if pair.has("chosen_lengths") != pair.has("rejected_lengths"):
        raise ValueError("chosen_lengths and rejected_lengths go together: pass both or neither")
    chosen_ratio, rejected_ratio = pair.log_ratios()
    if pair.has(*LENGTHS):
        chosen_ratio = per_token(chosen_ratio, pair["chosen_lengths"])
        rejected_ratio = per_token(rejected_ratio, pair["rejected_lengths"])
    # Not infinity, which a logistic loss drives sure pairs to: IPO's regularisation does not vanish for them.
    target_margin = 1 / (2 * beta)
    # Under label smoothing the margin of least loss is (1 - 2 epsilon) / (2 beta).
    return smoothed(lambda margin: (margin - target_margin) ** 2, chosen_ratio - rejected_ratio, label_smoothing)


@preference_loss("sigmoid_norm", needs=LENGTHS)
def sigmoid_norm_loss(pair: Pair, beta: float = 0.1) -> Tensor:
    r"""DPO on log-ratios per token, so that the length of an answer does not matter.

    .. math:: \ell(\beta(s_w/|y_w| - s_l/|y_l|))

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z, n = torch.zeros(1), torch.tensor([3])
        >>> sigmoid_norm_loss(z + 3, z, z, z, beta=2.0, chosen_lengths=n, rejected_lengths=n)
        tensor(0.1269)

    Source: Tulu 3, arXiv 2411.15124 (length-normalised DPO). TRL credits SimPO, which has no reference.
    """
    chosen_ratio, rejected_ratio = pair.log_ratios()
    chosen_mean = per_token(chosen_ratio, pair["chosen_lengths"])
    rejected_mean = per_token(rejected_ratio, pair["rejected_lengths"])
    # A mean is smaller than a sum by the length, so beta must be larger: Tulu 3 takes 5.
    return logistic(beta * (chosen_mean - rejected_mean))


@preference_loss("robust")
def robust_loss(pair: Pair, beta: float = 0.1, *, label_smoothing: float = 0.0) -> Tensor:
    r"""DPO that is unbiased when a known share of the pairs is flipped.

    .. math:: \frac{(1-\epsilon)\,\ell(\beta\Delta) - \epsilon\,\ell(-\beta\Delta)}{1-2\epsilon}

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
        label_smoothing: the share of flipped pairs, in [0, 0.5).
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> robust_loss(z + 5, z, z, z, label_smoothing=0.1)
        tensor(0.4116)

    Source: arXiv 2403.00409.
    """
    # At a share of 0.5 labels hold no information, and the divisor is 0.
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    reward_margin = beta * pair.margin()
    # The expected loss under flips, solved for the loss without them: hence the minus, and the divisor.
    difference = (1 - label_smoothing) * logistic(reward_margin) - label_smoothing * logistic(-reward_margin)
    # Not bounded below: the margin of a sure pair never stops growing, which is the price of no bias.
    return difference / (1 - 2 * label_smoothing)


@preference_loss("exo_pair")
def exo_pair_loss(pair: Pair, beta: float = 0.1, *, label_smoothing: float = 1e-3) -> Tensor:
    r"""EXO: reverse KL between the policy's preferences and those of the data, where DPO has the forward KL.

    .. math:: q\log\frac{q}{1-\epsilon} + (1-q)\log\frac{1-q}{\epsilon},\; q = \sigma(\beta\Delta)

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
        label_smoothing: chance that a pair is flipped, in (0, 0.5); it cannot be 0.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> exo_pair_loss(z, z, z, z)
        tensor(2.7612)

    Source: arXiv 2402.00856.
    """
    # The reverse KL to labels that are certain is infinite: hence a small smoothing by default.
    check_range("label_smoothing", label_smoothing, 0.0, 0.5, open_low=True)
    reward_margin = beta * pair.margin()
    prefers_chosen = torch.sigmoid(reward_margin)
    prefers_rejected = torch.sigmoid(-reward_margin)  # 1 - prefers_chosen would lose the digits of a small probability
    chosen_log_ratio = -logistic(reward_margin) - math.log1p(-label_smoothing)
    rejected_log_ratio = -logistic(-reward_margin) - math.log(label_smoothing)
    return prefers_chosen * chosen_log_ratio + prefers_rejected * rejected_log_ratio


@preference_loss("discopop")
def discopop_loss(pair: Pair, beta: float = 0.1, *, discopop_tau: float = 0.05) -> Tensor:
    r"""DiscoPOP: a mixture of logistic and exponential loss that was found by a search.

    .. math:: (1-m)\,\ell(h) + m\,e^{-h},\; h = \beta\Delta,\; m = \sigma(h/\tau)

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
        discopop_tau: > 0, tau.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> discopop_loss(z, z, z, z)
        tensor(0.8466)

    Source: arXiv 2406.08414.
    """
    check_range("discopop_tau", discopop_tau, 0.0, math.inf, open_low=True)
    reward_margin = beta * pair.margin()
    logistic_part = torch.sigmoid(-reward_margin / discopop_tau) * logistic(reward_margin)
    # sigmoid(logits / tau) * exp(-logits), its factors joined: exp alone would overflow for a hopeless pair.
    exponential_part = torch.exp(-reward_margin - logistic(reward_margin / discopop_tau))
    return logistic_part + exponential_part


@preference_loss("dpop")
def dpop_loss(pair: Pair, beta: float = 0.1, *, dpop_lambda: float = 50.0) -> Tensor:
    r"""DPO-Positive: DPO with a penalty where the chosen answer is less likely than under the reference.

    .. math:: \ell(\beta(\Delta - \lambda\max(0, -s_w)))

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
        dpop_lambda: >= 0, lambda.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> dpop_loss(z - 1, z - 2, z, z, dpop_lambda=5.0)    # 1 - 5 * 1 = -4
        tensor(0.9130)

    Source: arXiv 2402.13228 eq. 3.
    """
    check_range("dpop_lambda", dpop_lambda, 0.0, math.inf)
    chosen_ratio, _ = pair.log_ratios()
    # One-sided: a chosen answer that is likelier than under the reference costs nothing.
    penalty = F.relu(-chosen_ratio)
    return logistic(beta * (pair.margin() - dpop_lambda * penalty))


@preference_loss("odpo", optional=("margin",))
def odpo_loss(pair: Pair, beta: float = 0.1) -> Tensor:
    r"""DPO with an offset: the target margin is how much better the chosen answer is.

    .. math:: \ell(\beta\Delta - m)

    The column ``margin`` is m, in units of the reward: [S], or a number. Without it the loss is DPO.

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> odpo_loss(z, z, z, z, margin=1.0)
        tensor(1.3133)

    Source: arXiv 2402.10571.
    """
    # After beta: the offset is a difference of rewards, not of log-probs.
    return logistic(beta * pair.margin() - pair.get("margin", 0.0))


@preference_loss("rpo", needs=("chosen_lengths",))
def rpo_loss(pair: Pair, beta: float = 0.1, *, rpo_alpha: float = 1.0) -> Tensor:
    r"""DPO plus the negative log-likelihood of the chosen answer.

    .. math:: \ell(\beta\Delta) - \alpha \log\pi(y_w)/|y_w|

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
        rpo_alpha: >= 0, alpha.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z, n = torch.zeros(1), torch.tensor([4])
        >>> rpo_loss(z - 8, z - 8, z - 8, z - 8, chosen_lengths=n)    # log 2 + 8 / 4
        tensor(2.6931)

    Source: arXiv 2404.19733 eq. 1.
    """
    check_range("rpo_alpha", rpo_alpha, 0.0, math.inf)
    preference = logistic(beta * pair.margin())
    # The policy's likelihood and not its log-ratio, which can rise while the answer stays unlikely.
    # Per token, so that alpha means the same for short and for long answers.
    return preference - rpo_alpha * pair.chosen_per_token()


def length_desensitized_logps(
    logps: Tensor, sequence: Tensor, public_lengths: Tensor, ld_alpha: float = 0.5
) -> Tensor:  # fmt: skip
    r"""Sums of log-probs in which tokens beyond the length of the shorter answer have less weight (LD-DPO).

    .. math:: \sum_{t \le n} \log\pi(y_t) + \alpha\sum_{t > n} \log\pi(y_t),\; n = \min(|y_w|, |y_l|)

    Args:
        logps: [N], nats, of the scored tokens, each sequence's in order and together (as ``Targets`` has them).
        sequence: int64 [N] in [0, S), rising.
        public_lengths: [S], n, the same for both answers of a pair.
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
    # check_range excludes the upper end; one float further includes 1.
    check_range("ld_alpha", ld_alpha, 0.0, math.nextafter(1.0, 2.0))
    check_same_shape(logps=logps, sequence=sequence)
    logps = upcast(logps)
    num_sequences = len(public_lengths)
    # Not bincount, which makes the host wait for a GPU.
    lengths = sequence.new_zeros(num_sequences).index_add(0, sequence, torch.ones_like(sequence))
    # Tokens of a sequence lie together, so a position is the distance from where its sequence starts.
    first_positions = lengths.cumsum(0) - lengths
    position = torch.arange(len(logps), device=logps.device) - first_positions[sequence]
    weighted = torch.where(position < public_lengths[sequence], logps, ld_alpha * logps)
    return logps.new_zeros(num_sequences).index_add(0, sequence, weighted)


@preference_loss(
    "tdpo",
    needs=(
        "chosen_kl",
        "rejected_kl",
    ),
)
def tdpo_loss(pair: Pair, beta: float = 0.1, *, tdpo_alpha: float = 0.5) -> Tensor:
    r"""Token-level DPO: also keeps the forward KL to the reference similar for both answers.

    .. math:: \ell(\beta\Delta - \alpha\beta(K_l - \mathrm{sg}\,K_w)),\;
              K = \sum_t \mathrm{KL}(\pi_{ref}(\cdot|y_{<t})\,\|\,\pi(\cdot|y_{<t}))

    The columns ``chosen_kl`` and ``rejected_kl`` are K of each answer, in nats; ``rejected_kl`` carries gradient.

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
        tdpo_alpha: >= 0, alpha; 0 is DPO.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> tdpo_loss(z, z, z, z, chosen_kl=z, rejected_kl=z + 2, tdpo_alpha=0.5)
        tensor(0.7444)

    Source: arXiv 2404.11999 (TDPO2).
    """
    check_range("tdpo_alpha", tdpo_alpha, 0.0, math.inf)
    # The chosen completion's KL is a constant: its gradient (TDPO1) would move the policy away from it as well.
    kl_gap = pair["rejected_kl"] - pair["chosen_kl"].detach()
    return logistic(beta * (pair.margin() - tdpo_alpha * kl_gap))


@preference_loss("beta_dpo")
def beta_dpo_loss(
    pair: Pair,
    beta: float = 0.1,
    *,
    beta_dpo_alpha: float = 0.6,
    threshold: float = 0.0,
    batch_margin: float | Tensor | None = None,
) -> Tensor:
    r"""Beta-DPO: beta is adapted to the mean margin of the batch.

    .. math:: \ell(\beta'\Delta),\; \beta' = \beta\,[1 + \alpha(\bar M - M_0)],\; M = \beta\Delta

    Args:
        pair: chosen and rejected completions.
        beta: > 0, before it is adapted.
        beta_dpo_alpha: >= 0, alpha.
        threshold: M_0; the paper keeps a running mean of M there.
        batch_margin: M-bar, a number: the mean of M over all pairs that count on all ranks. By default it is the mean
            of the batch that is passed, in which a masked pair counts as a margin of 0: pass it with a mask.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> beta_dpo_loss(z + 10, z, z, z, beta_dpo_alpha=0.5)    # beta 0.15
        tensor(0.2014)

    Source: arXiv 2407.08639.
    """
    check_range("beta_dpo_alpha", beta_dpo_alpha, 0.0, math.inf)
    margin = pair.margin()
    if batch_margin is None:
        # Detached: otherwise raising beta would be another way to lower the loss.
        batch_margin = beta * margin.detach().mean()
    # A caller's mean may be a plain number or a tensor; clamp needs the latter.
    beta_scale = torch.as_tensor(
        1 + beta_dpo_alpha * (batch_margin - threshold), dtype=margin.dtype, device=margin.device
    )
    # A batch of very bad pairs would turn the loss around: beta stays positive.
    return logistic(beta * beta_scale.clamp(min=1e-3) * margin)


@preference_loss("f_dpo")
def f_dpo_loss(
    pair: Pair, beta: float = 0.1, *, f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float = 0.5
) -> Tensor:
    r"""DPO with another divergence from the reference than reverse KL.

    .. math:: \ell(\beta(g(s_w) - g(s_l)))

    with g(s) = s for ``"reverse_kl"`` (DPO), :math:`-e^{-s}` for ``"forward_kl"``, :math:`\log\sigma(s)` for
    ``"js"`` and :math:`(1 - e^{-\alpha s})/\alpha` for ``"alpha"`` (alpha → 0 is reverse, alpha = 1 forward KL).

    Args:
        pair: chosen and rejected completions.
        beta: > 0; larger keeps the policy nearer to the reference.
        f_divergence_type: ``"reverse_kl"``, ``"forward_kl"``, ``"js"`` or ``"alpha"``.
        f_alpha_divergence_coef: > 0, alpha.
    Returns:
        The loss of each pair, [S], before the reduction.
    Example:
        >>> z = torch.zeros(1)
        >>> f_dpo_loss(z + 1, z, z, z, beta=1.0, f_divergence_type="js")
        tensor(0.5211)

    Source: arXiv 2309.16240 table 1. Differs from TRL 1.16, whose alpha divergence is that of 1 - alpha. Exponents
    stop at 80, so that a hopeless pair stays finite.
    """
    check_range("f_alpha_divergence_coef", f_alpha_divergence_coef, 0.0, math.inf, open_low=True)
    alpha = f_alpha_divergence_coef
    score_functions: dict[str, Callable[[Tensor], Tensor]] = {
        "reverse_kl": lambda log_ratio: log_ratio,
        # Constants that TRL adds (1 and log 2) cancel in the difference of two scores.
        "forward_kl": lambda log_ratio: -torch.exp((-log_ratio).clamp(max=MAX_EXPONENT)),
        # Bounded above, as forward_kl is: a chosen answer far above the reference gains nothing more.
        "js": F.logsigmoid,
        # expm1 keeps the digits as alpha goes to 0, where the score tends to the log-ratio.
        "alpha": lambda log_ratio: -torch.expm1((-alpha * log_ratio).clamp(max=MAX_EXPONENT)) / alpha,
    }
    if f_divergence_type not in score_functions:
        raise ValueError(f"f_divergence_type must be one of {', '.join(score_functions)}, got {f_divergence_type!r}")
    score_function = score_functions[f_divergence_type]
    chosen_ratio, rejected_ratio = pair.log_ratios()
    return logistic(beta * (score_function(chosen_ratio) - score_function(rejected_ratio)))
