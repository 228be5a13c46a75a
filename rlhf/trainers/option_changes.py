"""What may change between a run and its continuation: each option either moves figures, or does not.

A test compares these tables with the fields of all configurations: each new option needs a decision.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.trainers.options import REFUSED
from rlhf.trainers.secret_options import without_secrets

logger = logging.getLogger(__name__)

RECORD = "run_options.json"  # in a checkpoint

MOVE_FIGURES: dict[str, str] = {
    "optimizer and schedule": "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args "
    "weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules max_grad_norm",
    "batches and their order": "per_device_train_batch_size gradient_accumulation_steps tokens_per_batch packing "
    "packing_strategy padding_free pad_to_multiple_of seed data_seed full_determinism train_sampling_strategy "
    "shuffle_dataset shuffle_buffer_size dataloader_drop_last dataloader_in_order ignore_data_skip accelerator_config "
    "fsdp fsdp_config deepspeed parallelism_config streaming mixture",
    "rows": "max_length max_seq_length max_prompt_length drop_long_prompts truncation_mode chat_template_path columns "
    "roles chat_template_kwargs drop_bad_rows eos_token pad_token add_tokens dataset_text_field dataset_kwargs "
    "completion_only_loss assistant_only_loss",
    "the model and its adapter": "model_name_or_path model_revision dtype model_init_kwargs use_peft lora_r lora_alpha "
    "lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora "
    "load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage disable_dropout "
    "neftune_noise_alpha router_aux_loss_coef",
    # These move the last digits only.
    "precision and how it is computed": "bf16 fp16 tf32 attn_implementation torch_compile torch_compile_backend "
    "torch_compile_mode layout optimize_model",
    "losses": "loss_type loss_kwargs loss_weights beta label_smoothing discopop_tau f_divergence_type "
    "f_alpha_divergence_coef ld_alpha use_weighting rpo_alpha reference_free desirable_weight undesirable_weight "
    "center_rewards_coefficient",
    "the reference": "ref_model_name_or_path sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    "distillation": "teacher_adapter teacher_model_name_or_path teacher_model_init_kwargs teacher_model_revision "
    "teacher_file teacher_estimate teacher_server_model teacher_top_k align divergence scale_by_temperature alpha "
    "reverse distillation_weight crossentropy_weight hidden_state_weight hidden_state_distance lmbda "
    "sampling_temperature reverse_kl_reward seq_kd",
    "sampling": "temperature top_p top_k min_p repetition_penalty generation_kwargs max_completion_length "
    "max_new_tokens min_completion_length stop num_generations dynamic_sampling rollout_batch_size max_turns "
    "max_staleness environment rollout_server_model",
    "rewards and advantages": "reward_funcs reward_weights on_reward_error reward_clip reward_clip_range "
    "missing_eos_penalty mask_truncated_completions whiten_rewards advantage_estimator gamma lam whiten_advantages "
    "normalize_advantages scale_rewards multi_objective_aggregation",
    "policy and critic": "num_mini_batches num_iterations epsilon epsilon_high delta importance_sampling_level "
    "top_entropy_quantile off_policy_mask_threshold importance_sampling_cap kl_in kl_estimator adaptive_kl_target "
    "adaptive_kl_horizon early_stop_kl entropy_coef vf_coef cliprange_value value_model "
    "critic_warmup critic_head critic_learning_rate",
}
"""Options of which another value gives another run, by subject."""

MAY_CHANGE: dict[str, str] = {
    "the run": "output_dir cache_dir resume resume_from_checkpoint overwrite dry_run allow_changes num_processes "
    "accelerate_config trust_remote_code local_rank",
    # Rows are compared themselves.
    "where rows come from": "dataset_name dataset_config dataset_train_split eval_dataset_name dataset_test_split",
    "logging": "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter "
    "include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project "
    "trackio_space_id trackio_bucket_id trackio_static_space_id debug skip_memory_metrics profile log_all "
    "log_completions num_completions_to_print log_unique_prompts",
    "evaluation": "do_train do_eval eval_strategy eval_steps eval_delay eval_on_start eval_packing "
    "eval_accumulation_steps per_device_eval_batch_size prediction_loss_only num_generations_eval num_sample_answers "
    "load_best_model_at_end metric_for_best_model greater_is_better",
    "checkpoints": "save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint "
    "restore_callback_states_from_checkpoint",
    # A run that such a step has ended goes on without it.
    "steps that are not finite": "on_nonfinite max_nonfinite_steps",
    "the hub": "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    "speed and memory": "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
    "gradient_checkpointing_kwargs torch_empty_cache_steps dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataset_num_proc "
    "remove_unused_columns label_names precompute_ref_log_probs precompute_ref_batch_size",
    "devices and servers": "use_cpu ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph ddp_backend ddp_timeout rollout_server_url rollout_weights_dir rollout_server_sleep "
    "server_startup_timeout use_vllm vllm_mode vllm_gpu_memory_utilization vllm_max_model_length teacher_server_url "
    "reward_timeout",
}
"""Options of which any value gives the same run, by subject."""

LENGTH = ("max_steps", "num_train_epochs")
"""A longer run goes on, with the learning rates of the longer schedule from there; a shorter one is another run."""

# What is recorded besides options: the class of the trainer, a hash of the rows, and the number of processes.
_MOVES = frozenset(("trainer", "rows", "processes")).union(*(names.split() for names in MOVE_FIGURES.values()))


class Changes(NamedTuple):
    """What differs, each as ``name: now, was before``."""

    breaking: list[str]
    harmless: list[str]


def recorded_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a checkpoint records them: as JSON, without secrets.

    Args:
        options: by name; with any values.
    Returns:
        The same names, but for those that have no effect.
    """
    in_effect = {name: value for name, value in options.items() if name not in REFUSED}
    return without_secrets(json.loads(json.dumps(in_effect, default=_as_json)))


