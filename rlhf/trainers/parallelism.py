"""``--parallelism_config``: how processes share the work; context parallelism, where several share each batch."""

import os
from contextlib import nullcontext
from typing import Any

from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils.environment import parse_flag_from_env
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import Trainer

from rlhf.models import Policy
from rlhf.models.context_parallel import ContextParallel
from rlhf.trainers.sharding import check_tied_tokens, leave_out_scales
from rlhf.trainers.unused_parameters import settle_unused_parameters

SIZES = ("dp_replicate_size", "dp_shard_size", "cp_size")
REFUSED_SIZES = {
    "tp_size": "tensor parallelism is not supported: FSDP2 shards weights, and cp_size divides long rows",
    "sp_size": "sequence parallelism by DeepSpeed is not supported: cp_size divides long rows, under FSDP2",
}
# Set by `accelerate launch`.
_FROM_LAUNCHER = "ACCELERATE_USE_PARALLELISM_CONFIG"
_LAUNCHED_SIZE = "PARALLELISM_CONFIG_"


def parallel_sizes(given: Any, world_size: int) -> dict[str, int] | None:
    """How many processes each kind of parallelism has.

    Args:
        given: a dictionary of sizes, an object of accelerate, or None for what ``accelerate launch`` was told.
        world_size: number of processes.
    Returns:
        Sizes by name, whose product is the number of processes; None where nothing is asked for.
    Raises:
        ValueError: an unknown name, a size that is no number of processes, or sizes that do not fit.
    """
    if given is None and parse_flag_from_env(_FROM_LAUNCHER):
        names = (*SIZES, *REFUSED_SIZES)
        given = {name: int(os.environ.get(_LAUNCHED_SIZE + name.upper(), "1")) for name in names}
    if isinstance(given, ParallelismConfig):  # from plain TrainingArguments
        given = {name: getattr(given, name) for name in (*SIZES, *REFUSED_SIZES)}
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(f'--parallelism_config {given}: expected a JSON object, such as {{"cp_size": 2}}')
    for name, size in given.items():
        if name not in SIZES and name not in REFUSED_SIZES:
            raise ValueError(f"--parallelism_config: no {name!r}; known are {', '.join(SIZES)}")
        if type(size) is not int or size < 1:
            raise ValueError(f"--parallelism_config: {name} must be a whole number from 1 on, got {size!r}")
        if name in REFUSED_SIZES and size > 1:
            raise ValueError(f"--parallelism_config: {name}: {REFUSED_SIZES[name]}")
    sizes = {name: given.get(name, 1) for name in SIZES}
    if "dp_shard_size" not in given:
        sizes["dp_shard_size"] = max(1, world_size // (sizes["dp_replicate_size"] * sizes["cp_size"]))
    product = sizes["dp_replicate_size"] * sizes["dp_shard_size"] * sizes["cp_size"]
    if product != world_size:
        text = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"--parallelism_config: {text} needs {product} processes, and there are {world_size}")
    return sizes if product > 1 else None


def check_context_parallel(args: Any) -> None:
    """Refuse what does not go with context parallelism.

    Args:
        args: a configuration, finished.
    Raises:
        ValueError: names the option and what to do.
    """
    if cp_size(args) == 1:
        return
    if not args.divides_rows:
        trainer = type(args).__name__.replace("Config", "Trainer")
        raise ValueError(f"--parallelism_config cp_size: {trainer} has no context parallelism (docs/parallel.md)")
    if not (args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")):
        raise ValueError(
            "--parallelism_config cp_size needs FSDP2, which shards the weights over the same processes: "
            "start with --accelerate_config fsdp2"
        )
    refused = {
        "layout": (args.layout == "rows", "it divides rows without padding"),
        "torch_compile": (args.torch_compile, "compiled layers do not exchange keys"),
        "neftune_noise_alpha": (args.neftune_noise_alpha is not None, "each process would draw noise of its own"),
        "precompute_ref_log_probs": (
            getattr(args, "precompute_ref_log_probs", None),
            "the reference is asked while training",
        ),
    }
    for name, (is_set, reason) in refused.items():
        if is_set:
            raise ValueError(f"--{name} does not go with --parallelism_config cp_size: {reason}; leave it out")


def cp_size(args: Any) -> int:
    """Number of processes that share each batch."""
    sizes: dict[str, int] | None = getattr(args, "parallelism_config", None)
    return 1 if sizes is None else sizes["cp_size"]


def gather_rows(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """Rows of all processes, each row once: as ``gather_for_metrics``, where processes may share batches.

    Args:
        accelerator: of the run.
        rows: [r, ...], as many on each process.
    Returns:
        Rows in the order of the data.
    """
    config = accelerator.parallelism_config
    if config is None or not config.cp_enabled:
        gathered: Tensor = accelerator.gather_for_metrics(rows)
        return gathered
    # Processes that share a batch are neighbours, and have the same rows.
    by_process = accelerator.gather(rows).view(-1, config.cp_size, *rows.shape)
    once = by_process[:, 0].flatten(0, 1)
    state = accelerator.gradient_state
    is_padded = state.end_of_dataloader and state.remainder > 0
    return once[: state.remainder] if is_padded else once


class SharedBatches(Trainer):
    """A ``transformers.Trainer`` in which several processes may share each batch (context parallelism).

    accelerate makes the groups of processes, gives each group the same rows, and shards the weights over all of them.
    The division of rows and the attention are our own.
    """

    args: Any

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        accelerator_args = super()._build_accelerator_args(**kwargs)
        sizes = self.args.parallelism_config
        if sizes is not None:
            accelerator_args["parallelism_config"] = ParallelismConfig(**sizes)
        return accelerator_args

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        accelerator: Any = self.accelerator
        # accelerate's own preparation takes masks out of the attention, which packed sequences need.
        accelerator._prepare_cp = lambda *objects: objects

    def _prepare_context_parallel_inputs(self, model: Any, inputs: Any) -> tuple[Any, Any]:
        """Nothing: the policy divides a batch itself."""
        return nullcontext, inputs

    def _spread_over_processes(self) -> None:
        """Settings of a run of several processes; before anything shards the model."""
        is_decided = "ddp_find_unused_parameters" in self.args.given_options
        settle_unused_parameters(self.model, self.accelerator, is_decided)  # type: ignore[arg-type]
        check_tied_tokens(self.model, self.accelerator)
        leave_out_scales(self.model, self.accelerator)  # type: ignore[arg-type]
        self._share_batches(self.model, self.data_collator)

    def _share_batches(self, policy: Any, collator: Any) -> None:
        """Let a policy compute a part of each batch, where processes share it."""
        if cp_size(self.args) == 1:
            return
        assert isinstance(policy, Policy)
        if getattr(collator, "layout", None) != "segments":
            raise ValueError(
                f"--parallelism_config cp_size divides rows without padding, and {type(policy.model).__name__} or this "
                "data collator needs padded rows: leave it out"
            )
        mesh: DeviceMesh = self.accelerator.torch_device_mesh
        policy.context_parallel = ContextParallel(mesh["cp"].get_group())
