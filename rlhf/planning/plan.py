"""The plan of a run: what it reads, how long it takes, and whether it fits."""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rlhf.data import Mixture
from rlhf.models.activations import checkpointing_options
from rlhf.online import PPOTrainer
from rlhf.planning.advice import changes_that_help
from rlhf.planning.batches import BatchSizes, Micro, batch_sizes, largest_of_stream, make_micro, sizes_of_rows
from rlhf.planning.memory import (
    MemoryPlan,
    available_memory,
    device_memory,
    gradient_bytes,
    peak_resident,
    resident_memory,
    weight_bytes,
)
from rlhf.planning.sampling import RolloutWork, largest_rollout_micro
from rlhf.planning.schedule import Disk, RowFigures, Schedule, disk_of, row_figures, schedule_of
from rlhf.planning.sharding import divided, shards_of, shared_parts
from rlhf.planning.step import at_full_depth, measure_step, other_models, stacks_of
from rlhf.planning.timing import (
    Duration,
    Speed,
    existing_parent,
    forward,
    measure_speed,
    seconds_to_save,
)
from rlhf.planning.tracking import MemoryRecorder
from rlhf.rollouts.arguments import ServerArguments
from rlhf.trainers.base import BaseTrainer

ROLLOUT, EVALUATION, REFERENCE = "rollout", "evaluation", "reference pass"
UNPLANNED_SAMPLING = "sampling comes on top: its time, and where the student samples in this process, its memory"


@dataclass(frozen=True)
class RunPlan:
    """What is known of a run before its first step.

    Attributes:
        train: the training rows; None for a stream.
        evaluation: the evaluation rows by name.
        schedule: steps, evaluations and checkpoints.
        largest: tokens of the largest micro-batch.
        memory: at the peak of one process.
        disk: what the run leaves.
        duration: of the whole run; None where it does not fit.
        speed: measured times; None where the run does not fit.
        notes: what was logged while everything was checked.
    """

    train: RowFigures | None
    evaluation: dict[str, RowFigures | None]
    schedule: Schedule
    largest: int
    memory: MemoryPlan
    disk: Disk
    duration: Duration | None = None
    speed: Speed | None = None
    notes: list[str] = field(default_factory=list)


def plan_run(trainer: BaseTrainer, folder: Path | None = None, *, with_times: bool = True) -> RunPlan:
    """Predict the memory, the disk and the time of a run.

    Afterwards nothing may be trained with the trainer.

    Args:
        trainer: as it would be trained.
        folder: where the run would write; by default the trainer's own.
        with_times: do real steps, where they fit, to time them.

    Returns:
        The plan.

    Raises:
        ValueError: the layers of the model are not found.
        OSError: the folder cannot be written.
    """
    output_folder = Path(str(trainer.args.output_dir)) if folder is None else folder
    disk_folder = existing_parent(output_folder)
    loader = trainer.get_train_dataloader()
    schedule = schedule_of(trainer, loader)
    sizes = batch_sizes(trainer, loader, schedule.micro_batches)
    train_rows = row_figures(trainer.train_dataset)
    enable_checkpointing(trainer)
    rollouts = RolloutWork.of(trainer)
    micro = _largest_micro(trainer, loader, sizes)
    memory = predict_memory(trainer, micro, rollouts)
    disk = disk_of(trainer, schedule, memory.optimizer, shutil.disk_usage(disk_folder).free)
    largest = int(micro.batch.input_ids.numel())
    # Servers, vLLM and students of a teacher.
    is_unplanned = getattr(trainer, "rollouts", None) is not None and rollouts is None
    notes = [UNPLANNED_SAMPLING] if is_unplanned else []
    plan = RunPlan(train_rows, _evaluation_figures(trainer), schedule, largest, memory, disk, notes=notes)
    if not memory.fits:
        # Micro-batches of rollouts are not those of the rows.
        sizes = None if isinstance(trainer, PPOTrainer) else sizes
        others = changes_that_help(trainer, sizes, memory, lambda other: predict_memory(trainer, other, rollouts).peak)
        return replace(plan, memory=replace(memory, changes=others))
    if not with_times:
        return plan
    return _with_times(plan, trainer, micro, sizes, rollouts, disk_folder)


