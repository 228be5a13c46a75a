"""What on-policy training learns from: completions with their rewards, and from those to advantages."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.data import Batch
from rlhf.data.batch import IGNORE
from rlhf.data.formats import Turns
from rlhf.losses import gae, group_advantages, rloo_advantages, whiten

ESTIMATORS = ("gae", "rloo", "group", "reinforce++", "reinforce++_baseline", "remax", "best_of_n", "pairs")
NEED_GROUPS = ("rloo", "group", "reinforce++_baseline", "best_of_n", "pairs")


@dataclass
class Sample:
    """One completion.

    Args:
        group: the number of its prompt in the rollout. row: of the data.
        ids: what follows the prompt. sampled: which of them the policy wrote (not an environment); None for all.
        completion: as reward functions get it, text or messages.
        truncated: cut by length, not ended by the policy.
        reward: weighted sum; NaN where none could be had. each: by function. extra: what they had to say besides.
        learned: False leaves its tokens out of the loss.
        tokens: for each of its N sampled tokens, float32 [N]: ``sampler_logps``, ``old_logps``, ``ref_logps``,
            ``values``, ``advantages``, ``returns``, ``kept`` (1, or 0 for a token left out), as far as they are needed.
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
    each: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    learned: bool = True

    def __len__(self) -> int:
        return len(self.ids) if self.sampled is None else sum(self.sampled)

    @property
    def labels(self) -> list[int]:
        if self.sampled is None:
            return self.ids
        return [i if s else IGNORE for i, s in zip(self.ids, self.sampled, strict=True)]


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
    """Lay out samples; neighbours of one group share their prompt."""
    rows: list[dict[str, Any]] = []
    for index, sample in enumerate(samples):
        before = samples[index - 1]
        if index == 0 or (sample.group, sample.prompt_ids) != (before.group, before.prompt_ids):
            rows.append({"prompt_ids": sample.prompt_ids, "completions": [], "labels": []})
        rows[-1]["completions"].append(sample.ids)
        rows[-1]["labels"].append(sample.labels)
    names = set.intersection(*(set(sample.tokens) for sample in samples))
    per_token = {name: torch.cat([sample.tokens[name] for sample in samples]) for name in sorted(names)}
    per_token["in_loss"] = torch.cat([torch.full((len(sample),), sample.learned) for sample in samples])
    lengths = tuple(len(sample) * sample.learned for sample in samples)
    batch: Batch = collate(rows)
    return RolloutBatch(**vars(batch) | {"per_token": per_token}, lengths=lengths, is_first_step=is_first_step)


def kl_penalties(samples: list[Sample]) -> list[Tensor]:
    """``log(pi / pi_ref)`` of each sampled token, which is k1: [N] each."""
    return [sample.tokens["old_logps"] - sample.tokens["ref_logps"] for sample in samples]


