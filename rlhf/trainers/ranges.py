"""The values that options which are numbers may have: one table for all configurations."""

import math
from dataclasses import dataclass, fields
from inspect import get_annotations
from typing import Any

LARGEST = 2**63 - 1  # more is no integer of a tensor
LARGEST_SEED = 2**32 - 1  # numpy's


@dataclass(frozen=True)
class Range:
    """An interval of numbers; NaN is in none.

    Attributes:
        least: its lower bound.
        most: its upper bound.
        open_below: whether ``least`` itself is outside.
        open_above: whether ``most`` itself is outside.
        also: a number outside that has a meaning of its own.
        meaning: of that number, for the message.
        infinite: whether infinity is a value too.
    """

    least: float = -math.inf
    most: float = math.inf
    open_below: bool = False
    open_above: bool = False
    also: float | None = None
    meaning: str = ""
    infinite: bool = False

    def __contains__(self, value: float) -> bool:
        if value == self.also:
            return True
        # A comparison with NaN is false, so that NaN fails here too.
        is_finite = -math.inf < value < math.inf
        if not is_finite:
            return self.infinite and value == math.inf
        above_least = self.least < value if self.open_below else self.least <= value
        below_most = value < self.most if self.open_above else value <= self.most
        return above_least and below_most

    def __str__(self) -> str:
        also = "" if self.also is None else f", or {self.also} for {self.meaning}"
        if self.most < LARGEST:
            opening, closing = "(" if self.open_below else "[", ")" if self.open_above else "]"
            return f"in {opening}{self.least:g}, {self.most:g}{closing}{also}"
        if self.least == -math.inf:
            return f"a finite number{also}"
        bound = f"above {self.least:g}" if self.open_below else f"at least {self.least:g}"
        return f"{bound}{also}"


FINITE = Range()
AT_LEAST_0 = Range(0)
ABOVE_0 = Range(0, open_below=True)
AT_LEAST_1 = Range(1, LARGEST)
COUNT = Range(0, LARGEST)
SHARE = Range(0, 1)
SEED = Range(0, LARGEST_SEED)

RANGES: dict[Range, str] = {
    # All epochs are trained where max_steps is 0 too, which nobody expects.
    Range(1, LARGEST, also=-1, meaning="all epochs"): "max_steps",
    AT_LEAST_1: "gradient_accumulation_steps per_device_train_batch_size per_device_eval_batch_size "
    "eval_accumulation_steps torch_empty_cache_steps dataset_num_proc dataloader_prefetch_factor ddp_bucket_cap_mb "
    "ddp_timeout tokens_per_batch precompute_ref_batch_size ref_model_sync_steps lora_r lora_alpha batch_size "
    "max_new_tokens num_processes teacher_top_k max_completion_length num_generations num_generations_eval "
    "num_iterations num_mini_batches max_turns rollout_batch_size adaptive_kl_horizon num_ppo_epochs response_length "
    "steps_per_generation generation_batch_size",
    COUNT: "dataloader_num_workers save_total_limit profile shuffle_buffer_size samples num_completions num_prompts k "
    "max_staleness dynamic_sampling min_completion_length num_completions_to_print max_tool_calling_iterations top_k "
    "max_nonfinite_steps num_sample_answers critic_warmup",
    Range(2, LARGEST): "max_length max_seq_length vllm_max_model_length",
    SEED: "seed data_seed",
    Range(-1, LARGEST): "local_rank",
    # A temperature of 0 would be greedy, and a group of completions all alike.
    ABOVE_0: "num_train_epochs temperature repetition_penalty discopop_tau adaptive_kl_target early_stop_kl "
    "importance_sampling_cap vllm_importance_sampling_cap vllm_importance_sampling_clip_max cliprange_value "
    "cliprange epsilon epsilon_high delta reward_clip reward_timeout",
    AT_LEAST_0: "learning_rate warmup_steps weight_decay adam_epsilon logging_steps eval_steps save_steps eval_delay "
    "critic_learning_rate neftune_noise_alpha router_aux_loss_coef center_rewards_coefficient desirable_weight "
    "undesirable_weight crossentropy_weight distillation_weight hidden_state_weight entropy_coef missing_eos_penalty "
    "vf_coef off_policy_mask_threshold sampling_temperature kl_coef server_startup_timeout vllm_server_timeout",
    # Infinity measures the norm and clips nothing.
    Range(0, infinite=True): "max_grad_norm",
    Range(0, 1, open_above=True): "adam_beta1 adam_beta2 lora_dropout",
    SHARE: "lmbda ld_alpha label_smoothing label_smoothing_factor gamma lam min_p top_entropy_quantile",
    Range(0, 1, open_below=True): "top_p ref_model_mixup_alpha vllm_gpu_memory_utilization",
    # The bounds of these depend on the loss, which checks them.
    FINITE: "beta alpha f_alpha_divergence_coef loss_weights reward_weights sapo_temperature_neg sapo_temperature_pos "
    "vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos",
}
"""Names of options by their range. A test finds a numeric option that is missing."""

