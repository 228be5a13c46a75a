"""Weights that are sharded over the processes: the precision of sums, and frozen models that are sharded too."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.environment import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from rlhf.kernels.linear import weights_are_here
from rlhf.models import Policy


def can_shard(accelerator: Accelerator) -> bool:
    """Whether the run shards weights in a way that a frozen model can take too: FSDP2 or ZeRO-3."""
    return accelerator.is_fsdp2 or zero_stage(accelerator) == 3


def uses_ddp(accelerator: Accelerator) -> bool:
    """Whether there are several processes that each hold the whole model, without FSDP and DeepSpeed."""
    plugins = ("fsdp_plugin", "deepspeed_plugin")
    is_sharded = any(getattr(accelerator.state, name, None) is not None for name in plugins)
    return accelerator.num_processes > 1 and not is_sharded


def zero_stage(accelerator: Accelerator) -> int:
    """The stage of DeepSpeed's ZeRO: from 2 on gradients, at 3 also weights are sharded. 0 without DeepSpeed."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else int(plugin.zero_stage)


def keep_single_precision(accelerator: Accelerator) -> None:
    """Let FSDP2 under mixed precision return float32 log-probs, and sum gradients in float32, as DDP does.

    accelerate's own policy casts what the model returns to the precision of its products: a sum of log-probs would have
    8 bits, and DPO would not begin at log 2. A policy that the user gave stays.

    Args:
        accelerator: of the run; its plugin is changed.
    """
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    dtype = None if policy is None else policy.param_dtype
    if dtype is not None and policy == MixedPrecisionPolicy(dtype, dtype, dtype):
        plugin.mixed_precision_policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)


