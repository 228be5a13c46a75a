"""TRL's names for options of on-policy training: each is taken over, or refused with what to use instead."""

import logging
from dataclasses import dataclass
from typing import Any

from rlhf.rollouts.arguments import GenerationArguments, old_name

logger = logging.getLogger(__name__)

_RENAMED = {
    "num_ppo_epochs": "num_iterations",
    "kl_coef": "beta",
    "cliprange": "epsilon",
    "response_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "vllm_importance_sampling_cap": "importance_sampling_cap",
    "vllm_importance_sampling_clip_max": "importance_sampling_cap",
}
# Options of one loss: the loss, and the name in its loss_kwargs.
_LOSS_OPTIONS = {
    "sapo_temperature_pos": ("sapo", "temperature"),
    "sapo_temperature_neg": ("sapo", "temperature_negative"),
    "vespo_k_pos": ("vespo", "k_pos"),
    "vespo_lambda_pos": ("vespo", "lambda_pos"),
    "vespo_k_neg": ("vespo", "k_neg"),
    "vespo_lambda_neg": ("vespo", "lambda_neg"),
}
# Options that are refused at any value but False, and what to use instead.
_REFUSED = {
    "max_prompt_length": "a prompt is never cut: filter the rows, or pass drop_long_prompts",
    "use_adaptive_entropy": "give a constant entropy_coef, and watch `entropy` in the log",
    **dict.fromkeys(
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        "there is no controller of entropy; give a constant entropy_coef",
    ),
    "log_completions_hub_repo": "completions.jsonl lies in output_dir: upload it from there",
    "vllm_importance_sampling_clip_min": "only a cap from above is offered: importance_sampling_cap",
}
# Options that cannot be switched off, and why.
_ALWAYS_ON = {
    "vllm_importance_sampling_correction": "a server's log-probs are always corrected; raise importance_sampling_cap "
    "for weaker bounds",
    "use_bias_correction_kl": "k3 without the ratio has the gradient of another KL; leave it out, or take kl_estimator "
    "k2",
}
# Arguments of TRL's trainers, not of their configurations.
_TRAINER_ARGUMENTS = {
    "tools": "pass an environment_factory: its step(answer) reads the call and replies with the tool's result, "
    '{"role": "tool", "content": …}; a column `tools` of the data reaches the chat template',
    "rollout_func": "pass an engine (rlhf.rollouts.RolloutEngine), or an environment_factory",
    "judge": "pass it as one of reward_funcs: a function that returns a number for each completion",
    "reward_model": "pass it as reward_funcs",
    "value_model": "name it in the configuration: value_model",
}
_SCALE_REWARDS = {"true": "group", "false": "none"}


@dataclass
class TRLNames(GenerationArguments):
    """Options under the names that TRL's GRPO, RLOO and PPO have for them."""

    num_ppo_epochs: int | None = old_name("num_iterations")
    kl_coef: float | None = old_name("beta")
    cliprange: float | None = old_name("epsilon")
    response_length: int | None = old_name("max_completion_length")
    max_new_tokens: int | None = old_name("max_completion_length")
    steps_per_generation: int | None = old_name("micro-batches in a rollout; num_mini_batches counts optimizer steps")
    generation_batch_size: int | None = old_name("completions in a rollout; num_mini_batches counts optimizer steps")
    sapo_temperature_pos: float | None = old_name("temperature of sapo, in loss_kwargs")
    sapo_temperature_neg: float | None = old_name("temperature_negative of sapo, in loss_kwargs")
    vespo_k_pos: float | None = old_name("k_pos of vespo, in loss_kwargs")
    vespo_lambda_pos: float | None = old_name("lambda_pos of vespo, in loss_kwargs")
    vespo_k_neg: float | None = old_name("k_neg of vespo, in loss_kwargs")
    vespo_lambda_neg: float | None = old_name("lambda_neg of vespo, in loss_kwargs")
    vllm_importance_sampling_correction: bool | None = old_name("importance_sampling_cap; a server has one always")
    vllm_importance_sampling_mode: str | None = old_name("token_truncate, which importance_sampling_cap is")
    vllm_importance_sampling_clip_max: float | None = old_name("importance_sampling_cap")
    vllm_importance_sampling_clip_min: float | None = old_name("not offered")
    vllm_importance_sampling_cap: float | None = old_name("importance_sampling_cap")
    max_tool_calling_iterations: int | None = old_name("max_turns, less 1")
    use_bias_correction_kl: bool | None = old_name("always: KL in the loss is weighted by the ratio")
    cast_lm_head_to_fp32: bool | None = old_name("logits are float32 wherever the weights are")
    use_adaptive_entropy: bool | None = old_name("not offered: entropy_coef is constant")
    entropy_coef_min: float | None = old_name("not offered: entropy_coef is constant")
    entropy_coef_max: float | None = old_name("not offered: entropy_coef is constant")
    entropy_coef_delta: float | None = old_name("not offered: entropy_coef is constant")
    entropy_target: float | None = old_name("not offered: entropy_coef is constant")
    log_multimodal: bool | None = old_name("of images, which are not read")
    max_prompt_length: int | None = old_name("not offered: a prompt is never cut")
    log_completions_hub_repo: str | None = old_name("not offered: completions.jsonl lies in output_dir")


