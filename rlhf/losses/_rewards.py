"""Losses of reward models: on the scores of a pair, or of a ranking."""

import math

import torch
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape
from rlhf.losses._preference import logistic, smoothed
from rlhf.losses._reduction import reducible


@reducible("chosen_rewards", "rejected_rewards")
def reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    margin: float | Tensor = 0.0,
    *,
    center_rewards_coefficient: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Bradley–Terry: raises the reward of the chosen answer above that of the rejected one.

    .. math:: \ell(r_w - r_l - m) + c\,(r_w + r_l)^2

    Args:
        chosen_rewards: [S], scores of a reward model; carry the gradient.
        rejected_rewards: [S], the same for the rejected answers.
        margin: [S] or a number, how far apart they should be.
        center_rewards_coefficient: >= 0, c; 0.01 keeps rewards around 0, which Bradley–Terry leaves open.
        label_smoothing: chance that a pair is flipped, in [0, 0.5).
    Returns:
        Scalar, or [S] for ``"none"``; at least float32; log 2 for equal rewards (c = 0); 0 if nothing counts.
    Raises:
        ValueError: shapes differ, or a hyper-parameter is out of range.
    Example:
        >>> reward_loss(torch.tensor([1.0]), torch.tensor([1.0]), center_rewards_coefficient=0.01)
        tensor(0.7331)

    Source: Bradley and Terry 1952; margin arXiv 2307.09288 eq. 2; centring arXiv 2312.09244.
    """
    check_range("center_rewards_coefficient", center_rewards_coefficient, 0.0, math.inf)
    check_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    losses = smoothed(logistic, chosen_rewards - rejected_rewards - margin, label_smoothing)
    # Differences leave a constant of all rewards open, and it drifts; RL adds rewards to a KL, where it matters.
    return losses + center_rewards_coefficient * (chosen_rewards + rejected_rewards) ** 2


@reducible("scores")
def plackett_luce_loss(scores: Tensor) -> Tensor:
    r"""Plackett–Luce: negative log-likelihood of a ranking of k answers, best first.

    .. math:: -\sum_{i=1}^{k-1} \log\frac{e^{s_i}}{\sum_{j\ge i} e^{s_j}}

    Args:
        scores: [..., k], ordered from the best answer to the worst: rewards, or ``beta * (logps - ref_logps)``.
    Returns:
        Scalar, or [...] for ``"none"``; at least float32; log k! for equal scores; k = 2 is :func:`reward_loss`.
    Raises:
        ValueError: fewer than two answers.
    Example:
        >>> plackett_luce_loss(torch.zeros(1, 3))
        tensor(1.7918)

    Source: Plackett 1975; for DPO arXiv 2305.18290 appendix A.3.
    """
    if scores.dim() == 0 or scores.size(-1) < 2:
        raise ValueError(f"scores must be [..., k] with k >= 2 answers, best first; got {tuple(scores.shape)}")
    log_remaining = torch.logcumsumexp(scores.flip(-1), -1).flip(-1)  # over each answer and those below it
    # The last answer has no other left to be compared with: its term is 0.
    return (log_remaining - scores)[..., :-1].sum(-1)
