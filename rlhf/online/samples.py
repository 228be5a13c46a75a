"""What on-policy training learns from: completions with their rewards, and from those to advantages."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.data import Batch
from rlhf.data.batch import IGNORE
from rlhf.data.messages import Turns
from rlhf.losses import ADVANTAGE_ESTIMATORS, rewards_of_tokens, whiten


@dataclass
class Sample:
    """One completion with its N sampled tokens.

    Args:
        group: the number of its prompt in the rollout.
        row: of the data.
        prompt_ids: tokens before the completion.
        ids: tokens of the completion; in an episode, those of the environment too.
        sampled: which of ``ids`` the policy sampled; None for all.
        completion: as reward functions get it, text or messages.
        truncated: cut by length, not ended by the policy.
        tokens: by name, a float32 [N], as far as it is needed: ``sampler_logps``, ``old_logps``, ``ref_logps``,
            ``values``, ``entropy``, ``high_entropy`` (1 or 0), ``advantages``, ``returns``.
        reward: weighted sum of its components; NaN if there is none.
        reward_components: by reward function.
        extra: columns that reward functions logged.
        in_loss: False leaves its tokens out of the loss.
        version: of the weights that sampled it, the oldest if there were several: the number of rollouts that the
            policy had been trained on.
    """

    group: int
    row: dict[str, Any]
    prompt_ids: list[int]
    ids: list[int]
    sampled: list[bool] | None
    completion: Turns
    truncated: bool
    tokens: dict[str, Tensor]
    reward: float = float("nan")
    reward_components: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    in_loss: bool = True
    version: int = 0

    def __len__(self) -> int:
        """Tokens that the policy sampled."""
        return len(self.ids) if self.sampled is None else sum(self.sampled)

    @property
    def labels(self) -> list[int]:
        """``ids``, with IGNORE in place of tokens that the policy did not sample."""
        if self.sampled is None:
            return self.ids
        return [token if is_sampled else IGNORE for token, is_sampled in zip(self.ids, self.sampled, strict=True)]


def plain_samples(samples: Any) -> Any:
    """Samples as plain values, for a checkpoint.

    Args:
        samples: nested lists of them.

    Returns:
        Lists of the same shape, with the fields of each by name.
    """
    return [plain_samples(item) for item in samples] if isinstance(samples, list) else dict(vars(samples))


def samples_of(plain: Any) -> Any:
    """Samples from what :func:`plain_samples` returned.

    Args:
        plain: nested lists of fields by name.

    Returns:
        Lists of the same shape.
    """
    return [samples_of(item) for item in plain] if isinstance(plain, list) else Sample(**plain)


@dataclass(frozen=True, eq=False)
class RolloutBatch(Batch):
    """Samples in the layout of the policy.

    ``per_token`` has their token vectors, and ``in_loss``: True for a token that counts.

    Args:
        lengths: tokens that count in each of the S sequences; numbers of the host, so that reading them waits for
            nothing.
        is_first_step: the policy is still the one that sampled.
    """

    lengths: tuple[int, ...] = ()
    is_first_step: bool = False


def collate_samples(samples: list[Sample], collate: Any, is_first_step: bool = False) -> RolloutBatch:
    """Lay out samples as a batch.

    Args:
        samples: of a micro-batch, those of a group side by side: they share the tokens of their prompt.
        collate: a :class:`rlhf.data.Collator`.
        is_first_step: the policy is still the one that sampled.
    Returns:
        The batch, on the host.
    """
    rows: list[dict[str, Any]] = []
    previous = None
    for sample in samples:
        # An environment may give the samples of one group different prompts.
        prompt = (sample.group, sample.prompt_ids)
        if prompt != previous:
            rows.append({"prompt_ids": sample.prompt_ids, "completions": [], "labels": []})
        rows[-1]["completions"].append(sample.ids)
        rows[-1]["labels"].append(sample.labels)
        previous = prompt
    names = sorted(set.intersection(*(set(sample.tokens) for sample in samples)))
    per_token = {name: torch.cat([sample.tokens[name] for sample in samples]) for name in names}
    # A sequence out of the loss stays in the batch, so that all processes run as many micro-batches.
    per_token["in_loss"] = torch.cat([torch.full((len(sample),), sample.in_loss) for sample in samples])
    lengths = tuple(len(sample) * sample.in_loss for sample in samples)
    batch: Batch = collate(rows)
    return RolloutBatch(**vars(batch) | {"per_token": per_token}, lengths=lengths, is_first_step=is_first_step)


class MinibatchSchedule:
    """The micro-batches of a rollout in the order of their optimizer steps.

    A rollout is divided into minibatches, one for each optimizer step, and a minibatch into micro-batches. Minibatches
    keep their samples from pass to pass, and only their order changes, so that nothing depends on the number of
    processes.

    Args:
        micro_batch_size: samples of a micro-batch on this process.
        micro_batches_per_step: gradient accumulation steps.
        num_passes: over a rollout.
    """

    def __init__(self, micro_batch_size: int, micro_batches_per_step: int, num_passes: int) -> None:
        self.micro_batch_size, self.micro_batches_per_step = micro_batch_size, micro_batches_per_step
        self.num_passes = num_passes
        self.minibatches: list[list[list[Sample]]] = []
        self.remaining_steps: list[int] = []  # which minibatch each of them uses
        self.remaining_micro_batches: list[list[Sample]] = []  # of the current step
        self.is_first_step = False  # no step was taken since the rollout

    def divide(self, samples: list[Sample]) -> None:
        """Divide the samples of a new rollout."""
        # Samples are in the order of minibatches already, each process's share of every one.
        micro_batches = _split(samples, self.micro_batch_size)
        self.minibatches = _split(micro_batches, self.micro_batches_per_step)

    def order_steps(self, num_minibatches: int, seed: int) -> None:
        """Plan the optimizer steps: in order in the first pass, shuffled in each pass after it."""
        generator = torch.Generator().manual_seed(seed)
        self.remaining_steps = list(range(num_minibatches))
        for _ in range(self.num_passes - 1):
            self.remaining_steps += torch.randperm(num_minibatches, generator=generator).tolist()
        self.is_first_step = True

    def next_step(self) -> None:
        """Go on with the next planned step."""
        self.remaining_micro_batches = list(self.minibatches[self.remaining_steps.pop(0)])


def _split(items: list[Any], size: int) -> list[Any]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def kl_penalties(samples: list[Sample]) -> list[Tensor]:
    """``log(pi / pi_ref)`` of each sampled token, which is k1: [N] each."""
    return [sample.tokens["old_logps"] - sample.tokens["ref_logps"] for sample in samples]


def add_advantages(
    samples: list[Sample],
    estimator: str,
    *,
    kl_coef: float = 0.0,
    whitened: bool = True,
    whitened_rewards: bool = False,
    normalized: bool = False,
    device: torch.device | str = "cpu",
    **offered: Any,
) -> None:
    r"""Give each sample the token vector ``advantages``, and ``returns`` where there is a critic.

    Token rewards are :math:`-\beta\,\log(\pi/\pi_{ref})`, if ``kl_coef`` is not 0, and the sample's reward on its last
    sampled token. With several processes, means and deviations are those of all their samples; a group is on one.

    Args:
        samples: of a whole rollout.
        estimator: of :data:`rlhf.losses.ADVANTAGE_ESTIMATORS`.
        kl_coef: >= 0, beta of the penalty.
        whitened: advantages of tokens get mean 0 and variance 1 over all tokens.
        whitened_rewards: rewards get variance 1 over all samples, before KL; their mean stays.
        normalized: advantages of samples get mean 0 and variance 1 over all samples.
        device: where processes exchange sums.
        offered: what else an estimator can read: ``gamma``, ``lam``, ``scale``, ``baselines`` [S],
            ``reward_weights`` by reward function.
    """
    # A sample without a reward is in no baseline, and gets the advantage 0.
    task_rewards = torch.tensor([sample.reward for sample in samples], device=device)
    has_reward = ~task_rewards.isnan()
    if whitened_rewards:
        scaled_rewards = whiten(task_rewards, mask=has_reward, shift_mean=False, gather=True)
        task_rewards = scaled_rewards.masked_fill(~has_reward, torch.nan)
    lengths = torch.tensor([len(sample) for sample in samples], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    in_loss = torch.tensor([sample.in_loss for sample in samples], device=device)
    # The tokens that get an advantage: those of samples with a reward, in the loss.
    counted = mask & (has_reward & in_loss)[:, None]

    # An estimator is called with those of the offered values that it names in its parameters.
    estimate = ADVANTAGE_ESTIMATORS.find(estimator)
    penalties = torch.zeros(mask.shape, device=device)
    if kl_coef:
        penalties = -kl_coef * _dense(kl_penalties(samples)).to(device)
    offered |= {
        "rewards": task_rewards + penalties.sum(1),
        "task_rewards": task_rewards,
        "token_rewards": rewards_of_tokens(task_rewards, penalties, mask),
        "penalties": penalties,
        "mask": mask,
        "group": torch.tensor([sample.group for sample in samples], device=device),
        "gather": True,
    }
    if "values" in estimate.reads:
        offered["values"] = _dense([sample.tokens["values"] for sample in samples]).to(device)
    if "reward_components" in estimate.reads:
        offered["reward_components"] = _reward_components(samples, device)

    estimates = estimate(**offered)
    if isinstance(estimates, tuple):  # an estimator with a critic has targets for it too
        advantages, returns = estimates
        _give(samples, "returns", returns)
    else:
        advantages = estimates
    # [S, longest], one for each token, or [S], one for each sample.
    if advantages.dim() == 2:
        if whitened:
            advantages = whiten(advantages, mask=counted, gather=True)
    else:
        if normalized:
            advantages = whiten(advantages, mask=has_reward, gather=True)
        advantages = advantages[:, None].expand(mask.shape)
    _give(samples, "advantages", torch.where(counted, advantages, 0.0))
    for sample, usable in zip(samples, has_reward.tolist(), strict=True):
        sample.in_loss = sample.in_loss and usable


def _reward_components(samples: list[Sample], device: torch.device | str) -> dict[str, Tensor]:
    """The rewards of each function, [S]."""
    columns = {name: [sample.reward_components[name] for sample in samples] for name in samples[0].reward_components}
    return {name: torch.tensor(column, device=device) for name, column in columns.items()}


def mark_high_entropy(samples: list[Sample], share: float, gather: Callable[[list[Any]], list[Any]]) -> None:
    """Replace the token vector ``entropy`` by ``high_entropy``: 1 for the tokens of the highest entropy, else 0.

    Args:
        samples: with the token vector ``entropy``.
        share: of all tokens in the loss, in [0, 1]; 0 leaves the token of the highest entropy alone.
        gather: joins the lists of all processes.

    Source: arXiv 2506.01939.
    """
    entropies = [entropy for sample in samples if sample.in_loss for entropy in sample.tokens["entropy"].tolist()]
    all_entropies = torch.tensor(sorted(gather(entropies)), dtype=torch.float64)
    # The quantile of all processes' tokens: the share does not depend on how samples are spread.
    threshold = float(all_entropies.quantile(1 - share)) if len(all_entropies) else 0.0
    for sample in samples:
        entropy = sample.tokens.pop("entropy")
        sample.tokens["high_entropy"] = (entropy.double() >= threshold).to(entropy.dtype)


def select_of_groups(samples: list[Sample], with_worst: bool) -> list[Sample]:
    """The best sample of each group, and the worst after it if asked for.

    A group of equal (or no) rewards has no best: its first (and last) sample is selected, and left out of the loss.

    Args:
        samples: with rewards.
        with_worst: select pairs.
    Returns:
        One or two samples of each group.
    """
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    selected = []
    for members in groups.values():
        # Without any reward, any member will do: the group is left out of the loss.
        rewarded_samples = [sample for sample in members if not math.isnan(sample.reward)]
        best = max(rewarded_samples, key=lambda sample: sample.reward, default=members[0])
        worst = min(rewarded_samples, key=lambda sample: sample.reward, default=members[-1])
        has_preference = best.reward > worst.reward
        if not has_preference:
            best, worst = members[0], members[-1]
        for sample in (best, worst) if with_worst else (best,):
            sample.in_loss = sample.in_loss and has_preference
            selected.append(sample)
    return selected


def groups_with_reward_variance(samples: Sequence[Sample]) -> set[int]:
    """Numbers of the groups whose rewards are not all the same; a sample without a reward does not count."""
    rewards_of_group: dict[int, set[float]] = {}
    for sample in samples:
        if not math.isnan(sample.reward):
            rewards_of_group.setdefault(sample.group, set()).add(sample.reward)
    return {group for group, rewards in rewards_of_group.items() if len(rewards) > 1}


def zero_std_groups(samples: Sequence[Sample]) -> tuple[int, int]:
    """How many groups have equal rewards, and how many groups there are."""
    num_groups = len({sample.group for sample in samples})
    return num_groups - len(groups_with_reward_variance(samples)), num_groups


# Between lists of samples and dense tensors


def _dense(vectors: list[Tensor]) -> Tensor:
    return pad_sequence(vectors, batch_first=True)


def _give(samples: list[Sample], name: str, dense: Tensor) -> None:
    for sample, padded_vector in zip(samples, dense.cpu(), strict=True):
        # A copy: a slice would keep the whole table in memory, and in each checkpoint.
        sample.tokens[name] = padded_vector[: len(sample)].clone()