UNCHECKED: dict[str, str] = {
    "refused at any value": "rpo_alpha max_prompt_length entropy_coef_delta entropy_coef_max entropy_coef_min "
    "entropy_target vllm_group_port vllm_tensor_parallel_size "
    "vllm_importance_sampling_clip_min",
    "moves no figure": "pad_to_multiple_of",
    "one side may be infinite; the order of both is checked with the rewards": "reward_clip_range",
    "a mapping, which parallelism.py checks": "parallelism_config",
    "a part of an address, which is asked at the start": "vllm_server_port",
}
"""Numeric options without a range, by the reason."""

_BY_NAME = {name: interval for interval, names in RANGES.items() for name in names.split()}


def check_ranges(options: Any) -> None:
    """Check all numbers of a configuration.

    Args:
        options: a data class; its fields that are no numbers are passed over. Its ``own_ranges``, if it has any, win.
    Raises:
        ValueError: the option, its range and the value.
    """
    own_ranges: dict[str, Range] = getattr(options, "own_ranges", {})
    for option in fields(options):
        interval = own_ranges.get(option.name) or _BY_NAME.get(option.name)
        if interval is None:
            continue
        value = getattr(options, option.name)
        # Several numbers: one weight for each loss.
        for number in value if isinstance(value, list | tuple) else (value,):
            _check_number(option.name, number, interval, annotation(type(options), option.name))


def check_finite(name: str, value: Any) -> None:
    """Check the numbers inside a dictionary of options, which JSON and YAML allow to be NaN.

    Args:
        name: of the option.
        value: what it holds; dictionaries and lists are searched.
    Raises:
        ValueError: a number that is not finite.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    if isinstance(value, dict):
        for key, entry in value.items():
            check_finite(f"{name}: {key}", entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            check_finite(name, entry)


def annotation(options_class: type, name: str) -> str:
    """The annotation of an option, as it is written in its class.

    Args:
        options_class: a data class.
        name: of one of its fields.
    Returns:
        Such as ``float | None``.
    """
    # The type in a field itself will not do: transformers' parser takes the None out of it.
    for base in options_class.__mro__:
        annotations = get_annotations(base)
        if name in annotations:
            return str(annotations[name])
    raise AttributeError(f"{options_class.__name__} has no option {name}")


def _check_number(name: str, value: Any, interval: Range, expected: str) -> None:
    if value is None and "None" in expected:
        return
    # bool is a subclass of int, and `learning_rate: true` is a mistake.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    is_fraction = isinstance(value, float) and math.isfinite(value) and not value.is_integer()
    if is_fraction and "float" not in expected:
        raise ValueError(f"{name} must be a whole number, got {value}")
    if value not in interval:
        raise ValueError(f"{name} must be {interval}, got {value}")
