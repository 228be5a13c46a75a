"""Metrics of on-policy training, from samples and scores, and what they say is wrong; see ``docs/metrics.md``."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.losses import kl_estimate
from rlhf.online.rollout import Rollout
from rlhf.online.samples import RolloutBatch, Sample
from rlhf.rewards.scoring import Scored
from rlhf.runs.rollout_faults import diagnose
from rlhf.trainers.metric_sums import sum_dtype

Metrics = dict[str, tuple[Tensor, Tensor]]
Number = float | Tensor

MAX_LOG_RATIO = 20.0  # exp of more is of no use as a ratio, and overflows in half precision


def as_metrics(sums: Mapping[str, tuple[Number, Number]], device: torch.device | str) -> Metrics:
    """Sums and counts on a device.

    Args:
        sums: by name, the sum and the count.
        device: where metrics are added up.
    Returns:
        By name, two float32 scalars.
    """

    def as_tensor(value: Number) -> Tensor:
        return torch.as_tensor(value, device=device).float()

    return {name: (as_tensor(total), as_tensor(count)) for name, (total, count) in sums.items()}


# Of samples


def sample_metrics(samples: Sequence[Sample], reward_names: Sequence[str], device: torch.device) -> Metrics:
    """Rewards and lengths of completions.

    Args:
        samples: of this process; may be empty.
        reward_names: components of the rewards. The same on every process, whether it has samples or not.
        device: where metrics are added up.
    Returns:
        Sums and counts over samples. Means of squares are for :func:`derived_metrics`.
    """

    def column(values: list[float]) -> tuple[Tensor, Tensor]:
        # A reward that could not be had is NaN, and counts nowhere.
        vector = torch.tensor(values, device=device, dtype=sum_dtype(device))
        return vector.nan_to_num(0.0), (~vector.isnan()).to(vector)

    rewards = [sample.reward for sample in samples]
    metrics = {"reward": column(rewards), "reward_squared": column([reward**2 for reward in rewards])}
    for name in reward_names:
        component = [sample.reward_components[name] for sample in samples]
        metrics[f"rewards/{name}/mean"] = column(component)
        metrics[f"rewards/{name}/squared"] = column([reward**2 for reward in component])
    metrics["completions/mean_length"] = column([float(len(sample)) for sample in samples])
    metrics["completions/clipped_ratio"] = column([float(sample.truncated) for sample in samples])
    metrics["completions/eos_ratio"] = column([float(not sample.truncated) for sample in samples])
    return metrics


def reward_function_metrics(calls: Sequence[Scored], with_failures: bool) -> dict[str, tuple[Number, Number]]:
    """What reward functions logged themselves, and how often each failed.

    Args:
        calls: what the rewards returned at each call.
        with_failures: whether a failure drops a sample rather than stopping the run.
    Returns:
        By name, the sum and the count over the calls.
    """
    sums: dict[str, tuple[Number, Number]] = {}

    def add(name: str, value: float, count: int) -> None:
        total, total_count = sums.get(name, (0.0, 0))
        sums[name] = total + value, total_count + count

    for scored in calls:
        for name, value in scored.metrics.items():
            add(name, value, 1)
        for name, failures in scored.failed.items() if with_failures else ():
            add(f"rewards/{name}/failed", failures, len(scored.rewards))
    return sums


def policy_metrics(samples: Sequence[Sample]) -> dict[str, tuple[Number, Number]]:
    """What is left out of the loss; entropy, KL divergences and the critic's errors, as far as samples have them.

    Args:
        samples: those that are trained on; not empty.
    Returns:
        By name, the sum and the count.
    """

    def vector(name: str) -> Tensor:
        return torch.cat([sample.tokens[name] for sample in samples])

    sums: dict[str, tuple[Number, Number]] = {}
    sums["frac_not_learned"] = sum(not sample.in_loss for sample in samples), len(samples)
    available = samples[0].tokens.keys()
    if "old_logps" in available:
        old_logps = vector("old_logps")
        num_tokens = len(old_logps)
        # The samples are the policy's own, so the mean of -log-prob estimates its entropy without bias.
        sums["entropy"] = -old_logps.sum(), num_tokens
        sums["sampler_kl"] = kl_estimate(vector("sampler_logps"), old_logps, "k3").sum(), num_tokens
        if "ref_logps" in available:  # summed over a completion, averaged over completions
            sums["kl"] = (old_logps - vector("ref_logps")).sum(), len(samples)
    if "returns" in available:
        values, returns = vector("values"), vector("returns")
        # The explained variance needs the variances of returns and errors, which need means of squares.
        for name, numbers in (("values", values), ("returns", returns), ("errors", returns - values)):
            sums[f"critic/{name}"] = numbers.sum(), len(numbers)
            sums[f"critic/{name}_squared"] = (numbers**2).sum(), len(numbers)
    return sums


def staleness_metrics(rollout: Rollout) -> dict[str, tuple[Number, Number]]:
    """How old the samples of a rollout are that was sampled ahead.

    Args:
        rollout: that training begins on.
    Returns:
        By name, the sum and the count. The largest age is kept elsewhere, as it is no mean.
    """
    return {
        "rollout/staleness/mean": (sum(rollout.staleness), len(rollout.staleness)),
        "rollout/dropped": (rollout.dropped, 1),
        "rollout/waiting_seconds": (rollout.waiting_seconds, 1),
    }


# Of a step


def step_metrics(
    batch: RolloutBatch, logps: Tensor, old_logps: Tensor, clip: tuple[float, float] | None
) -> tuple[Metrics, dict[str, Tensor]]:
    """How far the policy is from the one before the rollout's first step.

    Args:
        batch: the samples of a micro-batch.
        logps: [N], under the policy now.
        old_logps: [N], before the first step; the same tensor in the first step.
        clip: how far below and above 1 ratios count; None where the loss clips no ratio.
    Returns:
        Sums and counts over tokens; and largest values by name.
    """
    per_token = batch.per_token
    mask = per_token["in_loss"].float()
    count = mask.sum()
    logps = logps.detach()
    ratio = (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

    metrics: Metrics = {
        "ratio/mean": ((ratio * mask).sum(), count),
        "approx_kl": ((kl_estimate(old_logps, logps, "k3") * mask).sum(), count),
    }
    # A peak is kept by its largest value: a mean over steps would hide it.
    peaks = {"ratio/max": (ratio * mask).max()}
    if clip is not None:
        clip_below, clip_above = clip
        advantages = per_token["advantages"]
        # The loss is pessimistic: only a ratio that already went where the advantage points is clipped.
        clipped_low = (ratio < 1 - clip_below) & (advantages < 0)
        clipped_high = (ratio > 1 + clip_above) & (advantages > 0)
        metrics["clip_ratio/low"] = ((clipped_low * mask).sum(), count)
        metrics["clip_ratio/high"] = ((clipped_high * mask).sum(), count)
    if "old_logps" in per_token:
        if batch.is_first_step:
            peaks["ratio/first_deviation"] = ((ratio - 1).abs() * mask).max()
    else:
        # No pass was made before the step, so it gives what :func:`policy_metrics` gives elsewhere.
        metrics["entropy"] = ((-logps * mask).sum(), count)
        metrics["sampler_kl"] = ((kl_estimate(per_token["sampler_logps"], logps, "k3") * mask).sum(), count)
        if "ref_logps" in per_token:
            num_sequences = count.new_full((), float(len(batch.lengths)))
            metrics["kl"] = ((logps - per_token["ref_logps"]).sum(), num_sequences)
    return metrics, peaks


class StepStatistics:
    """What cannot be a mean over steps: the largest values since the last line of the log, and the last step's KL."""

    def __init__(self) -> None:
        self.peaks: dict[str, Tensor] = {}
        self.last_step_kl: Tensor | None = None  # sum and count of KL(old, new)

    def add(self, metrics: Metrics, peaks: Mapping[str, Tensor]) -> None:
        """Add what :func:`step_metrics` found in a micro-batch."""
        self._add_peaks(peaks)
        sum_and_count = torch.stack(metrics["approx_kl"])
        self.last_step_kl = sum_and_count if self.last_step_kl is None else self.last_step_kl + sum_and_count

    def add_staleness(self, rollout: Rollout, device: torch.device) -> None:
        """Add the age of the oldest sample of a rollout."""
        oldest = torch.tensor(float(max(rollout.staleness, default=0)), device=device)
        self._add_peaks({"rollout/staleness/max": oldest})

    def _add_peaks(self, peaks: Mapping[str, Tensor]) -> None:
        for name, value in peaks.items():
            self.peaks[name] = torch.maximum(self.peaks[name], value) if name in self.peaks else value

    def undo(self) -> Callable[[], None]:
        """What forgets the step that begins now; its KL limits nothing."""
        peaks_before = dict(self.peaks)

        def forget() -> None:
            self.peaks, self.last_step_kl = peaks_before, None

        return forget

    def exceeds_kl_limit(self, limit: float | None, accelerator: Accelerator) -> bool:
        """Whether KL(old, new) of the last step, over all processes, was above a limit; starts the next step's sum."""
        sum_and_count, self.last_step_kl = self.last_step_kl, None
        if limit is None or sum_and_count is None:
            return False
        # All processes must decide alike, or some would sample while others train.
        total, count = accelerator.reduce(sum_and_count.to(accelerator.device)).tolist()
        return bool(count > 0 and total / count > limit)

    def pop_peaks(self, accelerator: Accelerator) -> dict[str, float]:
        """Largest values over all processes since the last call."""
        peaks, self.peaks = self.peaks, {}
        return {name: float(accelerator.gather(value[None]).max()) for name, value in sorted(peaks.items())}