def refuse_trainer_arguments(given: dict[str, Any]) -> None:
    """Refuse arguments of TRL's trainers that have another name here.

    Args:
        given: arguments by name; those of TRL are removed.
    Raises:
        ValueError: such an argument that is not None; the message has what to use instead.
    """
    for name, instead in _TRAINER_ARGUMENTS.items():
        if given.pop(name, None) is not None:
            raise ValueError(f"{name} is not an argument of this trainer: {instead}")


def take_over_names(args: Any) -> None:
    """Replace TRL's options by those here, before anything else is checked.

    Args:
        args: a configuration, changed in place.
    Raises:
        ValueError: an option that has no meaning here, or two that contradict each other.
    """
    for name, reason in _REFUSED.items():
        if getattr(args, name) not in (None, False):
            raise ValueError(f"{name} is not offered: {reason}")
    for name, reason in _ALWAYS_ON.items():
        if getattr(args, name) is False:
            raise ValueError(f"{name}=False: {reason}")
    for name, name_here in _RENAMED.items():
        if getattr(args, name) is not None:
            logger.warning("%s is called %s here", name, name_here)
            setattr(args, name_here, getattr(args, name))
            setattr(args, name, None)
    # A flag of the command line arrives as text.
    args.scale_rewards = _SCALE_REWARDS.get(str(args.scale_rewards).lower(), args.scale_rewards)
    if args.max_tool_calling_iterations is not None:
        args.max_turns = args.max_tool_calling_iterations + 1  # the last answer calls no tool
        args.max_tool_calling_iterations = None
    if args.vllm_importance_sampling_mode not in (None, "token_truncate"):
        raise ValueError(
            f"vllm_importance_sampling_mode {args.vllm_importance_sampling_mode!r} is not offered: token_truncate, "
            "with importance_sampling_cap"
        )
    if args.cast_lm_head_to_fp32 and (args.bf16 or args.fp16):
        raise ValueError("cast_lm_head_to_fp32: the head has the precision of the rest: leave bf16 and fp16 out")
    _take_over_rollout_size(args)
    _take_over_loss_options(args)
    args.take_over_generation()


def _take_over_rollout_size(args: Any) -> None:
    """A rollout in micro-batches or completions becomes one in optimizer steps."""
    micro_batches, completions = args.steps_per_generation, args.generation_batch_size
    if micro_batches is None and completions is None:
        return
    if micro_batches is not None and completions is not None:
        raise ValueError("steps_per_generation and generation_batch_size say the same: give one of them")
    if completions is not None:
        batch_size = args.per_device_train_batch_size * args.world_size
        if completions % batch_size:
            raise ValueError(
                f"generation_batch_size {completions} is no multiple of a batch of {batch_size} on all devices"
            )
        micro_batches = completions // batch_size
    per_step = args.gradient_accumulation_steps
    # A rollout for a part of a step is sampled from the same weights as the rest of the step: one rollout will do.
    is_part_of_step = per_step % micro_batches == 0 and args.num_iterations == 1
    if micro_batches % per_step == 0:
        args.num_mini_batches = micro_batches // per_step
    elif not is_part_of_step:
        raise ValueError(
            f"a rollout of {micro_batches} batches (steps_per_generation) is no whole number of optimizer steps of "
            f"{per_step} (gradient_accumulation_steps): give a multiple"
        )
    args.steps_per_generation = args.generation_batch_size = None


def _take_over_loss_options(args: Any) -> None:
    options = dict(args.loss_kwargs) if isinstance(args.loss_kwargs, dict) else {}
    for name, (loss, name_here) in _LOSS_OPTIONS.items():
        value = getattr(args, name)
        if value is None:
            continue
        if args.loss_type != loss:
            raise ValueError(f"{name} is for loss_type {loss}, not for {args.loss_type}")
        options.setdefault(name_here, value)  # loss_kwargs wins
    if args.loss_type == "cispo" and args.epsilon_high is not None:
        # TRL's epsilon_high of CISPO bounds the ratio itself, not its distance from 1.
        options.setdefault("max_ratio", args.epsilon_high)
        args.epsilon_high = None
    if options:
        args.loss_kwargs = options
