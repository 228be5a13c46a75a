"""What a process holds of a model that several processes share: computed, not measured."""

import os
from dataclasses import replace
from typing import Any

from rlhf.planning.memory import MemoryPlan


def shared_parts(trainer: Any) -> dict[str, bool]:
    """Which parts are divided by the number of processes.

    Args:
        trainer: of the run.

    Returns:
        ``weights``, ``gradients`` and ``optimizer``, each True where it is divided.
    """
    weights = gradients = optimizer = False
    if trainer.is_fsdp_enabled:
        weights = gradients = optimizer = True
        # FSDP without resharding keeps the weights whole between forward and backward.
        weights = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    elif trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        weights, gradients, optimizer = stage >= 3, stage >= 2, stage >= 1
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def shards_of(args: Any) -> int:
    """How many processes share one copy of the model.

    Args:
        args: of the run.

    Returns:
        All of them, unless several copies are asked for (``dp_replicate_size``).
    """
    sizes: dict[str, int] = getattr(args, "parallelism_config", None) or {}
    return int(args.world_size) // sizes.get("dp_replicate_size", 1)


def divided(plan: MemoryPlan, parts: dict[str, bool], processes: int, shards: int, layer_bytes: int) -> MemoryPlan:
    """The memory of one of several processes.

    Args:
        plan: of one process that holds all.
        parts: from :func:`shared_parts`.
        processes: of the run.
        shards: processes that share one copy of the model.
        layer_bytes: weights of the largest layer, which is whole while it is computed.

    Returns:
        The plan with the parts divided, and with a note.
    """
    if processes <= 1:
        return plan
    is_sharded = parts["weights"]

    def share(num_bytes: int, name: str) -> int:
        return num_bytes // shards if parts[name] else num_bytes

    gradients = share(plan.gradients, "gradients")
    # DDP copies gradients into buckets, which it sums over the processes.
    exchange = 2 * layer_bytes if is_sharded else plan.gradients
    phases = {name: peak - plan.gradients + gradients + exchange for name, peak in plan.phases.items()}
    return replace(
        plan,
        weights=share(plan.weights, "weights"),
        others=share(plan.others, "weights"),
        optimizer=share(plan.optimizer, "optimizer"),
        gradients=gradients,
        phases={name: max(peak, exchange) for name, peak in phases.items()},
        note=f"of one of {processes} processes: computed from one process, not measured",
    )
