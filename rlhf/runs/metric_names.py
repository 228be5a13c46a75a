"""Metrics in words: titles, units, and which direction is better; and the charts that they belong to."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from rlhf.runs.figures import EVALUATION

Better = Literal["lower", "higher"]


class Metric(NamedTuple):
    """A metric as the report writes it.

    Attributes:
        title: a few words.
        unit: of its values; empty for a plain number.
        better: the direction of progress; None where neither is.
    """

    title: str
    unit: str = ""
    better: Better | None = None


METRICS = {
    "reward": Metric("reward", "", "higher"),
    "reward_std": Metric("standard deviation of rewards"),
    "loss": Metric("loss", "", "lower"),
    "perplexity": Metric("perplexity", "", "lower"),
    "perplexity/chosen": Metric("perplexity of chosen answers", "", "lower"),
    "teacher_perplexity": Metric("perplexity of the teacher"),
    "aux_loss": Metric("load-balancing loss of the routers"),
    "policy_loss": Metric("policy loss"),
    "value_loss": Metric("value loss of the critic"),
    "hidden_state_loss": Metric("hidden-state loss", "", "lower"),
    "divergence": Metric("divergence from the teacher", "nats a token", "lower"),
    "agreement": Metric("same most likely token as the teacher", "share", "higher"),
    "reverse_kl": Metric("reverse KL to the teacher", "nats a token"),
    "own_answers": Metric("rows with an answer of the student", "share"),
    "uld": Metric("ULD loss", "", "lower"),
    "span": Metric("span loss", "", "lower"),
    "aligned": Metric("aligned tokens", "share"),
    "rewards/accuracies": Metric("preference accuracy", "share", "higher"),
    "accuracy": Metric("preference accuracy", "share", "higher"),
    "rewards/margins": Metric("margin of implicit rewards", "", "higher"),
    "log_ratios/margins": Metric("margin of log-ratios to the reference", "nats", "higher"),
    "margin": Metric("margin of rewards", "", "higher"),
    "rewards/chosen": Metric("reward of chosen answers"),
    "rewards/rejected": Metric("reward of rejected answers"),
    "logps/chosen": Metric("log-prob of chosen answers", "nats an answer"),
    "logps/rejected": Metric("log-prob of rejected answers", "nats an answer"),
    "brier_score": Metric("Brier score", "", "lower"),
    "calibration_error": Metric("calibration error", "share", "lower"),
    "mean_reward": Metric("mean reward"),
    "std_reward": Metric("standard deviation of rewards"),
    "frac_reward_zero_std": Metric("groups with equal rewards", "share"),
    "frac_not_learned": Metric("completions left out of the loss", "share"),
    "kl": Metric("KL", "nats"),
    "entropy": Metric("entropy", "nats a token"),
    "approx_kl": Metric("KL of the updates since the rollout", "nats a token"),
    "sampler_kl": Metric("KL between sampler and trainer", "nats a token"),
    "rollout/staleness/mean": Metric("age of samples", "rollouts"),
    "rollout/staleness/max": Metric("largest age of samples", "rollouts"),
    "rollout/dropped": Metric("samples that were too old"),
    "rollout/waiting_seconds": Metric("waiting for a rollout", "s", "lower"),
    "ratio/mean": Metric("mean ratio to the policy that sampled"),
    "ratio/max": Metric("largest ratio to the policy that sampled"),
    "ratio/first_deviation": Metric("distance of the first ratio from 1"),
    "clip_ratio/low": Metric("tokens clipped below", "share"),
    "clip_ratio/high": Metric("tokens clipped above", "share"),
    "beta": Metric("weight of the KL (beta)"),
    "entropy_coef": Metric("weight of the entropy"),
    "completions/mean_length": Metric("mean length of completions", "tokens"),
    "completions/clipped_ratio": Metric("completions cut by length", "share"),
    "completions/eos_ratio": Metric("completions that ended", "share"),
    "critic/values": Metric("values of the critic"),
    "critic/returns": Metric("returns"),
    "critic/explained_variance": Metric("variance of returns that the critic explains", "share", "higher"),
    "learning_rate": Metric("learning rate"),
    "grad_norm": Metric("gradient norm"),
    "nonfinite_steps": Metric("steps left out as not finite"),
    "tokens_per_second": Metric("tokens read", "tokens/s"),
    "tokens_per_second/rollout": Metric("tokens sampled", "tokens/s"),
    "tokens_per_second/training": Metric("tokens trained on", "tokens/s"),
}


@dataclass(frozen=True)
class ChartPlan:
    """A chart: its title, and the metrics that it draws.

    Attributes:
        title: in words.
        metrics: names; those that a run does not have are left out. A ``*`` stands for the name of a reward function.
        scale: ``linear`` where a logarithm would mislead; ``auto`` takes it where values span decades.
    """

    title: str
    metrics: tuple[str, ...]
    scale: Literal["auto", "linear"] = "linear"


CHARTS: dict[str, tuple[ChartPlan, ...]] = {
    # Of training on rewards alone: its loss tells little.
    "Rewards": (
        ChartPlan("Reward", ("reward",)),
        ChartPlan("Reward by function", ("rewards/*/mean",)),
        ChartPlan("Spread of the reward", ("reward_std", "rewards/*/std")),
        ChartPlan("Groups with equal rewards, and completions left out", ("frac_reward_zero_std", "frac_not_learned")),
        ChartPlan("Failures of reward functions", ("rewards/*/failed",)),
    ),
    "Loss": (
        ChartPlan("Loss", ("loss",), "auto"),
        ChartPlan("Perplexity", ("perplexity", "perplexity/chosen", "teacher_perplexity"), "auto"),
        ChartPlan("Parts of the loss", ("policy_loss", "value_loss", "hidden_state_loss", "aux_loss")),
    ),
    "Preferences": (
        ChartPlan("Preference accuracy", ("rewards/accuracies", "accuracy")),
        ChartPlan("Margin between chosen and rejected", ("rewards/margins", "margin")),
        ChartPlan("Margin without beta, which compares across runs", ("log_ratios/margins",)),
        ChartPlan("Rewards of chosen and rejected answers", ("rewards/chosen", "rewards/rejected")),
        ChartPlan("Log-probs of chosen and rejected answers", ("logps/chosen", "logps/rejected")),
        ChartPlan("Calibration", ("brier_score", "calibration_error")),
        ChartPlan("Rewards of all answers", ("mean_reward", "std_reward")),
    ),
    "Distance and entropy": (
        ChartPlan("KL", ("kl", "reverse_kl", "divergence"), "auto"),
        ChartPlan("Agreement with the teacher", ("agreement", "own_answers", "aligned")),
        ChartPlan("Losses over alignments", ("uld", "span")),
        ChartPlan("Entropy", ("entropy",)),
        ChartPlan("KL of the updates", ("approx_kl",)),
        ChartPlan("KL between sampler and trainer", ("sampler_kl",), "auto"),
        ChartPlan("Clipped tokens", ("clip_ratio/low", "clip_ratio/high")),
        ChartPlan("Ratio to the policy that sampled", ("ratio/mean", "ratio/max"), "auto"),
        ChartPlan("Distance of the first ratio from 1", ("ratio/first_deviation",), "auto"),
        ChartPlan("Weights of KL and entropy", ("beta", "entropy_coef")),
    ),
    "Completions": (
        ChartPlan("Length of completions", ("completions/mean_length",)),
        # The others ended by themselves (`completions/eos_ratio`).
        ChartPlan("Completions cut by length", ("completions/clipped_ratio",)),
    ),
    "Critic": (
        ChartPlan("Values and returns", ("critic/values", "critic/returns")),
        ChartPlan("Variance of returns that the critic explains", ("critic/explained_variance",)),
    ),
    "Optimizer": (
        ChartPlan("Learning rate", ("learning_rate",)),
        ChartPlan("Gradient norm", ("grad_norm",), "auto"),
        ChartPlan("Steps left out as not finite", ("nonfinite_steps",)),
    ),
    "Speed": (
        ChartPlan("Tokens per second", ("tokens_per_second/rollout", "tokens_per_second/training")),
        ChartPlan("Tokens read per second", ("tokens_per_second",)),
    ),
}


class Name(NamedTuple):
    """The name of a metric in its parts.

    Attributes:
        metric: without what stands in front of it.
        split: ``train``, ``eval``, or ``eval NAME`` for one of several evaluation sets.
    """

    metric: str
    split: str


def split_name(name: str) -> Name:
    """Take the name of a metric apart.

    Args:
        name: as it is logged.

    Returns:
        Its parts.
    """
    if not name.startswith(EVALUATION):
        return Name(name, "train")
    metric = name.removeprefix(EVALUATION)
    if metric in METRICS:
        return Name(metric, "eval")
    # With several evaluation sets, the name of the set comes between; the longest metric fits.
    fitting = [known for known in METRICS if metric.endswith(f"_{known}")]
    if not fitting:
        return Name(metric, "eval")
    known = max(fitting, key=len)
    return Name(known, f"eval {metric.removesuffix(f'_{known}')}")


def describe(metric: str) -> Metric:
    """A metric in words.

    Args:
        metric: its name without ``eval_``.

    Returns:
        What is known of it; of another one its name alone.
    """
    if metric in METRICS:
        return METRICS[metric]
    parts = metric.split("/")
    if len(parts) == 3 and parts[0] == "rewards":
        words = {"mean": "mean of", "std": "standard deviation of", "failed": "failures of"}
        if parts[2] in words:
            return Metric(f"{words[parts[2]]} {parts[1]}", "share" if parts[2] == "failed" else "")
    return Metric(metric)