def check_changes(checkpoint: str, now: Mapping[str, Any], allow_changes: bool) -> None:
    """Refuse to go on with another run than the one that was saved; log what may change.

    Args:
        checkpoint: its folder.
        now: the options of this run, as :func:`recorded_options` gives them.
        allow_changes: whether to go on nevertheless.
    Raises:
        ValueError: names the options whose change moves figures, with both values.
    """
    file = Path(checkpoint) / RECORD
    if not file.exists():
        logger.warning("%s: no %s, so options are not compared with those of the run", checkpoint, RECORD)
        return
    changes = compare(json.loads(file.read_text(encoding="utf-8")), now)
    if changes.breaking and not allow_changes:
        raise ValueError(
            f"{checkpoint}: another run was saved there ({'; '.join(changes.breaking)}); give the same options and "
            "rows, or pass --allow_changes to go on with figures that no uninterrupted run has"
        )
    if changes.breaking or changes.harmless:
        logger.info("%s: changed since: %s", checkpoint, "; ".join(changes.breaking + changes.harmless))


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Compare the options of a checkpoint with those of the run that goes on from it.

    Args:
        before: of the checkpoint, as :func:`recorded_options` gives them.
        now: of this run, alike.
    Returns:
        The changes of options that both have.
    """
    changes = Changes([], [])
    # A version may bring an option, or lose one.
    for name in sorted(before.keys() & now.keys()):
        old_value, value = before[name], now[name]
        if value == old_value:
            continue
        is_shorter = name in LENGTH and value < old_value
        kind = changes.breaking if name in _MOVES or is_shorter else changes.harmless
        kind.append(f"{name}: {_text(value)}, was {_text(old_value)}")
    return changes


def _as_json(value: Any) -> Any:
    """A value that JSON does not have: a configuration, a member of an enum, a function, or a dtype."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    # The text of a function has an address, which is another one in each process.
    return getattr(value, "__qualname__", None) or str(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
