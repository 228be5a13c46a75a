"""Health of training: the loss, the gradient, the learning rate, and the evaluation."""

import math
import statistics
from typing import Any

from rlhf.runs.figures import EVALUATION, Figures, Series, is_finite_number, median_before
from rlhf.runs.findings import Check, Finding, FindingOrNot, Level, number

MIN_LINES = 5  # of the log, for a comparison of beginning and end
MIN_LINES_FOR_STANDSTILL = 10
ZERO_LOSS = 1e-6
RISE = 1.05  # of the loss from its first fifth to its last
STANDSTILL = 0.01  # relative change of the loss
JUMP = 2.0  # times the median of the lines before
JUMP_ABOVE_START = 1.2  # times the loss of the first fifth
SPIKE = 10.0  # times the median gradient norm of the lines before
LINES_BEFORE = 5  # whose median a jump is compared with
MANY_SPIKES = 3
OVERFITTING, STRONG_OVERFITTING = 1.02, 1.1  # times the best evaluation loss
# Up to four epochs repeated text is nearly as good as new text (Muennighoff et al., arXiv 2305.16264).
MANY_EPOCHS = 4.5


def nonfinite_values(figures: Figures) -> FindingOrNot:
    """Losses or gradients that are NaN or infinite, and steps that were left out for them."""
    lines = figures.lines_with("loss")
    if not lines:
        return None
    skipped = figures.series("nonfinite_steps")
    if skipped.values and max(skipped.values) > 0:
        return [
            Finding(
                "problem",
                "Steps were left out, as their loss or gradient was not finite.",
                f"{max(skipped.values):.0f} of {figures.last_step} steps",
                "Lower learning_rate, train in bf16 or fp32, and look for rows with extreme values.",
            )
        ]
    findings = []
    for name in ("loss", "grad_norm", EVALUATION + "loss"):
        steps = [line.get("step", 0) for line in figures.lines_with(name) if _is_not_finite(line[name])]
        if steps:
            # A scaler of fp16 meets infinite gradients in its first steps.
            level: Level = "warning" if name == "grad_norm" else "problem"
            text, where = f"`{name}` was not a finite number.", f"at step {_steps(steps)}"
            findings.append(
                Finding(level, text, where, "Lower learning_rate, and train in bf16 or fp32 instead of fp16.")
            )
    return findings


def loss_is_zero(figures: Figures) -> FindingOrNot:
    """A loss of 0: there is nothing left to learn, or no token is scored."""
    loss = _offline_loss(figures)
    if loss is None:
        return None
    last = loss.values[-3:]
    if any(abs(value) >= ZERO_LOSS for value in last):
        return []
    first_zero = next(step for step, value in zip(loss.steps, loss.values, strict=True) if abs(value) < ZERO_LOSS)
    return [
        Finding(
            "problem",
            "The loss is 0.",
            f"since step {first_zero}",
            "Look at the rows with `rlhf data`: is any token scored, and do answers leak into prompts?",
        )
    ]


def loss_is_constant(figures: Figures) -> FindingOrNot:
    """A loss that never changes: nothing is trained."""
    loss = _offline_loss(figures)
    if loss is None or len(loss) < 3:
        return None
    spread = max(loss.values) - min(loss.values)
    if spread > 1e-6 * abs(loss.values[0]) or abs(loss.values[0]) < ZERO_LOSS:
        return []
    return [
        Finding(
            "problem",
            "The loss never changed: nothing is trained.",
            f"{number(loss.values[0])} in all {len(loss)} lines of the log",
            "Check that learning_rate is above 0 and that the trained weights are not frozen.",
        )
    ]


def loss_rises(figures: Figures) -> FindingOrNot:
    """A loss that ends higher than it began."""
    loss = _offline_loss(figures)
    if loss is None or len(loss) < MIN_LINES:
        return None
    change = loss.change()
    if change.after <= RISE * change.before or not change.is_clear():
        return []
    return [
        Finding(
            "problem",
            "The loss rose during training.",
            f"{number(change.before)} in the first fifth of the log, {number(change.after)} in the last",
            "Lower learning_rate (by a factor of 3 to 10), or use warmup_steps and max_grad_norm.",
        )
    ]


def loss_jumps(figures: Figures) -> FindingOrNot:
    """A loss that jumps above where training began."""
    loss = _offline_loss(figures)
    if loss is None or len(loss) <= LINES_BEFORE:
        return None
    start = loss.change().before
    jumps = []
    for position, (step, value) in enumerate(zip(loss.steps, loss.values, strict=True)):
        median = median_before(loss.values, position, LINES_BEFORE)
        if median is not None and value > JUMP * median and value > JUMP_ABOVE_START * start:
            jumps.append((step, value, median))
    if not jumps:
        return []
    step, value, median = max(jumps, key=lambda jump: jump[1])
    return [
        Finding(
            "warning",
            "The loss jumped above its value at the start.",
            f"{number(value)} at step {step}, after {number(median)}; {len(jumps)} such lines",
            "Lower learning_rate or max_grad_norm, and look at the rows of that step.",
        )
    ]


def gradient_spikes(figures: Figures) -> FindingOrNot:
    """Gradient norms far above those before them."""
    norms = figures.series("grad_norm")
    if len(norms) <= 2 * LINES_BEFORE:
        return None
    spikes = []
    # The first gradients of a run are no measure for the others.
    for position in range(2 * LINES_BEFORE, len(norms)):
        median = median_before(norms.values, position, LINES_BEFORE)
        if median and norms.values[position] > SPIKE * median:
            spikes.append((norms.steps[position], norms.values[position], median))
    if not spikes:
        return []
    step, value, median = max(spikes, key=lambda spike: spike[1])
    return [
        Finding(
            "warning" if len(spikes) >= MANY_SPIKES else "hint",
            "The gradient norm had spikes.",
            f"{number(value)} at step {step}, after {number(median)}; {len(spikes)} such lines",
            "If the loss suffers too, lower learning_rate or max_grad_norm, or use larger batches.",
        )
    ]


