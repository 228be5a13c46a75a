"""What becomes of each option and argument that ``transformers`` brings: it acts, is refused, or is handed on.

An option that would be ignored is refused by name, with what to do instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

# A test compares these tables with the fields of TrainingArguments: each new option needs a decision.
REFUSED: dict[str, str] = {
    "label_smoothing_factor": "no loss here smooths labels by default; DPO has --label_smoothing",
    "bf16_full_eval": "models are evaluated as they are trained; rlhf eval --dtype bfloat16 evaluates in bfloat16",
    "fp16_full_eval": "models are evaluated as they are trained; rlhf eval --dtype float16 evaluates in float16",
    "use_liger_kernel": "full logits are never built here, and Liger's kernels would replace the code that avoids them",
    "liger_kernel_config": "Liger's kernels are not used",
    "use_cache": "training reads whole sequences; sampling manages its own cache",
    "auto_find_batch_size": "use --tokens_per_batch or --gradient_accumulation_steps",
    "eval_do_concat_batches": "predictions are one figure for each row, for any batch size",
    "eval_use_gather_object": "metrics are tensors",
    "include_for_metrics": "docs/metrics.md lists what is measured",
    "batch_eval_metrics": "metrics are sums over the data set, for any batch size",
    "average_tokens_across_devices": "the loss is always divided by the number of scored items on all devices",
    "length_column_name": "lengths are counted from the tokens",
    "do_predict": "nothing is predicted after training; use rlhf eval",
}
"""Options that would be ignored, and what to do instead."""

REFUSED_ARGUMENTS: dict[str, str] = {
    "compute_loss_func": "the loss is never made from logits here; override measure(), or use rlhf.losses in a Trainer "
    "of your own",
    "model_init": "pass the model itself; for a search over hyper-parameters make a trainer for each trial",
}
"""Arguments of ``transformers.Trainer`` that would be ignored, and what to do instead."""

ACTS: dict[str, str] = {
    "output_dir": "a folder with another run is not overwritten",
    "bf16": "on by default where the GPU has bfloat16",
    "remove_unused_columns": "columns that nothing reads are left out when rows are tokenised, always",
    "dataloader_pin_memory": "on where there is a GPU",
    "ddp_find_unused_parameters": "by default on where a trial text misses trainable parameters",
    "logging_steps": "10 by default",
    "logging_nan_inf_filter": "off by default",
    "include_num_input_tokens_seen": "tokens are counted without padding, whatever is asked",
    "train_sampling_strategy": "lengths are counted from the tokens; on-policy training has shuffle_dataset",
    "prediction_loss_only": "predict returns metrics alone",
    "eval_accumulation_steps": "sums leave the device after each batch, always",
    "label_names": "batches name their targets themselves; only labels is accepted",
    "metric_for_best_model": "by default loss; reward in on-policy training",
    "greater_is_better": "known for the metrics of docs/metrics.md",
    "load_best_model_at_end": "a metric that evaluation does not give is found before training",
    "report_to": "one or several names; a missing package is found at the start",
    "run_name": "by default the name of the output folder",
    "project": "by default the name of the folder above the output folder",
    "parallelism_config": "sizes of FSDP2's groups, and cp_size: processes that share each batch",
    "optim": "a missing package is found at the start",
    "resume_from_checkpoint": "a folder, or true for the last in output_dir; also on the command line",
    "do_train": "the commands train",
    "do_eval": "the commands evaluate where there are rows to evaluate on",
    "torch_compile": "each layer is compiled, for batches of any shape",
    "torch_compile_backend": "as torch_compile",
    "torch_compile_mode": "as torch_compile",
    "accelerator_config": "non_blocking follows dataloader_pin_memory; dispatch_batches is refused",
    "per_device_train_batch_size": "rows, pairs or completions; 1 planned batch under tokens_per_batch",
    "max_grad_norm": "the gradient of the whole step",
    "neftune_noise_alpha": "on the embeddings of the policy in training",
    "eval_strategy": "refused where there are no rows to evaluate on",
    "eval_on_start": "refused where there are no rows to evaluate on",
}
"""Options that our own code reads, defaults differently or makes true anyway."""

HANDED_ON: dict[str, str] = {
    "optimizer and schedule": "num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs "
    "warmup_steps optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules "
    "gradient_accumulation_steps",
    "precision and memory": "fp16 tf32 activation_checkpointing activation_checkpointing_kwargs "
    "gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps",
    "logging": "logging_strategy logging_first_step log_on_each_node log_level log_level_replica disable_tqdm "
    "trackio_space_id trackio_bucket_id trackio_static_space_id debug skip_memory_metrics",
    "evaluation and checkpoints": "eval_steps eval_delay per_device_eval_batch_size save_only_model save_strategy "
    "save_steps save_on_each_node save_total_limit enable_jit_checkpoint ignore_data_skip "
    "restore_callback_states_from_checkpoint",
    "the hub": "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    "randomness and loading of rows": "full_determinism seed data_seed dataloader_drop_last dataloader_num_workers "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order",
    "devices": "use_cpu ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp "
    "fsdp_config deepspeed local_rank",
}
"""Options that transformers reads, untouched, by subject."""

# Compared by their ends, because the name of a data set may stand before them.
LESS_IS_BETTER = ("loss", "perplexity", "perplexity/chosen", "kl", "divergence", "brier_score", "calibration_error")
"""Ends of names of metrics of which the least is the best."""

_PACKAGES = {
    "wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow", "comet_ml": "comet_ml", "trackio": "trackio",
    "clearml": "clearml", "swanlab": "swanlab", "dvclive": "dvclive", "codecarbon": "codecarbon",
    "dagshub": "dagshub", "neptune": "neptune",
}  # fmt: skip
"""Of a tracker's name, the package that it needs."""

