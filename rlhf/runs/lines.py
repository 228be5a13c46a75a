"""A line of the log as people read it: the figures of a trainer that matter, in their order."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SEPARATOR = " · "
EVALUATION = "eval"

# Metrics of each trainer by the name of its class, in the order of a line, with the name that the line gives them.
_LANGUAGE_MODEL = {"loss": "loss", "perplexity": "ppl"}
_PAIRS = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}
_REWARDS = {"reward": "reward", "kl": "kl", "entropy": "entropy", "completions/mean_length": "length"}
FIGURES: dict[str, dict[str, str]] = {
    "SFTTrainer": _LANGUAGE_MODEL,
    "DPOTrainer": {"loss": "loss", **_PAIRS},
    "KTOTrainer": {"loss": "loss", "rewards/margins": "margin", "kl": "kl"},
    "RewardTrainer": {"loss": "loss", "accuracy": "accuracy", "margin": "margin"},
    "OnlineDPOTrainer": {"loss": "loss", "reward": "reward", **_PAIRS, "completions/mean_length": "length"},
    "PPOTrainer": _REWARDS,
    "DistillTrainer": {
        "loss": "loss", "kl": "kl", "divergence": "divergence", "agreement": "agreement", "perplexity": "ppl",
        "uld": "uld", "span": "span", "aligned": "aligned", "reverse_kl": "reverse kl",
    },
}  # fmt: skip
_ANY_TRAINER = _LANGUAGE_MODEL
# A line has these in a form of its own, or they tell nothing about the model.
_ELSEWHERE = frozenset(("epoch", "step", "learning_rate", "num_tokens", "seconds", "total_flos"))
_ENDS_OF_COST = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


@dataclass(frozen=True)
class Pace:
    """How far a run is, and how fast.

    Attributes:
        step: optimizer steps so far.
        steps: of the whole run.
        tokens_per_second: read in training; None where it is unknown.
        seconds_left: until the last step; None where it is unknown, or after the last step.
    """

    step: int
    steps: int
    tokens_per_second: float | None = None
    seconds_left: float | None = None

    def __str__(self) -> str:
        """The step as a part of a line: ``5/104``, as wide at each step."""
        return f"{self.step:>{len(str(self.steps))}}/{self.steps}"


@dataclass(frozen=True)
class Line:
    """A line of the log.

    Attributes:
        head: ``step 40/104``.
        figures: names and numbers, in their order.
        pace: what the line ends with: learning rate, tokens a second, time left.
        others: names and numbers of all other metrics.
    """

    head: str
    figures: dict[str, float]
    pace: dict[str, str] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)

    def text(self, width: int | None = None) -> str:
        """The line as text.

        Args:
            width: columns of the terminal. What a bar shows anyway is left out where the line is longer: first the
                time left, then tokens a second and the learning rate, then figures from the end.

        Returns:
            One line.
        """
        parts = [self.head, *(f"{name} {number(value)}" for name, value in self.figures.items())]
        ends = [self.pace[name] for name in ("lr", "speed", "left", "skipped") if name in self.pace]
        dispensable = [self.pace[name] for name in ("left", "speed", "lr") if name in self.pace]
        while width is not None and len(SEPARATOR.join([*parts, *ends])) > width:
            if dispensable:
                ends.remove(dispensable.pop(0))
            elif len(parts) > 2:
                parts.pop()
            else:
                break
        return SEPARATOR.join([*parts, *ends])

    def other_lines(self, width: int | None = None) -> list[str]:
        """All other metrics, for ``--log_all``.

        Args:
            width: columns of the terminal; a line breaks between two metrics. None for one line.

        Returns:
            Indented lines.
        """
        lines: list[str] = []
        for name, value in sorted(self.others.items()):
            part = f"{name} {number(value)}"
            if lines and (width is None or len(lines[-1] + SEPARATOR + part) <= width):
                lines[-1] += SEPARATOR + part
            else:
                lines.append(f"    {part}")
        return lines


def figures_of(trainer_names: Sequence[str]) -> dict[str, str]:
    """The metrics of a trainer that a line shows.

    Args:
        trainer_names: of its class and of its base classes, its own first.

    Returns:
        The names that a line gives them, by metric, in the order of the line.
    """
    return next((FIGURES[name] for name in trainer_names if name in FIGURES), _ANY_TRAINER)


def log_line(logs: Mapping[str, object], figures: Mapping[str, str], pace: Pace) -> Line | None:
    """The line for an entry of the trainer's log.

    Args:
        logs: the entry.
        figures: of :func:`figures_of`.
        pace: how far the run is.

    Returns:
        A line of training, or of evaluation; None for the summary at the end of training, and for an entry that has
        no number.
    """
    numbers = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
    if "train_runtime" in numbers or not numbers.keys() - _ELSEWHERE:
        return None
    prefix = "" if "loss" in numbers else evaluation_prefix(numbers, figures)
    is_evaluation = prefix.split("_")[0] == EVALUATION
    values = {name.removeprefix(prefix): value for name, value in numbers.items()}
    chosen = {label: values[name] for name, label in figures.items() if name in values}
    # Rewards are those of a rollout, which may serve several lines.
    if not chosen and "loss" in values:
        chosen = {"loss": values["loss"]}
    costs = tuple(f"{prefix.removesuffix('_')}{end}" for end in _ENDS_OF_COST)
    others = {
        name.removeprefix(prefix): value
        for name, value in numbers.items()
        if name.removeprefix(prefix) not in (*figures, *chosen) and name not in _ELSEWHERE and name not in costs
    }
    if is_evaluation:
        set_name = prefix.removeprefix(EVALUATION).strip("_")
        head = f"{EVALUATION}{f' {set_name}' if set_name else ''} {pace}"
        seconds = numbers.get(f"{prefix}runtime")
        return Line(head, chosen, {} if seconds is None else {"left": f"took {span(seconds)}"}, others)
    # An entry of somebody else's has none of the figures.
    return Line(f"step {pace}", chosen or others, _pace_parts(numbers, pace), others if chosen else {})


def evaluation_prefix(logs: Mapping[str, object], figures: Mapping[str, str]) -> str:
    """What the names of an evaluation's metrics begin with.

    Args:
        logs: an entry of the trainer's log.
        figures: of :func:`figures_of`.

    Returns:
        ``eval_``, or ``eval_NAME_`` for one of several sets of rows, or another one that a program chose; empty where
        there is none.
    """
    for metric in ("loss", *figures):
        for name in logs:
            if name.endswith(f"_{metric}"):
                return name.removesuffix(metric)
    return ""


def _pace_parts(numbers: Mapping[str, float], pace: Pace) -> dict[str, str]:
    parts = {}
    if "learning_rate" in numbers:
        parts["lr"] = f"lr {scientific(numbers['learning_rate'])}"
    if pace.tokens_per_second is not None:
        parts["speed"] = f"{thousands(pace.tokens_per_second)} tok/s"
    if pace.seconds_left is not None and pace.step < pace.steps:
        parts["left"] = f"{duration(pace.seconds_left)} left"
    if skipped := numbers.get("nonfinite_steps"):
        parts["skipped"] = f"{skipped:.0f} steps skipped"
    return parts


def number(value: float) -> str:
    """A metric, in four digits or three, which every size of number has.

    Args:
        value: may be NaN or infinite.

    Returns:
        Such as ``0.692``, ``12.35``, ``1.8e-5`` and ``nan``.
    """
    if not math.isfinite(value) or value == 0:
        return f"{value:.3g}"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        return scientific(value)
    if size >= 1000:
        return f"{value:.0f}"
    return f"{value:#.{4 if size >= 1 else 3}g}".removesuffix(".")


def scientific(value: float) -> str:
    """A number in the form of a learning rate.

    Args:
        value: may be NaN or infinite.

    Returns:
        Such as ``2e-5`` and ``0``.
    """
    if not math.isfinite(value) or value == 0:
        return f"{value:.3g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def thousands(count: float) -> str:
    """A count in three digits.

    Args:
        count: at least 0.

    Returns:
        Such as ``950``, ``1.2k`` and ``34.5M``.
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}" if count / size < 999.5 else f"{count / size:.0f}{letter}"
    return f"{count:.0f}"


def span(seconds: float) -> str:
    """How long something took.

    Args:
        seconds: at least 0.

    Returns:
        ``0.07 s`` and ``45 s``; from a minute on as :func:`duration` gives it.
    """
    if seconds >= 59.5:
        return duration(seconds)
    return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.2g} s"


def duration(seconds: float) -> str:
    """A time as a clock shows it.

    Args:
        seconds: at least 0.

    Returns:
        ``1:19``, ``2:03:10`` or ``3d 04:00``.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
