"""Advantage estimators, importance weights, and the controller of the KL coefficient.

Estimators are found by name in :data:`ADVANTAGE_ESTIMATORS`. An estimator is passed what its parameters name:

* ``rewards``: [S], the reward of each completion, with the KL penalty of its tokens; NaN where there is none;
* ``group``: int64 [S], the prompt of each completion;
* ``task_rewards``: [S], without the KL penalty;
* ``reward_components``: the rewards of each reward function, a dictionary of [S]; ``reward_weights``: their weights;
* ``token_rewards``: [S, T], the KL penalty of each token, plus the reward of the task at the last one;
* ``penalties``: [S, T], the KL penalty alone (negative where the policy has moved away from the reference);
* ``mask``: bool [S, T], True for the tokens that the policy sampled;
* ``values``: [S, T], the values of a critic, which is trained if the estimator has this parameter;
* ``baselines``: [S], the reward of a greedy completion of each prompt, sampled if the estimator has this parameter;
* ``gamma``, ``lam``, ``scale``: the options of the trainer; ``gather``: True; statistics are taken over all processes.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import update_wrapper
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape, check_tensors
from rlhf.losses._policy import MAX_LOG_RATIO
from rlhf.losses._reduction import upcast
from rlhf.losses.registry import Registry, arguments_of

# The contract between rollouts and estimators: an estimator may require these names and no others.
OFFERED = (
    "rewards", "group", "task_rewards", "reward_components", "reward_weights", "token_rewards", "penalties", "mask",
    "values", "baselines", "gamma", "lam", "scale", "gather",
)  # fmt: skip


class AdvantageEstimator:
    """An advantage estimator: a function that is called with the values of a rollout that its parameters name.

    Args:
        function: returns advantages, [S] for completions or [S, T] for tokens; or ``(advantages, returns)``, where
            returns are the targets of a critic, [S, T].
        needs_group: it compares the completions of a prompt, so there must be several.
    Raises:
        ValueError: it needs a parameter that no rollout has.
    """

    __name__: str

    def __init__(self, function: Callable[..., Any], *, needs_group: bool = False) -> None:
        update_wrapper(self, function)
        self.function, self.needs_group = function, needs_group
        parameters = inspect.signature(function).parameters.values()
        self.reads = tuple(parameter.name for parameter in parameters if parameter.name in OFFERED)
        # A parameter with a default may have any name: it is a setting of the estimator, such as eps.
        # One without would only fail in the first rollout, after minutes of sampling: so it is refused here.
        for parameter in parameters:
            is_named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if is_named and parameter.default is parameter.empty and parameter.name not in OFFERED:
                raise ValueError(
                    f"advantage_estimator {self.__name__} reads {parameter.name}, which is none of {', '.join(OFFERED)}"
                )

    @property
    def is_per_token(self) -> bool:
        """Whether the tokens of a completion have advantages of their own."""
        return bool({"token_rewards", "penalties"} & set(self.reads))

    def __call__(self, **offered: Any) -> Tensor | tuple[Tensor, Tensor]:
        return self.function(**arguments_of(self.function, offered))


ADVANTAGE_ESTIMATORS: Registry[AdvantageEstimator] = Registry("advantage_estimator", AdvantageEstimator)
"""Estimators by name. Filled by :func:`advantage_estimator`."""


def advantage_estimator(name: str, *, needs_group: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an advantage estimator.

    Args:
        name: its key in :data:`ADVANTAGE_ESTIMATORS`, and what ``--advantage_estimator`` takes.
        needs_group: it compares the completions of a prompt: ``--num_generations`` must be 2 or more.
    Returns:
        A decorator that returns the function as it is. The docstring of the module lists the parameters that it can
        have.
    Example:
        >>> @advantage_estimator("best", needs_group=True)
        ... def beats_the_mean(rewards, group):
        ...     return (group_advantages(rewards, group, "none") > 0).float()
        >>> ADVANTAGE_ESTIMATORS["best"](rewards=torch.tensor([1.0, 2.0]), group=torch.tensor([0, 0]), gamma=1.0)
        tensor([0., 1.])
        >>> del ADVANTAGE_ESTIMATORS["best"]
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ADVANTAGE_ESTIMATORS[name] = AdvantageEstimator(function, needs_group=needs_group)
        return function

    return register


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimation (GAE).

    .. math:: A_t = \delta_t + \gamma\lambda A_{t+1},\; \delta_t = r_t + \gamma V_{t+1} - V_t,\; R_t = A_t + V_t

    Args:
        rewards: [..., T], of each token.
        values: [..., T]; ``values[..., t]`` is the critic's before token t. After the last token V is 0.
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1].
        mask: [..., T], True counts. A token that does not count (a tool's answer, padding on either side) is skipped:
            the next value and the running sum pass through it unchanged, without decay.
    Returns:
        ``(advantages, returns)``, [..., T], at least float32, 0 where the mask is False. No gradient.
    Raises:
        ValueError: shapes differ, gamma or lam outside [0, 1].
    Example:
        >>> gae(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), lam=1.0)
        (tensor([0.5000, 0.5000]), tensor([1., 1.]))

    Source: arXiv 1506.02438 eq. 16.
    """
    # check_range excludes the upper end, but 1 (no discount) is the usual value for both.
    check_range("gamma", gamma, 0.0, 1.0 + 1e-12)
    check_range("lam", lam, 0.0, 1.0 + 1e-12)
    check_same_shape(rewards=rewards, values=values, mask=mask)
    rewards, values = upcast(rewards), upcast(values)
    visible = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    rewards, values = torch.where(visible, rewards, 0.0), torch.where(visible, values, 0.0)
    advantages = torch.zeros_like(rewards)
    # The value after the last token is 0, for a completion cut off at the length limit too: nothing is bootstrapped.
    running_advantage = next_value = torch.zeros_like(rewards[..., 0])
    # From the end: each advantage is built on the one after it.
    for position in reversed(range(rewards.size(-1))):
        is_visible = visible[..., position]
        delta = rewards[..., position] + gamma * next_value - values[..., position]
        # At a token that does not count, both pass through to the token before it.
        running_advantage = torch.where(is_visible, delta + gamma * lam * running_advantage, running_advantage)
        next_value = torch.where(is_visible, values[..., position], next_value)
        advantages[..., position] = torch.where(is_visible, running_advantage, 0.0)
    return advantages, torch.where(visible, advantages + values, 0.0)