_OPTIMIZER_PACKAGES = {
    "8bit": "bitsandbytes", "paged": "bitsandbytes", "bnb": "bitsandbytes", "ademamix": "bitsandbytes",
    "lion": "bitsandbytes",
    "galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim", "grokadamw": "grokadamw",
    "schedule_free": "schedulefree", "torch_4bit": "torchao", "torch_8bit": "torchao", "stable_adamw": "optimi",
    "adamw_apex": "apex", "anyprecision": "torchdistx",
}  # fmt: skip
"""Of a part of an optimizer's name, the package that it needs; the last that fits counts."""

# Where pip knows a package under another name than import.
_INSTALLED_AS = {"galore_torch": "galore-torch", "apollo_torch": "apollo-torch", "lomo_optim": "lomo-optim"}
_INSTALLED_AS |= {"optimi": "torch-optimi", "comet_ml": "comet-ml"}


def check_options(args: Any) -> None:
    """Refuse options that would be ignored.

    Args:
        args: a configuration.
    Raises:
        ValueError: names the option and what to do.
    """
    # A value equal to the default is not refused: plain TrainingArguments have all of these.
    for name, reason in REFUSED.items():
        value = getattr(args, name, None)
        # Fields whose default a factory makes, a list or a dictionary, start empty.
        if value not in (_default(args, name), None, [], {}):
            raise ValueError(f"--{name} {_as_typed(value)} has no effect here: {reason}")
    if args.label_names not in (None, [], ["labels"]):
        raise ValueError("--label_names has no effect here: batches name their targets themselves")
    if args.accelerator_config.dispatch_batches:
        raise ValueError("--accelerator_config dispatch_batches has no effect here: each process reads its own rows")
    if not args.accelerator_config.even_batches and args.world_size > 1 and not args.dataloader_drop_last:
        raise ValueError(
            "--accelerator_config even_batches false: processes with fewer batches would leave the others waiting; "
            "leave it out, or pass --dataloader_drop_last"
        )
    checkpoint_kwargs = getattr(args, "activation_checkpointing_kwargs", None)  # not in transformers 5.19
    if args.torch_compile and isinstance(checkpoint_kwargs, dict) and checkpoint_kwargs.get("selective"):
        raise ValueError(
            "--activation_checkpointing_kwargs selective does not work with --torch_compile: leave one out (compiled "
            "layers recompute what is cheap by themselves)"
        )


