"""The lines that a dry run prints."""

from rlhf.planning.memory import GIB, MemoryPlan
from rlhf.planning.plan import RunPlan
from rlhf.planning.schedule import RowFigures
from rlhf.visible import visible

_WIDTH = 24  # of the names


def plan_lines(plan: RunPlan, device: str) -> list[str]:
    """The figures of a plan.

    Args:
        plan: of the run.
        device: where it trains, such as ``cpu``.

    Returns:
        Lines of text, without control characters.
    """
    lines = ["rows", *_row_lines("training", plan.train)]
    for name, figures in plan.evaluation.items():
        lines += _row_lines(name, figures)
    lines += ["", "steps", *_step_lines(plan)]
    lines += ["", f"memory at the peak ({device})", *_memory_lines(plan.memory)]
    lines += ["", "disk", *_disk_lines(plan)]
    lines += ["", "time", *_time_lines(plan)]
    if plan.notes:
        lines += ["", "notes", *(f"  {note}" for note in plan.notes)]
    return [visible(line) for line in lines]


def _line(name: str, value: str) -> str:
    return f"  {name:<{_WIDTH}}{value}"


def _row_lines(name: str, figures: RowFigures | None) -> list[str]:
    if figures is None:
        return [_line(name, "a stream: its rows are not known before they are read")]
    lines = [
        _line(name, f"{figures.rows:,}"),
        _line("  tokens of one", f"{figures.shortest:,} to {figures.longest:,}, median {figures.median:,}"),
    ]
    total = f"{figures.tokens:,}"
    if figures.scored is not None:
        total += f", {figures.scored / figures.tokens:.0%} scored"
    return [*lines, _line("  tokens of all", total)]


def _step_lines(plan: RunPlan) -> list[str]:
    schedule = plan.schedule
    lines = [
        _line("in all", f"{schedule.steps:,}"),
        _line("in an epoch", f"{schedule.steps_per_epoch:,}"),
        _line("largest micro-batch", f"{plan.largest:,} tokens"),
    ]
    if schedule.evaluations:
        lines.append(_line("evaluations", f"{schedule.evaluations:,}"))
    return [*lines, _line("checkpoints", f"{schedule.checkpoints:,}")]


def _memory_lines(memory: MemoryPlan) -> list[str]:
    lines = [_line("weights", gib(memory.weights))]
    if memory.others:
        lines.append(_line("other models", gib(memory.others)))
    lines.append(_line("optimizer state", gib(memory.optimizer)))
    if memory.vllm:
        lines.append(_line("vLLM", f"{gib(memory.vllm)}, asleep in training with --vllm_enable_sleep_mode"))
    lines.append(_line("activations, gradients", f"{gib(memory.phases[memory.phase])}, most in: {memory.phase}"))
    if memory.fixed:
        lines.append(_line("Python, libraries", gib(memory.fixed)))
    if memory.expected > memory.peak:
        kept = gib(memory.expected - memory.peak)
        lines.append(_line("kept by the C library", f"{kept}, measured in two real steps"))
    lines.append(_line("in all", f"{gib(memory.expected)} of {gib(memory.available)}"))
    if memory.note:
        lines.append(_line("", memory.note))
    if memory.fits:
        return lines
    lines.append("  This does not fit. With one change, the peak would be:")
    return lines + [_line(f"  {change}", gib(num_bytes)) for change, num_bytes in memory.changes.items()]


def _disk_lines(plan: RunPlan) -> list[str]:
    disk = plan.disk
    lines = [_line("model", gib(disk.model))]
    if disk.checkpoints:
        lines.append(_line("checkpoints", f"{disk.checkpoints} × {gib(disk.checkpoint)}"))
    lines.append(_line("at most", f"{gib(disk.at_most)}; {gib(disk.free)} are free"))
    if disk.at_most > disk.free:
        lines.append("  This does not fit: lower --save_total_limit, or pass --save_only_model.")
    return lines


def _time_lines(plan: RunPlan) -> list[str]:
    duration = plan.duration
    if duration is None:
        return ["  not measured: the run does not fit"]
    parts = {
        "training": duration.training,
        "rollouts": duration.rollouts,
        "evaluation": duration.evaluation,
        "saving": duration.saving,
    }
    lines = [_line(name, as_time(seconds)) for name, seconds in parts.items() if seconds]
    if duration.rollouts:
        lines.append("  Rollouts: with completions of full length; without the time of reward functions.")
    return [*lines, _line("in all", as_time(duration.total))]


def gib(num_bytes: int) -> str:
    """Bytes for people.

    Args:
        num_bytes: how many.

    Returns:
        The size in GiB, or in MiB below a tenth of one.

    Example:
        >>> gib(3 * 2**29), gib(2**20)
        ('1.50 GiB', '1.0 MiB')
    """
    if num_bytes < GIB / 10:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / GIB:.2f} GiB"


def as_time(seconds: float) -> str:
    """A duration for people.

    Args:
        seconds: how many.

    Returns:
        Seconds, minutes or hours.

    Example:
        >>> as_time(12.3), as_time(600), as_time(9000)
        ('12 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