# Of a line of the log


def derived_metrics(means: Mapping[str, float]) -> dict[str, float]:
    """Standard deviations and explained variance, in place of the means of squares that they come from.

    Args:
        means: by name, as they are logged otherwise.
    Returns:
        The same without means of squares and the critic's errors.
    """
    metrics = dict(means)

    def pop_variance(mean_name: str, square_name: str) -> float:
        # Rounding can leave a variance of 0 a little below it.
        return max(metrics.pop(square_name) - metrics[mean_name] ** 2, 0.0)

    if "reward_squared" in metrics:
        metrics["reward_std"] = math.sqrt(pop_variance("reward", "reward_squared"))
    for name in [name for name in metrics if name.endswith("/squared")]:
        prefix = name.removesuffix("squared")
        metrics[f"{prefix}std"] = math.sqrt(pop_variance(f"{prefix}mean", name))
    if "critic/returns" in metrics:
        total = pop_variance("critic/returns", "critic/returns_squared")
        unexplained = pop_variance("critic/errors", "critic/errors_squared")
        metrics["critic/explained_variance"] = 1 - unexplained / total if total > 0 else math.nan
        del metrics["critic/errors"], metrics["critic/values_squared"]
    return metrics


@dataclass
class Diagnosis:
    """Finds the troubles of a run, each once."""

    first_entropy: float | None = None
    already_warned: set[str] = field(default_factory=set)

    def new_troubles(self, logs: Mapping[str, float], half_precision: bool) -> list[str]:
        """Sentences on troubles in this line of the log that no line before it had; see :func:`diagnose`."""
        if self.first_entropy is None:
            self.first_entropy = logs.get("entropy")
        troubles = diagnose(logs, self.first_entropy, half_precision)
        new_messages = [message for name, message in troubles.items() if name not in self.already_warned]
        self.already_warned |= troubles.keys()
        return new_messages