def checkpoint_without_wrappers(args: Any, accelerator: Accelerator) -> None:
    """Let layers checkpoint themselves where FSDP is asked to do it, which would put a module around each of them.

    PEFT finds the weights of an adapter by the names of modules, so that it would save none of those inside. What is
    computed again is the same.

    Args:
        args: of the run, changed in place.
        accelerator: of the run; its plugin is changed.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or not plugin.activation_checkpointing:
        return
    plugin.activation_checkpointing = False
    # Older transformers (5.19) has only the second name.
    name = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    setattr(args, name, True)


def check_packed_weights(quantization_config: Any, args: Any) -> None:
    """Refuse weights of few bits that FSDP2 would change, before they are loaded.

    Args:
        quantization_config: of bitsandbytes, a dictionary or an object; None for none.
        args: the trainer's configuration.
    Raises:
        ValueError: weights of 8 bits; or packed bits in a float type that mixed precision would round.
    """
    is_fsdp = args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if quantization_config is None or not is_fsdp:
        return
    is_dict = isinstance(quantization_config, dict)
    config = quantization_config if is_dict else quantization_config.to_dict()
    if config.get("load_in_8bit"):
        raise ValueError("weights of 8 bits do not go with FSDP2: use DDP or ZeRO, or --load_in_4bit")
    storage = str(config.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else storage
    # Whole numbers are neither sharded nor rounded.
    if storage.startswith(("float", "bfloat")) and storage != precision:
        raise ValueError(
            f"bnb_4bit_quant_storage {storage}: FSDP2 would round the packed bits to {precision}; "
            f"pass --bnb_4bit_quant_storage {precision}"
        )


def leave_out_scales(model: nn.Module, accelerator: Accelerator) -> None:
    """Let FSDP2 gather a model with weights of 4 bits, of which an adapter is trained.

    bitsandbytes adds scales and tables to a layer's state, under names that belong to no parameter: PyTorch stops at
    them. They are frozen, and quantising the base model again gives them.

    Args:
        model: before it is sharded; its layers are changed in place.
        accelerator: of the run.
    """
    if not accelerator.is_fsdp2:
        return
    for module in model.modules():
        if type(getattr(module, "weight", None)).__name__ == "Params4bit":
            module.register_state_dict_post_hook(_without_scales)


def _without_scales(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}weight.")]:
        del state[key]


def check_whole(model: nn.Module) -> None:
    """Refuse a model of which this process has only a part.

    Args:
        model: before training shards it.
    Raises:
        ValueError: ZeRO-3 sharded it when it was loaded, its weights are on the meta device, or its layers are divided
            by tensor parallelism.
    """
    processes: int = getattr(model, "tp_size", None) or 1
    if processes > 1:
        raise ValueError(
            f"the layers of a {type(model).__name__} were divided over {processes} processes when it was loaded "
            "(tp_plan): trainers do not support tensor parallelism; load it whole, and let FSDP2 shard it"
        )
    if not weights_are_here(model):
        raise ValueError(
            f"this process has only a part of the weights of a {type(model).__name__}: load it after the trainer's "
            "configuration is made, which lets models be loaded whole; training shards them"
        )


def check_tied_tokens(model: Any, accelerator: Accelerator) -> None:
    """Refuse an adapter with rows of new tokens in an embedding that is the head too: FSDP2 cannot shard it.

    PEFT makes one parameter of the rows for both layers, which are sharded apart.

    Args:
        model: of the run, before it is sharded.
        accelerator: of the run.
    Raises:
        ValueError: it has such an adapter, and FSDP2 is used.
    """
    adapter = getattr(model, "active_peft_config", None)
    if not accelerator.is_fsdp2 or getattr(adapter, "trainable_token_indices", None) is None:
        return
    if model.get_base_model().config.get_text_config().tie_word_embeddings:
        raise ValueError(
            "--add_tokens with an adapter does not go with FSDP2 where the embedding is the head too (tied weights): "
            "use DDP, or train all weights"
        )


def shard(frozen: Policy, accelerator: Accelerator) -> nn.Module:
    """Shard the weights of a frozen policy.

    Args:
        frozen: whole on each process, on a CPU; changed in place.
        accelerator: of a run for which :func:`can_shard` holds.
    Returns:
        What is called with batches: its hooks gather the weights of each layer while that layer computes.
    """
    if not accelerator.is_fsdp2:
        return _zero3_engine(frozen, accelerator)
    # The plugin keeps the classes of layers of the first model it meets, which must not be those of another model.
    state: Any = accelerator.state
    plugin = state.fsdp_plugin
    state.fsdp_plugin = copy.copy(plugin)
    try:
        return fsdp2_prepare_model(accelerator, frozen)
    finally:
        state.fsdp_plugin = plugin


def _zero3_engine(frozen: Policy, accelerator: Accelerator) -> nn.Module:
    import deepspeed

    # The batch sizes and the optimizer of the run's configuration mean nothing here, but DeepSpeed checks them.
    given = accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
    zero: dict[str, Any] = {"stage": 3}
    if "offload_param" in given:
        zero["offload_param"] = given["offload_param"]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": accelerator.mixed_precision == "bf16"},
        "fp16": {"enabled": accelerator.mixed_precision == "fp16"},
    }
    engine, *_ = deepspeed.initialize(model=frozen, config=config)
    return engine.eval()


def check_sharding_of(checkpoint: str, accelerator: Accelerator) -> None:
    """Refuse a checkpoint whose shards this run cannot load.

    Args:
        checkpoint: its folder.
        accelerator: of the run.
    Raises:
        ValueError: it was saved with other sharding, or by another number of DeepSpeed's processes.
    """
    folder, state = Path(checkpoint), accelerator.state
    sharding = {"FSDP": "pytorch_model_fsdp*", "DeepSpeed": "global_step*"}
    plugins = {"FSDP": "fsdp_plugin", "DeepSpeed": "deepspeed_plugin"}
    saved_with = next((name for name, files in sharding.items() if any(folder.glob(files))), "no sharding")
    runs_with = next((name for name in plugins if getattr(state, plugins[name], None) is not None), "no sharding")
    if saved_with != runs_with:
        raise ValueError(f"{checkpoint}: saved with {saved_with}, and this run has {runs_with}: resume as it was saved")
    zero_shards = len(list(folder.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
    if zero_shards and zero_shards != accelerator.num_processes:
        raise ValueError(
            f"{checkpoint}: DeepSpeed saved its optimizer in {zero_shards} processes, and cannot give it to "
            f"{accelerator.num_processes}: resume with as many as before"
        )