@advantage_estimator("gae")
def _gae_of_tokens(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`gae` of the values of a rollout."""
    return gae(token_rewards, values, gamma, lam, mask=mask)


@torch.no_grad()
def whiten(
    values: Tensor, *, mask: Tensor | None = None, shift_mean: bool = True, gather: bool = False, eps: float = 1e-8
) -> Tensor:
    """Scales values to mean 0 and variance 1 over the elements that count.

    Args:
        values: any shape.
        mask: same shape, bool; True counts.
        shift_mean: False scales only, and keeps the mean (for rewards, whose sign matters).
        gather: under ``torch.distributed``, the mean and variance are those of all ranks' values together.
        eps: added to the variance.
    Returns:
        Same shape, at least float32, 0 where the mask is False. Equal values become 0 (unshifted, they stay).
    Raises:
        ValueError: shapes differ.
    Example:
        >>> whiten(torch.tensor([1.0, 3.0]))
        tensor([-1.,  1.])

    Source: arXiv 1909.08593's code; the variance is the biased one (divided by the count).
    """
    check_same_shape(values=values, mask=mask)
    values = upcast(values)
    visible = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    values = torch.where(visible, values, 0.0)

    # The totals run over hidden elements too, which are 0 by now; a NaN reward there would make every result NaN.
    # If nothing counts, the divisor is 1 and all results are 0.
    num_visible = _total(visible, gather).clamp(min=1)
    mean = _total(values, gather) / num_visible
    # In a second pass: the mean square less the squared mean would cancel.
    squared_deviations = torch.where(visible, (values - mean) ** 2, 0.0)
    variance = _total(squared_deviations, gather) / num_visible
    whitened = (values - mean) / (variance + eps).sqrt()
    # The totals are float64; the result goes back to the dtype of the values.
    return torch.where(visible, whitened if shift_mean else whitened + mean, 0.0).to(values.dtype)


@advantage_estimator("group", needs_group=True)
@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    group: Tensor,
    scale: Literal["group", "batch", "none"] = "group",
    *,
    gather: bool = False,
    eps: float = 1e-4,
) -> Tensor:
    r"""GRPO: the reward of a completion against the mean of its group, divided by a standard deviation.

    .. math:: A_i = \frac{r_i - \mathrm{mean}_g}{\mathrm{std} + \epsilon}

    Args:
        rewards: [S]; NaN where there is none: such a completion is left out and has the advantage 0.
        group: int64 [S], the prompt of each completion.
        scale: divide by the standard deviation of the group (GRPO), of the batch, or not at all (Dr. GRPO).
        gather: under ``torch.distributed``, the batch is that of all ranks together; a group is on one rank.
        eps: added to the standard deviation.
    Returns:
        [S], at least float32; 0 in a group whose rewards are equal. No gradient.
    Raises:
        ValueError: shapes differ, an unknown scale, or a group of one, whose advantage would always be 0.
    Example:
        >>> group_advantages(torch.tensor([1.0, 3.0, 2.0, 2.0]), torch.tensor([0, 0, 1, 1]), "none")
        tensor([-1.,  1.,  0.,  0.])

    Source: arXiv 2402.03300 §4.1; without scale arXiv 2503.20783. The deviation is the unbiased one, as TRL's.
    """
    rewards, has_reward, group_index, num_known = _grouped(rewards, group)
    group_mean = _sums(rewards, group_index, len(num_known)) / num_known.clamp(min=1)
    centred = torch.where(has_reward, rewards - group_mean[group_index], 0.0)
    match scale:
        # Dr. GRPO: dividing by the deviation favours prompts that are nearly always or nearly never solved.
        case "none":
            return centred
        case "group":
            # A group with one known reward has no deviation: its advantage is 0 / eps = 0, not 0 / 0.
            variance = _sums(centred**2, group_index, len(num_known)) / (num_known - 1).clamp(min=1)
            return centred / (variance.sqrt()[group_index] + eps)
        case "batch":
            num_rewards = _total(has_reward, gather)
            batch_mean = _total(rewards, gather) / num_rewards.clamp(min=1)
            # The deviation is from the mean of the batch, although the numerator is centred in its group; so is TRL's.
            deviations = torch.where(has_reward, rewards - batch_mean, 0.0)
            variance = _total(deviations**2, gather) / (num_rewards - 1).clamp(min=1)
            # A single reward has no deviation.
            return (centred / (variance.sqrt() + eps)).to(centred.dtype) if num_rewards > 1 else centred
    raise ValueError(f'scale must be "group", "batch" or "none", got {scale!r}')


@advantage_estimator("rloo", needs_group=True)
@torch.no_grad()
def rloo_advantages(rewards: Tensor, group: Tensor) -> Tensor:
    r"""RLOO: the reward of a completion minus the mean reward of the *others* of its prompt.

    .. math:: A_i = r_i - \frac{1}{k-1}\sum_{j\ne i} r_j

    Args:
        rewards: [S]; NaN where there is none: such a completion is left out and has the advantage 0.
        group: int64 [S], the prompt of each completion.
    Returns:
        [S], at least float32. No gradient.
    Raises:
        ValueError: shapes differ, or a group of one.
    Example:
        >>> rloo_advantages(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]))
        tensor([-2.,  2.])

    Source: arXiv 2402.14740.
    """
    rewards, has_reward, group_index, num_known = _grouped(rewards, group)
    # The mean of the others does not depend on this completion, so the gradient stays unbiased.
    # A mean over the whole group would shrink the gradient by (k - 1) / k.
    group_sums = _sums(rewards, group_index, len(num_known))[group_index]
    mean_of_others = (group_sums - rewards) / (num_known[group_index] - 1).clamp(min=1)
    # A completion whose partners have no rewards has no baseline.
    has_others = num_known[group_index] > 1
    return torch.where(has_reward & has_others, rewards - mean_of_others, 0.0)


@advantage_estimator("reinforce++")
@torch.no_grad()
def reward_to_go(token_rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    r"""REINFORCE++: the discounted sum of the rewards from each token on.

    .. math:: A_t = \sum_{u\ge t} \gamma^{u-t} r_u

    Args:
        token_rewards: [..., T].
        mask: [..., T], True counts.
        gamma: discount, in [0, 1].
    Returns:
        [..., T], at least float32, 0 where the mask is False. No gradient.
    Example:
        >>> reward_to_go(torch.tensor([1.0, 2.0]), torch.tensor([True, True]), gamma=0.5)
        tensor([2., 2.])

    Source: arXiv 2501.03262.
    """
    check_tensors(token_rewards=token_rewards)
    # Without a critic and at lambda 1, generalised advantages are rewards to go.
    advantages, _ = gae(token_rewards, torch.zeros_like(token_rewards), gamma, 1.0, mask=mask)
    return advantages


@advantage_estimator("reinforce++_baseline", needs_group=True)
@torch.no_grad()
def reward_to_go_of_group(
    task_rewards: Tensor, group: Tensor, penalties: Tensor, mask: Tensor, gamma: float = 1.0
) -> Tensor:
    r"""REINFORCE++ with a baseline: the mean reward of the group is subtracted first.

    Args:
        task_rewards: [S], without the KL penalty.
        group: int64 [S], the prompt of each completion.
        penalties: [S, T], the KL penalty of each token.
        mask: [S, T], True counts.
        gamma: discount, in [0, 1].
    Returns:
        [S, T], at least float32, 0 where the mask is False. No gradient.
    Example:
        >>> rewards, group, zeros = torch.tensor([1.0, 3.0]), torch.tensor([0, 0]), torch.zeros(2, 2)
        >>> reward_to_go_of_group(rewards, group, zeros, zeros == 0)
        tensor([[-1., -1.],
                [ 1.,  1.]])

    Source: arXiv 2501.03262.
    """
    # Centred before the penalties are added: a penalty belongs to its token, and the group does not share it.
    centred = group_advantages(task_rewards, group, "none")
    return reward_to_go(rewards_of_tokens(centred, penalties, mask), mask, gamma)


@advantage_estimator("remax")
@torch.no_grad()
def remax_advantages(rewards: Tensor, baselines: Tensor) -> Tensor:
    r"""ReMax: the reward minus that of a greedy completion of the prompt.

    Args:
        rewards: [S]; NaN where there is none.
        baselines: [S], the reward of a greedy completion.
    Returns:
        [S]; 0 where there is no reward.
    Example:
        >>> remax_advantages(torch.tensor([1.0, float("nan")]), torch.tensor([0.5, 0.5]))
        tensor([0.5000, 0.0000])

    Source: arXiv 2310.10505.
    """
    check_tensors(rewards=rewards, baselines=baselines)
    # The greedy reward does not depend on the sampled completion, so subtracting it adds no bias.
    # Without either reward there is nothing to compare, and the advantage is 0.
    return (rewards - baselines.to(rewards)).nan_to_num(0.0)


@advantage_estimator("best_of_n", needs_group=True)
@advantage_estimator("pairs", needs_group=True)
def uniform_advantages(rewards: Tensor) -> Tensor:
    """An advantage of 1 for each completion, for completions that rewards have already selected.

    Args:
        rewards: [S].
    Returns:
        [S].
    Example:
        >>> uniform_advantages(torch.tensor([0.3, 0.7]))
        tensor([1., 1.])
    """
    check_tensors(rewards=rewards)
    return torch.ones_like(rewards)


@advantage_estimator("gdpo", needs_group=True)
@torch.no_grad()
def gdpo_advantages(
    rewards: Tensor,
    reward_components: Mapping[str, Tensor],
    reward_weights: Mapping[str, float],
    group: Tensor,
    *,
    gather: bool = False,
) -> Tensor:
    """GDPO: each reward is divided by its own standard deviation in the group; the sum is whitened.

    Args:
        rewards: [S]; NaN where a completion does not count.
        reward_components: [S] each, by name; NaN where there is none.
        reward_weights: by the same names.
        group: int64 [S], the prompt of each.
        gather: under ``torch.distributed``, the sum is whitened over all processes.
    Returns:
        [S], at least float32; 0 where a completion does not count. No gradient.
    Example:
        >>> components = {"small": torch.tensor([0.0, 0.1]), "large": torch.tensor([9.0, 0.0])}
        >>> sums = components["small"] + components["large"]
        >>> gdpo_advantages(sums, components, {"small": 2.0, "large": 1.0}, torch.tensor([0, 0]))
        tensor([-1.,  1.])

    Source: arXiv 2601.05242.
    """
    check_tensors(rewards=rewards, group=group)
    # In the plain sum a reward with a large range would hide the others.
    weighted_sum = torch.zeros_like(rewards)
    for name, weight in reward_weights.items():
        # A missing component gets 0 here: it counts neither for nor against the completion.
        weighted_sum = weighted_sum + weight * group_advantages(reward_components[name], group)
    # TRL divides by the unbiased deviation plus 1e-4 instead: a constant factor near 1, the same for all completions.
    return whiten(weighted_sum, mask=~rewards.isnan(), gather=gather)


def rewards_of_tokens(task_rewards: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """The reward of each token: its penalty, plus the reward of the task at the last token that counts.

    Args:
        task_rewards: [S]; NaN counts as 0.
        penalties: [S, T].
        mask: bool [S, T], True counts; the tokens that count come first.
    Returns:
        [S, T].
    Example:
        >>> penalties, mask = torch.tensor([[-0.1, -0.2, 0.0]]), torch.tensor([[True, True, False]])
        >>> rewards_of_tokens(torch.tensor([2.0]), penalties, mask)
        tensor([[-0.1000,  1.8000,  0.0000]])
    """
    check_tensors(task_rewards=task_rewards, penalties=penalties, mask=mask)
    # A completion without a token that counts gives -1, the last column: hidden, so nothing reads the reward there.
    last_token = mask.sum(1) - 1
    token_rewards = penalties.clone()
    # A NaN reward would spread from the last token to all tokens before it.
    token_rewards[torch.arange(len(last_token), device=last_token.device), last_token] += task_rewards.nan_to_num(0.0)
    return token_rewards


def truncated_importance_weights(
    old_logps: Tensor, sampling_logps: Tensor, cap: float = 2.0, *, beyond: Literal["cap", "zero"] = "cap"
) -> Tensor:
    r"""Truncated importance weights, for a sampler whose probabilities differ from the trainer's.

    .. math:: \min(\pi_{old}/\pi_{sampler}, C)

    Args:
        old_logps: any shape, nats, by the trainer before its first update.
        sampling_logps: same shape, nats, by the sampler.
        cap: > 0, C.
        beyond: a larger weight becomes ``"cap"`` or ``"zero"`` (the token is left out).
    Returns:
        Same shape, at least float32, without gradient; pass it as ``weight`` of the losses of :data:`POLICY_LOSSES`.
    Raises:
        ValueError: shapes differ, ``cap <= 0``, or an unknown ``beyond``.
    Example:
        >>> truncated_importance_weights(torch.tensor([0.0, -1.0]), torch.tensor([-1.0, -1.0]))
        tensor([2., 1.])

    Source: truncated importance sampling, Ionides 2008; for language models Yao et al. 2025.
    """
    check_range("cap", cap, 0.0, float("inf"), open_low=True)
    check_same_shape(old_logps=old_logps, sampling_logps=sampling_logps)
    if beyond not in ("cap", "zero"):
        raise ValueError(f'beyond must be "cap" or "zero", got {beyond!r}')
    # The weight is a constant: the gradient of the policy's ratio is the loss's own matter.
    log_ratio = (upcast(old_logps) - upcast(sampling_logps)).detach()
    # No bound below: a token that the trainer thinks impossible rightly gets the weight 0.
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    # A weight of 0 removes the token from the sum but not from the divisor, so the others do not gain weight.
    return ratio.clamp(max=cap) if beyond == "cap" else torch.where(ratio > cap, 0.0, ratio)


class AdaptiveKLController:
    """Adapts a KL coefficient: it grows while the KL is above the target, and shrinks while it is below.

    Args:
        init_kl_coef: > 0, where it starts.
        target: > 0, KL of a whole sequence, nats.
        horizon: > 0, in sequences; the coefficient changes by at most 20 % in this time.
    Raises:
        ValueError: an argument out of range.
    Example:
        >>> controller = AdaptiveKLController(0.1, target=6.0, horizon=100)
        >>> round(controller.update(kl=12.0, n_steps=50), 4)    # 0.1 * (1 + 0.2 * 50 / 100)
        0.11

    Source: arXiv 1909.08593 §2.2.
    """

    def __init__(self, init_kl_coef: float = 0.2, target: float = 6.0, horizon: int = 10_000) -> None:
        for name, value in (("init_kl_coef", init_kl_coef), ("target", target), ("horizon", horizon)):
            check_range(name, value, 0.0, float("inf"), open_low=True)
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, kl: float, n_steps: int) -> float:
        """Take the mean KL of ``n_steps`` sequences (of all ranks); returns the new coefficient."""
        # A single rollout far off must not change the coefficient by more than a horizon's worth of 20 %.
        relative_error = min(max(kl / self.target - 1, -0.2), 0.2)
        # In sequences, so that the speed of adaptation does not depend on the batch size.
        self.value *= 1 + relative_error * n_steps / self.horizon
        return self.value


def _grouped(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_same_shape(rewards=rewards, group=group)
    rewards = upcast(rewards)
    has_reward = ~rewards.isnan()
    # Ids of prompts need not run from 0 without gaps.
    _, group_index, group_sizes = group.unique(return_inverse=True, return_counts=True)
    # Sizes, not counts: a group whose other rewards are missing is no mistake of the caller, and gets 0.
    if (group_sizes == 1).any():
        single_group = int(group[(group_sizes[group_index] == 1).nonzero()[0]])
        raise ValueError(f"group {single_group} has one completion: at least two are needed to compare")
    num_known = _sums(has_reward.to(rewards.dtype), group_index, len(group_sizes))
    return torch.where(has_reward, rewards, 0.0), has_reward, group_index, num_known


def _total(values: Tensor, gather: bool) -> Tensor:
    """The sum, in float64, so that it does not depend on how many processes share the values."""
    total = values.double().sum()
    if gather and dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


def _sums(values: Tensor, groups: Tensor, size: int) -> Tensor:
    return values.new_zeros(size).index_add(0, groups, values)