def enable_checkpointing(trainer: Any) -> None:
    """Turn activation checkpointing on, as training does, if it is asked for."""
    is_on, checkpoint_kwargs = checkpointing_options(trainer.args)
    if is_on:
        # transformers reads these two out of the dictionary.
        own_names = checkpoint_kwargs.keys() & {"every_n_layers", "offload"}
        own_kwargs = {name: checkpoint_kwargs.pop(name) for name in own_names}
        trainer.model.activation_checkpointing_enable(checkpoint_kwargs, **own_kwargs)


def _largest_micro(trainer: Any, loader: Any, sizes: BatchSizes | None) -> Micro:
    if isinstance(trainer, PPOTrainer):
        return largest_rollout_micro(trainer)
    if sizes is None:
        return largest_of_stream(trainer, loader)
    return make_micro(trainer, [trainer.train_dataset[index] for index in sizes.largest])


def _evaluation_figures(trainer: Any) -> dict[str, RowFigures | None]:
    rows = trainer.eval_dataset
    if rows is None:
        return {}
    sets = rows if isinstance(rows, dict) else {"evaluation": rows}
    return {name: row_figures(part) for name, part in sets.items()}


# Memory


def predict_memory(trainer: BaseTrainer, micro: Micro, rollouts: RolloutWork | None = None) -> MemoryPlan:
    """Predict the peak of a run from a few layers.

    Args:
        trainer: not trained yet.
        micro: the largest micro-batch.
        rollouts: what it samples, if it does.

    Returns:
        The memory of one process.
    """
    model: Any = trainer.model
    device = trainer.args.device
    stacks = stacks_of(trainer)
    step = measure_step(trainer, micro, stacks)
    phases = dict(step.peaks)
    if rollouts is not None:
        element_size = 2 if trainer.accelerator.mixed_precision in ("bf16", "fp16") else model.dtype.itemsize
        phases[ROLLOUT] = rollouts.peak(stacks, device, model.config, element_size)
    vllm = _vllm_bytes(trainer)
    if vllm and trainer.args.rollout_server_sleep:  # and then only while it samples
        phases[ROLLOUT], vllm = vllm, 0
    for name, batch in _forward_batches(trainer):
        phases[name] = _forward_peak(trainer, batch, stacks)
    weights, others = weight_bytes([model]), weight_bytes(other_models(trainer))
    # The critic is a part of the trained module.
    critic = getattr(model, "critic", None)
    others -= 0 if critic is None else weight_bytes([critic])
    fixed = 0
    if device.type == "cpu":
        fixed = max(resident_memory() - weights - others, 0)
    whole = MemoryPlan(
        weights=weights,
        others=others,
        optimizer=step.optimizer,
        gradients=gradient_bytes(model),
        phases=phases,
        fixed=fixed,
        available=available_memory(device),
        vllm=vllm,
    )
    layer = max(weight_bytes([layer]) for layer in stacks[0].layers)
    args = trainer.args
    return divided(whole, shared_parts(trainer), args.world_size, shards_of(args), layer)


def _vllm_bytes(trainer: Any) -> int:
    """The memory of vLLM in this process."""
    colocated = trainer.args.colocated_vllm() if isinstance(trainer.args, ServerArguments) else None
    if colocated is None:
        return 0
    share, _ = colocated
    return int(share * device_memory(trainer.args.device))


