"""Which figures of runs with different options compare, and which run is the best by one of them.

The figures of two runs compare only where both were evaluated on the same rows. Some figures also have a scale that an
option sets: ``rewards/margins`` of DPO grows with ``beta``, whatever the model has learned.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from rlhf.runs.figures import EVALUATION
from rlhf.runs.metric_names import describe

_LOSS_OPTIONS = frozenset({
    "beta", "loss_type", "loss_weights", "loss_kwargs", "label_smoothing", "discopop_tau", "f_divergence_type",
    "f_alpha_divergence_coef", "ld_alpha", "use_weighting", "desirable_weight", "undesirable_weight", "divergence",
    "temperature", "alpha", "reverse", "scale_by_temperature", "distillation_weight", "crossentropy_weight",
    "hidden_state_weight", "hidden_state_distance", "align", "center_rewards_coefficient", "router_aux_loss_coef",
    "epsilon", "epsilon_high", "delta", "advantage_estimator", "scale_rewards", "importance_sampling_level",
    "entropy_coef", "kl_in", "kl_estimator", "vf_coef", "reward_weights", "max_completion_length",
})  # fmt: skip
_BETA = frozenset({"beta"})
_REWARD_OPTIONS = frozenset(
    {"reward_weights", "reward_clip", "reward_clip_range", "missing_eos_penalty", "reward_funcs", "environment"}
)
_TEMPERATURE = frozenset({"temperature"})
SCALED_BY: Mapping[str, frozenset[str]] = {
    "loss": _LOSS_OPTIONS,
    "policy_loss": _LOSS_OPTIONS,
    "value_loss": _REWARD_OPTIONS | {"gamma", "lam"},
    "divergence": frozenset({"divergence", "temperature", "alpha", "beta", "reverse", "scale_by_temperature"}),
    "hidden_state_loss": frozenset({"hidden_state_distance"}),
    "rewards/chosen": _BETA,
    "rewards/rejected": _BETA,
    "rewards/margins": _BETA,
    "reward": _REWARD_OPTIONS,
    "reward_std": _REWARD_OPTIONS,
    "entropy": _TEMPERATURE,
}
"""Metrics, without ``eval_``, and the options that set their scale. All other metrics compare."""

# Those that say most about a method come first.
_CANDIDATES = (
    "rewards/accuracies", "accuracy", "reward", "agreement", "log_ratios/margins", "perplexity", "loss",
)  # fmt: skip
_LOWER_IS_BETTER = ("kl", "policy_loss", "value_loss")  # where a metric's description names no direction


def scaled_by(metric: str, options: Iterable[str]) -> list[str]:
    """Those of some options that set the scale of a metric.

    Args:
        metric: its name, with or without ``eval_``.
        options: names of options in which runs differ.

    Returns:
        Sorted; empty where the metric compares.
    """
    return sorted(SCALED_BY.get(metric.removeprefix(EVALUATION), frozenset()).intersection(options))


def lower_is_better(metric: str) -> bool:
    """Whether progress makes a metric smaller.

    Args:
        metric: its name, with or without ``eval_``.

    Returns:
        False also where neither direction is better.
    """
    name = metric.removeprefix(EVALUATION)
    return describe(name).better == "lower" or name in _LOWER_IS_BETTER


def last_figures(metrics: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each metric of a run.

    Args:
        metrics: the lines of its log.

    Returns:
        By name; lines of the end of training, such as ``train_runtime``, are left out.
    """
    figures: dict[str, float] = {}
    for line in metrics:
        if "train_runtime" not in line:
            figures |= {name: value for name, value in line.items() if isinstance(value, int | float)}
    return figures


def comparable_metrics(figures: Collection[Mapping[str, float]], options: Iterable[str]) -> list[str]:
    """The metrics by which runs compare, the most telling first.

    Args:
        figures: of each run, by name.
        options: names of options in which the runs differ.

    Returns:
        Names of metrics that all runs have, those of an evaluation before those of training.
    """
    options = list(options)
    names = [f"{prefix}{metric}" for prefix in (EVALUATION, "") for metric in _CANDIDATES]
    return [name for name in names if all(name in run for run in figures) and not scaled_by(name, options)]