def add_advantages(
    samples: list[Sample],
    estimator: str,
    *,
    kl_coef: float = 0.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    scale: Any = "group",
    whitened: bool = True,
    whitened_rewards: bool = False,
    baselines: Tensor | None = None,
    normalized: bool = False,
    weights: dict[str, float] | None = None,
    device: torch.device | str = "cpu",
) -> None:
    r"""Give each sample the token vector ``advantages``, and ``returns`` where there is a critic.

    Token rewards are :math:`-\beta\,\log(\pi/\pi_{ref})`, if ``kl_coef`` is not 0, and the sample's reward on its last
    sampled token. With several processes, means and deviations are those of all their samples; a group is on one.

    Args:
        estimator: ``gae``; ``rloo`` (the others of the group as the baseline), ``group`` (GRPO's), ``reinforce++``
            (reward to go, whitened) and its ``_baseline`` (less the group's mean first), ``remax`` (less
            ``baselines`` [S], the rewards of greedy answers); ``best_of_n`` and ``pairs`` need none: 1.
        kl_coef: beta of the penalty. gamma, lam: of :func:`rlhf.losses.gae`. scale: of
            :func:`rlhf.losses.group_advantages`.
        whitened: of ``gae`` and ``reinforce++``: mean 0 and variance 1 over all tokens. whitened_rewards: variance 1
            over all samples, before KL; the mean stays.
        normalized: of one advantage a sample: mean 0 and variance 1 over all samples.
        weights: of each reward; given, ``group`` divides each reward by its own deviation in the group before they are
            summed, and whitens the sum (GDPO, arXiv 2601.05242).
        device: where processes exchange sums.
    """
    rewards = torch.tensor([sample.reward for sample in samples], device=device)
    group = torch.tensor([sample.group for sample in samples], device=device)
    usable = ~rewards.isnan()
    if whitened_rewards:
        rewards = whiten(rewards, mask=usable, shift_mean=False, gather=True).masked_fill(~usable, torch.nan)
    lengths = torch.tensor([len(sample) for sample in samples], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    penalties = torch.zeros(mask.shape, device=device)
    if kl_coef:
        penalties = -kl_coef * _dense(kl_penalties(samples)).to(device)
    learned = torch.tensor([sample.learned for sample in samples], device=device)
    counted = mask & (usable & learned)[:, None]
    if estimator in ("gae", "reinforce++", "reinforce++_baseline"):
        if estimator == "reinforce++_baseline":
            rewards = group_advantages(rewards, group, "none")
        token_rewards = penalties.clone()
        last = torch.arange(len(samples), device=device), lengths - 1
        token_rewards[last] += rewards.nan_to_num(0.0)
        if estimator == "gae":
            values = _dense([sample.tokens["values"] for sample in samples]).to(device)
        else:
            values, lam = torch.zeros_like(token_rewards), 1.0
        advantages, returns = gae(token_rewards, values, gamma, lam, mask=mask)
        if whitened:
            advantages = whiten(advantages, mask=counted, gather=True)
        if estimator == "gae":
            _give(samples, "returns", returns)
    else:
        whole = rewards + penalties.sum(1)
        match estimator:
            case "rloo":
                by_sample = rloo_advantages(whole, group)
            case "group" if weights is not None:
                by_sample = _of_each_reward(samples, weights, group, usable)
            case "group":
                by_sample = group_advantages(whole, group, scale, gather=True)
            case "remax":
                assert baselines is not None
                by_sample = (whole - baselines.to(device)).nan_to_num(0.0)
            case _:
                by_sample = torch.ones_like(whole)
        if normalized:
            by_sample = whiten(by_sample, mask=usable, gather=True)
        advantages = by_sample[:, None].expand(mask.shape)
    _give(samples, "advantages", torch.where(counted, advantages, 0.0))
    for sample, fine in zip(samples, usable.tolist(), strict=True):
        sample.learned = sample.learned and fine


def _of_each_reward(samples: list[Sample], weights: dict[str, float], group: Tensor, usable: Tensor) -> Tensor:
    total = torch.zeros(len(samples), device=group.device)
    for name, weight in weights.items():
        each = torch.tensor([sample.each[name] for sample in samples], device=group.device)
        total += weight * group_advantages(each, group)
    return whiten(total, mask=usable, gather=True)


def keep_high_entropy(samples: list[Sample], share: float, gather: Callable[[list[Any]], list[Any]]) -> None:
    """Give each sample the token vector ``kept``: 1 for the share of all tokens that have the highest entropy, else 0.

    Args:
        samples: with the token vector ``entropy``. share: in [0, 1]; 0 keeps the highest token alone.
        gather: all processes' lists in one.

    Source: arXiv 2506.01939.
    """
    own = [value for sample in samples if sample.learned for value in sample.tokens["entropy"].tolist()]
    every = torch.tensor(sorted(gather(own)), dtype=torch.float64)
    threshold = float(every.quantile(1 - share)) if len(every) else 0.0
    for sample in samples:
        entropy = sample.tokens.pop("entropy")
        sample.tokens["kept"] = (entropy.double() >= threshold).to(entropy.dtype)


def keep_of_groups(samples: list[Sample], estimator: str) -> list[Sample]:
    """For ``best_of_n`` the best sample of each group, for ``pairs`` the best and then the worst.

    A group of equal (or no) rewards says nothing: its first samples stay, and are not learned.
    """
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    kept = []
    for members in groups.values():
        scored = [sample for sample in members if sample.reward == sample.reward]
        best = max(scored, key=lambda sample: sample.reward, default=members[0])
        worst = min(scored, key=lambda sample: sample.reward, default=members[-1])
        says = best.reward > worst.reward
        if not says:
            best, worst = members[0], members[-1]
        for sample in (best, worst) if estimator == "pairs" else (best,):
            sample.learned = sample.learned and says
            kept.append(sample)
    return kept


def varied_groups(samples: list[Sample]) -> set[int]:
    """Groups whose rewards are not all the same."""
    found: dict[int, set[float]] = {}
    for sample in samples:
        if sample.reward == sample.reward:
            found.setdefault(sample.group, set()).add(sample.reward)
    return {group for group, rewards in found.items() if len(rewards) > 1}


def _dense(vectors: list[Tensor]) -> Tensor:
    return pad_sequence(vectors, batch_first=True)


def _give(samples: list[Sample], name: str, dense: Tensor) -> None:
    for sample, row in zip(samples, dense.cpu(), strict=True):
        sample.tokens[name] = row[: len(sample)].clone()
