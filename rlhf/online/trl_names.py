"""TRL's names for what on-policy training calls otherwise: each is taken over, or refused with what to do instead."""

import logging
from dataclasses import dataclass
from typing import Any

from rlhf.rollouts.arguments import GenerationArguments, old_name

logger = logging.getLogger(__name__)

# Name here, name there: of a loss's own options.
_OF_LOSSES = {
    "sapo": {"temperature": "sapo_temperature_pos", "temperature_negative": "sapo_temperature_neg"},
    "vespo": {name: f"vespo_{name}" for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")},
}
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
# Arguments of TRL's trainers, not of their configurations.
_OF_TRAINERS = {
    "tools": "pass an environment_factory: its step(answer) reads the call and replies with what the tool said, "
    '{"role": "tool", "content": …}; a column `tools` of the data reaches the chat template',
    "rollout_func": "pass an engine (rlhf.rollouts.RolloutEngine), or an environment_factory",
    "judge": "pass it as one of reward_funcs: a function that returns a number for each completion",
    "reward_model": "pass it as reward_funcs",
    "value_model": "name it in the configuration: value_model",
}
_SCALES = {"true": "group", "false": "none"}


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
    entropy_coef_min: float | None = old_name("not offered, likewise")
    entropy_coef_max: float | None = old_name("not offered, likewise")
    entropy_coef_delta: float | None = old_name("not offered, likewise")
    entropy_target: float | None = old_name("not offered, likewise")
    log_multimodal: bool | None = old_name("of images, which are not read")
    max_prompt_length: int | None = old_name("not offered: a prompt is never cut")
    log_completions_hub_repo: str | None = old_name("not offered: completions.jsonl lies in output_dir")


def refuse_trainer_arguments(given: dict[str, Any]) -> None:
    """Refuse arguments of TRL's trainers that have another name here, and say which.

    Raises:
        ValueError: such an argument that is not None.
    """
    for name, instead in _OF_TRAINERS.items():
        if given.pop(name, None) is not None:
            raise ValueError(f"{name} is not an argument of this trainer: {instead}")


def take_over_names(args: Any) -> None:
    """Give TRL's names their meaning here, before anything else is checked.

    Raises:
        ValueError: an option that has none here; or two names of one thing that differ.
    """
    for name, why in _REFUSED.items():
        if getattr(args, name) not in (None, False):
            raise ValueError(f"{name} is not offered: {why}")
    for name, own in (
        ("num_ppo_epochs", "num_iterations"), ("kl_coef", "beta"), ("cliprange", "epsilon"),
        ("response_length", "max_completion_length"), ("max_new_tokens", "max_completion_length"),
        ("vllm_importance_sampling_cap", "importance_sampling_cap"),
        ("vllm_importance_sampling_clip_max", "importance_sampling_cap"),
    ):  # fmt: skip
        if getattr(args, name) is not None:
            logger.warning("%s is called %s here", name, own)
            setattr(args, own, getattr(args, name))
            setattr(args, name, None)
    args.scale_rewards = _SCALES.get(str(args.scale_rewards).lower(), args.scale_rewards)
    if args.max_tool_calling_iterations is not None:
        args.max_turns, args.max_tool_calling_iterations = args.max_tool_calling_iterations + 1, None
    _take_over_rollout(args)
    _take_over_loss(args)
    args.take_over_generation()


def _take_over_rollout(args: Any) -> None:
    """``steps_per_generation`` micro-batches of a rollout are so many optimizer steps."""
    steps, each, own = args.steps_per_generation, args.generation_batch_size, args.gradient_accumulation_steps
    if steps is None and each is None:
        return
    if steps is not None and each is not None:
        raise ValueError("steps_per_generation and generation_batch_size say the same: give one of them")
    if each is not None:
        batch = args.per_device_train_batch_size * args.world_size
        if each % batch:
            raise ValueError(f"generation_batch_size {each} is no multiple of a batch of {batch} on all devices")
        steps = each // batch
    if steps % own == 0:
        args.num_mini_batches = steps // own
    elif own % steps or args.num_iterations > 1:
        raise ValueError(
            f"a rollout of {steps} batches (steps_per_generation) is no whole number of optimizer steps of {own} "
            "(gradient_accumulation_steps): give a multiple"
        )  # a part of a step is sampled from the same weights as the rest of it
    args.steps_per_generation = args.generation_batch_size = None


def _take_over_loss(args: Any) -> None:
    given = dict(args.loss_kwargs) if isinstance(args.loss_kwargs, dict) else {}
    for loss, names in _OF_LOSSES.items():
        for own, name in names.items():
            if (value := getattr(args, name)) is not None:
                if args.loss_type == loss:
                    given.setdefault(own, value)
                else:
                    raise ValueError(f"{name} is for loss_type {loss}, not for {args.loss_type}")
    if args.loss_type == "cispo" and args.epsilon_high is not None:
        given.setdefault("max_ratio", args.epsilon_high)
        args.epsilon_high = None
    if given:
        args.loss_kwargs = given
    if args.vllm_importance_sampling_mode not in (None, "token_truncate"):
        raise ValueError(
            f"vllm_importance_sampling_mode {args.vllm_importance_sampling_mode!r} is not offered: token_truncate, "
            "with importance_sampling_cap"
        )
    if args.vllm_importance_sampling_correction is False:
        raise ValueError(
            "vllm_importance_sampling_correction=False: a server's log-probs are always corrected; raise "
            "importance_sampling_cap for weaker bounds"
        )
    if args.use_bias_correction_kl is False:
        raise ValueError(
            "use_bias_correction_kl=False: k3 without the ratio has the gradient of another KL; leave it out, or "
            "take kl_estimator k2"
        )
    if args.cast_lm_head_to_fp32 and (args.bf16 or args.fp16):
        raise ValueError("cast_lm_head_to_fp32: the head has the precision of the rest: leave bf16 and fp16 out")