def learning_rate_is_zero(figures: Figures) -> FindingOrNot:
    """A learning rate of 0 in all lines."""
    rates = figures.series("learning_rate")
    if len(rates) < 2:
        return None
    if any(rates.values):
        return []
    return [
        Finding(
            "problem",
            "The learning rate is 0 in all lines of the log.",
            f"{len(rates)} lines",
            "Check learning_rate, lr_scheduler_type and warmup_steps: warmup may be longer than the run.",
        )
    ]


def nothing_moved(figures: Figures) -> FindingOrNot:
    """A loss that is where it began: the learning rate is too low, or the run too short."""
    loss = _offline_loss(figures)
    if loss is None or len(loss) < MIN_LINES_FOR_STANDSTILL or loss.is_constant:
        return None
    of_evaluation = figures.series(EVALUATION + "loss")
    change = loss.change()
    small = abs(change.difference) < STANDSTILL * abs(change.before)
    # Held-out rows are the same each time, so that a small change counts there.
    evaluation_moved = len(of_evaluation) > 1 and (
        abs(of_evaluation.values[-1] - of_evaluation.values[0]) >= STANDSTILL * abs(of_evaluation.values[0])
    )
    if not small or change.is_clear(2.0) or evaluation_moved:
        return []
    rates = figures.series("learning_rate").values
    peak = f"; the largest learning rate was {number(max(rates))}" if rates else ""
    return [
        Finding(
            "warning",
            "The loss hardly moved.",
            f"{number(change.before)} in the first fifth of the log, {number(change.after)} in the last{peak}",
            "Raise learning_rate (by a factor of 3 to 10; an adapter needs about 10 times that of full training), or "
            "train longer.",
        )
    ]


def overfitting(figures: Figures) -> FindingOrNot:
    """An evaluation loss that rises again while the training loss falls."""
    evaluation, training = figures.series(EVALUATION + "loss"), figures.series("loss")
    if len(evaluation) < 3 or figures.is_online:
        return None
    best = min(evaluation.values)
    best_step, last = evaluation.steps[evaluation.values.index(best)], evaluation.values[-1]
    after_best = [value for step, value in zip(training.steps, training.values, strict=True) if step > best_step]
    until_best = [value for step, value in zip(training.steps, training.values, strict=True) if step <= best_step]
    training_rose = bool(after_best and until_best) and after_best[-1] > until_best[-1] * JUMP
    if last <= OVERFITTING * best or best <= 0 or training_rose:
        return []
    return [
        Finding(
            "problem" if last > STRONG_OVERFITTING * best else "warning",
            "Overfitting: the evaluation loss rose again.",
            f"best {number(best)} at step {best_step}, {number(last)} at step {evaluation.steps[-1]}",
            f"Use the checkpoint near step {best_step} (load_best_model_at_end with metric_for_best_model eval_loss), "
            "train for fewer epochs, or add rows.",
        )
    ]


def evaluation_is_missing(figures: Figures) -> FindingOrNot:
    """No evaluation, or one alone."""
    if not figures.run.metrics:
        return None
    evaluations = {line.get("step") for line in figures.run.metrics if _is_evaluation(line)}
    if len(evaluations) > 1:
        return []
    found = "one evaluation" if evaluations else "no evaluation"
    return [
        Finding(
            "hint",
            "Held-out rows were not followed through training, so overfitting cannot be seen.",
            f"{found} in the log",
            "Pass --eval_dataset_name with --eval_strategy steps, --eval_steps and --eval_on_start.",
        )
    ]


def many_epochs(figures: Figures) -> FindingOrNot:
    """Rows that were read many times."""
    epochs = figures.series("epoch")
    if not epochs.values or figures.is_online:
        return None
    if epochs.values[-1] <= MANY_EPOCHS:
        return []
    return [
        Finding(
            "hint",
            "The rows were read many times.",
            f"{number(epochs.values[-1])} epochs; more than 4 repeat what is learned already (arXiv 2305.16264)",
            "Use fewer epochs or more rows, and follow the evaluation loss.",
        )
    ]


def _offline_loss(figures: Figures) -> Series | None:
    """The training loss; None where it measures no progress, or does not exist."""
    loss = figures.series("loss")
    return None if figures.is_online or not loss.values else loss


def _is_not_finite(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _is_evaluation(line: dict[str, Any]) -> bool:
    return any(name.startswith(EVALUATION) and is_finite_number(value) for name, value in line.items())


def _steps(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps[:3]))
    return f"{shown} and {len(steps) - 3} more" if len(steps) > 3 else shown


def last_mean(series: Series) -> float:
    """The mean of the last third.

    Args:
        series: not empty.

    Returns:
        That mean.
    """
    return statistics.fmean(series.end(1 / 3))


TRAINING_CHECKS = (
    Check("Loss and gradients are finite numbers", nonfinite_values),
    Check("The loss is not 0", loss_is_zero),
    Check("The loss changes", loss_is_constant),
    Check("The loss does not rise", loss_rises),
    Check("The loss does not jump above its start", loss_jumps),
    Check("The gradient norm has no spikes", gradient_spikes),
    Check("The learning rate is above 0", learning_rate_is_zero),
    Check("The loss moves by more than its noise", nothing_moved),
    Check("The evaluation loss does not rise again (overfitting)", overfitting),
    Check("Held-out rows are evaluated more than once", evaluation_is_missing),
    Check("Rows are not repeated too often", many_epochs),
)