def _forward_batches(trainer: Any) -> list[tuple[str, Any]]:
    """The largest batches that are read without a gradient: of evaluation, and of a reference that is asked once."""
    batches: list[tuple[str, Any]] = []
    args = trainer.args
    if isinstance(trainer, PPOTrainer):
        return batches
    for rows in _eval_sets(trainer):
        batches.append((EVALUATION, _longest(trainer, rows, args.eval_batch_size)))
    if getattr(trainer, "stored_key", None) is not None:
        size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        batches.append((REFERENCE, _longest(trainer, trainer.train_dataset, size)))
    return batches


def _eval_sets(trainer: Any) -> list[Any]:
    rows = trainer.eval_dataset
    sets = list(rows.values()) if isinstance(rows, dict) else [rows]
    return [part for part in sets if part is not None and hasattr(part, "__len__") and not isinstance(part, Mixture)]


def _longest(trainer: Any, rows: Any, count: int) -> Any:
    """A batch of the longest rows."""
    lengths = sizes_of_rows(rows)
    order = (-lengths).argsort(kind="stable")[:count]
    return make_micro(trainer, [rows[int(index)] for index in order]).batch


def _forward_peak(trainer: BaseTrainer, batch: Any, stacks: Any) -> int:
    def run(_: Any) -> dict[str, int]:
        recorder = MemoryRecorder(torch.device(trainer.args.device))

        def work() -> None:
            recorder.mark(EVALUATION)
            forward(trainer, batch)

        recorder.record(work)
        return {EVALUATION: recorder.phases[EVALUATION].peak}

    return at_full_depth(stacks, run)[EVALUATION]


# Time

TRIAL_SIZES = 4  # of micro-batches that are really computed on a CPU


def _with_times(
    plan: RunPlan,
    trainer: Any,
    micro: Micro,
    sizes: BatchSizes | None,
    rollouts: RolloutWork | None,
    disk_folder: Path,
) -> RunPlan:
    """The plan with the times of real steps."""
    rollout_seconds = 0.0 if rollouts is None else rollouts.seconds()
    micros = [micro]
    mean_tokens = float(plan.largest)
    if sizes is not None and not isinstance(trainer, PPOTrainer):
        # On a CPU the allocator keeps more memory the more sizes it has seen.
        chosen = sizes.spread(TRIAL_SIZES) if trainer.args.device.type == "cpu" else sizes.typical(1)
        micros += [make_micro(trainer, [trainer.train_dataset[index] for index in rows]) for rows in chosen]
        mean_tokens = float(sizes.tokens.mean())
    eval_sets = [] if isinstance(trainer, PPOTrainer) else _eval_sets(trainer)
    eval_batch = None
    if eval_sets:
        count = min(trainer.args.eval_batch_size, len(eval_sets[0]))
        eval_batch = make_micro(trainer, [eval_sets[0][index] for index in range(count)]).batch
    speed = measure_speed(trainer, micros, eval_batch)
    schedule = plan.schedule
    training = schedule.micro_batches * mean_tokens * speed.token + schedule.steps * speed.update
    eval_tokens = sum(int(sizes_of_rows(rows).sum()) for rows in eval_sets)
    saves = seconds_to_save(plan.disk.checkpoint * schedule.checkpoints + plan.disk.model, disk_folder)
    duration = Duration(
        training=training,
        rollouts=rollout_seconds * _num_rollouts(trainer, schedule),
        evaluation=schedule.evaluations * eval_tokens * speed.eval_token / trainer.args.world_size,
        saving=saves,
    )
    # Sharded processes hold a part of what this one measured.
    measured = peak_resident() if trainer.args.device.type == "cpu" and trainer.args.world_size == 1 else 0
    memory = replace(plan.memory, measured=measured)
    return replace(plan, memory=memory, duration=duration, speed=speed)


def _num_rollouts(trainer: Any, schedule: Schedule) -> int:
    if not isinstance(trainer, PPOTrainer):
        return 0
    steps_per_rollout = trainer.args.num_iterations * trainer.args.num_mini_batches
    return -(-schedule.steps // steps_per_rollout)
