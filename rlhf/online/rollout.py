"""A rollout: scored samples, its place in the run, and the weights that sampled it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rlhf.online.samples import Sample, plain_samples, samples_of
from rlhf.rewards.scoring import Scored


@dataclass
class Rollout:
    """One rollout's share of this process.

    Args:
        samples: scored, in the order of training.
        scored: what the reward functions returned at each call, for their own metrics.
        zero_std_groups: groups of equal rewards and all groups, before dynamic sampling replaced any. With dynamic
            sampling these are of all processes, otherwise of this one.
        greedy_rewards: [S], rewards of the most probable answer to each sample's prompt; only for ``remax``.
        number: of the rollout in the run, from 1 on.
        drawn: rows of the prompts that this rollout and those before it have drawn.
        seconds: that sampling and scoring took.
        waiting_seconds: that the trainer waited for it.
        dropped: samples in its place that were too old.
    """

    samples: list[Sample]
    scored: list[Scored] = field(default_factory=list)
    zero_std_groups: tuple[int, int] = (0, 0)
    greedy_rewards: Tensor | None = None
    number: int = 0
    drawn: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    dropped: int = 0

    @property
    def staleness(self) -> list[int]:
        """Updates between the weights that sampled each sample and those that it is trained from."""
        # A policy gets a version with each rollout that it was trained on, so rollout n is trained from version n - 1.
        return [self.number - 1 - sample.version for sample in self.samples]


def plain_rollout(rollout: Rollout) -> dict[str, Any]:
    """A rollout as plain values, for a checkpoint.

    Args:
        rollout: of this process.
    Returns:
        Its fields by name.
    """
    scored = [dict(vars(call)) for call in rollout.scored]
    return dict(vars(rollout)) | {"samples": plain_samples(rollout.samples), "scored": scored}


def rollout_of(plain: dict[str, Any]) -> Rollout:
    """A rollout from what :func:`plain_rollout` returned.

    Args:
        plain: its fields by name.
    Returns:
        The rollout.
    """
    scored = [Scored(**call) for call in plain["scored"]]
    return Rollout(**plain | {"samples": samples_of(plain["samples"]), "scored": scored})


def fresh_rollouts(rollouts: Sequence[Rollout], max_staleness: int) -> list[Rollout]:
    """The rollouts up to the first that has an older sample than is allowed.

    Those after it are left out too, so that prompts stay in order when the missing ones are sampled anew.

    Args:
        rollouts: in order.
        max_staleness: updates.
    Returns:
        The first of ``rollouts``.
    """
    fresh: list[Rollout] = []
    for rollout in rollouts:
        if max(rollout.staleness, default=0) > max_staleness:
            break
        fresh.append(rollout)
    return fresh
