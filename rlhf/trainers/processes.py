"""Several processes: what a launcher started must be what the trainer sees, or each process would train on its own."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, get_int_from_env
from accelerate.utils.environment import parse_flag_from_env
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

# What the launchers of torch and accelerate, MPICH, Open MPI and MVAPICH set; accelerate reads the same ones.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Set by `accelerate launch`. accelerate shards weights over accelerators alone.
_VARIABLES = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}


def trains_on_cpus(args: Any) -> bool:
    """Whether this is one of several processes on machines without an accelerator.

    accelerate makes no process group for them unless it is told to use CPUs.

    Args:
        args: ``TrainingArguments``, before they choose their devices.
    Returns:
        False where sharding is asked for: on CPUs that would be left out without a word.
    """
    is_launched = launched_world_size() > 1 and "RANK" in os.environ
    return is_launched and not torch.accelerator.is_available() and not _sharding(args)


def check_processes(args: Any) -> None:
    """Compare what a launcher started with what the trainer sees.

    Args:
        args: ``TrainingArguments``, finished.
    Raises:
        ValueError: another number of processes, so that each would train and write on its own; or weights that are to
            be sharded over CPUs.
    """
    launched, sharding = launched_world_size(), _sharding(args)
    if sharding and args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        raise ValueError(f"{sharding} shards weights over accelerators, and these processes use CPUs: leave it out")
    if launched == args.world_size:
        return
    remedy = f"{sharding} needs accelerators, leave it out" if sharding else "--use_cpu trains on CPUs"
    raise ValueError(
        f"WORLD_SIZE says that {launched} processes were launched, and this one sees {args.world_size}: each would "
        f"train alone; {remedy}; unset WORLD_SIZE to train in one process"
    )


def load_models_whole() -> None:
    """Let transformers load whole models under ZeRO-3; training shards them when it starts.

    Otherwise each process would get parts, of which neither a head nor a vocabulary can be read.
    """
    unset_hf_deepspeed_config()


def another_process_failed() -> bool:
    """Whether a process on this machine has told torch's launcher of an error, so that the launcher ends the others."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # in a folder for each process
    if file is None:
        return False
    own = Path(file)
    return any(other != own for other in own.parent.parent.glob(f"*/{own.name}"))


def launched_world_size() -> int:
    """The number of processes that a launcher started; 1 without a launcher."""
    return get_int_from_env(WORLD_SIZES, 1)


def _sharding(args: Any) -> str:
    """What is to shard the weights, as the launcher or the configuration says; empty for nothing."""
    from_options = {"FSDP": args.fsdp, "DeepSpeed": args.deepspeed}
    names = [name for name in from_options if from_options[name] or parse_flag_from_env(_VARIABLES[name])]
    return " and ".join(names)