def check_packages(args: Any) -> None:
    """Refuse options that need a package which is not installed, before transformers looks for it.

    Args:
        args: a configuration.
    Raises:
        ValueError: names the option and what to install; or an optimizer of bitsandbytes on a CPU.
    """
    for tracker in args.report_to:
        if tracker not in (*INTEGRATION_TO_CALLBACK, "all", "none"):
            raise ValueError(f"--report_to {tracker} is unknown: one of {', '.join(INTEGRATION_TO_CALLBACK)}, or none")
        require(_tracker_package(tracker), f"--report_to {tracker}")
    # Text before transformers' own checks, a member of an enum after them.
    optimizer = str(getattr(args.optim, "value", args.optim))
    package = None
    for name_part, candidate in _OPTIMIZER_PACKAGES.items():
        if name_part in optimizer:
            package = candidate  # the last that fits counts: galore_adamw_8bit is GaLore's
    require(package, f"--optim {optimizer}")
    # Not `args.device`, which would start the processes' group before DeepSpeed is known.
    if package == "bitsandbytes" and (args.use_cpu or not torch.accelerator.is_available()):
        raise ValueError(f"--optim {optimizer}: bitsandbytes has no optimizers for a CPU; use adamw_torch")
    if args.deepspeed:
        require("deepspeed", "--deepspeed")


def refuse_arguments(**arguments: Any) -> None:
    """Refuse arguments of a trainer that cannot act.

    Args:
        **arguments: by name; None where it was not passed.
    Raises:
        ValueError: names the argument and what to do.
    """
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is not supported: {REFUSED_ARGUMENTS[name]}")


def as_config(args: Any, config_class: type) -> Any:
    """Turn plain ``TrainingArguments`` into a trainer's configuration.

    Args:
        args: a configuration; plain arguments, of which what differs from the default is taken over; or None.
        config_class: the type that the trainer needs.
    Returns:
        A ``config_class``.
    """
    if args is None:
        return config_class(output_dir="runs")
    # Other types are passed on: an object with the right attributes will do.
    if isinstance(args, config_class) or not isinstance(args, TrainingArguments):
        return args
    # An instance, as its __post_init__ fills in many fields of args too.
    defaults = TrainingArguments(output_dir=args.output_dir)
    changed = {}
    known_names = {option.name for option in fields(config_class) if option.init}
    # What equals transformers' default was not chosen, so that ours takes its place.
    for option in fields(args):
        # remove_unused_columns must be false here, whatever was set there.
        if not option.init or option.name not in known_names or option.name == "remove_unused_columns":
            continue
        value = getattr(args, option.name)
        if value != getattr(defaults, option.name):
            changed[option.name] = value
    return config_class(**{"output_dir": args.output_dir, **changed})


def require(package: str | None, option: str) -> None:
    """Check that the package which an option needs is installed.

    Args:
        package: its name for ``import``; None for no package.
        option: as it was given, for the message.
    Raises:
        ValueError: the package is missing.
    """
    if package is not None and find_spec(package) is None:
        raise ValueError(f"{option} needs a package that is missing: pip install {_INSTALLED_AS.get(package, package)}")


@contextmanager
def accepting(option: str, value: Any) -> Iterator[None]:
    """Name the option whose entries a function of transformers does not take.

    Args:
        option: its name.
        value: its value; a ``TypeError`` without one has another cause, and is raised as it is, unless an entry is
            missing.
    Raises:
        ValueError: in the place of a ``TypeError``.
    """
    try:
        yield
    except TypeError as error:
        if not value and "missing" not in str(error):  # then the option is not the cause
            raise
        raise ValueError(f"--{option} {value}: {error}") from error


def greater_is_better(metric: str) -> bool:
    """Whether the best of a metric is its largest, by its name."""
    return not metric.endswith(LESS_IS_BETTER)


def _tracker_package(tracker: str) -> str | None:
    # transformers takes either of the two.
    if tracker == "tensorboard" and find_spec("tensorboardX") is not None:
        return "tensorboardX"
    return _PACKAGES.get(tracker)


def _default(args: Any, name: str) -> Any:
    field = type(args).__dataclass_fields__.get(name)
    return None if field is None else field.default


def _as_typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
