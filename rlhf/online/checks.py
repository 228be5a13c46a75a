"""Checks of a configuration before anything is loaded: values out of range, and options that would be ignored."""

import logging
from typing import Any

import torch

from rlhf.losses import POLICY_LOSSES, PREFERENCE_LOSSES, arguments_of
from rlhf.losses.trials import TRIAL_PAIRS, is_own, try_advantage_estimator, try_pair_loss, try_policy_loss

logger = logging.getLogger(__name__)

# Options, and the parameter of an estimator that reads them.
READ_BY_ESTIMATORS = {
    "gamma": "gamma", "lam": "lam", "scale_rewards": "scale", "value_model": "values", "vf_coef": "values",
    "cliprange_value": "values", "critic_warmup": "values", "critic_learning_rate": "values",
    "critic_head": "values",
}  # fmt: skip
ONLY_WITH_TOKEN_LOSSES = ("adaptive_kl_target", "early_stop_kl", "importance_sampling_cap", "off_policy_mask_threshold")
PAIR_LENGTHS = ("chosen_lengths", "rejected_lengths")  # what sampled pairs have besides log-probs


def check_config(args: Any) -> None:
    """Refuse a configuration that cannot work, or an option that would be ignored.

    Args:
        args: a :class:`rlhf.PPOConfig` under its own names.
    Raises:
        ValueError: the option, what was found, and what to do.
    """
    # In this order: a check may rely on those before it.
    _check_ranges(args)
    _check_sampling(args)
    _check_batch_sizes(args)
    _check_advantages(args)
    if args.advantage_estimator == "pairs":
        _check_pairs(args)
    else:
        _check_policy_loss(args)


def _check_ranges(args: Any) -> None:
    if args.beta < 0:
        raise ValueError(f"beta must be at least 0, got {args.beta}")
    args.check_sync()
    if args.scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards must be group (True), batch or none (False), got {args.scale_rewards!r}")
    bounds = args.reward_clip_range
    if bounds is not None and (len(bounds) != 2 or not bounds[0] < bounds[1]):
        raise ValueError(f"reward_clip_range is a least and a largest value, got {bounds}")
    if args.kl_in == "reward" and args.kl_estimator != "k1":
        raise ValueError(f"in the reward only k1 has the gradient of the KL, not {args.kl_estimator}: --kl_in loss")
    args.kl_controller()  # checks its target and horizon


def _check_sampling(args: Any) -> None:
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"train_sampling_strategy {args.train_sampling_strategy}: prompts are drawn in a random order, or with "
            "shuffle_dataset false in their own"
        )
    if args.neftune_noise_alpha:
        raise ValueError(
            f"neftune_noise_alpha {args.neftune_noise_alpha}: samples come from the policy without noise, and the loss "
            "would take them for those of the policy with it; leave it out"
        )
    if args.max_completion_length >= args.limit():
        raise ValueError(
            f"max_completion_length {args.max_completion_length} leaves no room for a prompt in max_length "
            f"{args.max_length}: raise max_length"
        )
    if args.max_staleness:
        check_staleness(args)
    if args.dynamic_sampling and args.num_generations < 2:
        raise ValueError("dynamic_sampling looks for groups of different rewards: num_generations must be above 1")
    # Allowed, as ratios are between the trainer's own log-probs; but the samples are then not the policy's.
    if args.sampling().reshapes:
        logger.warning(
            "top_p, top_k, min_p or repetition_penalty: samples come from another distribution than the policy's "
            "own, which the loss takes them for; sampler_kl shows how far they are apart"
        )


def check_staleness(args: Any) -> None:
    """Refuse what cannot be while rollouts are sampled ahead.

    Args:
        args: a :class:`rlhf.PPOConfig`.
    Raises:
        ValueError: the option, and what to do.
    """
    # Before vLLM is started, which takes a minute.
    if args.colocated_vllm() is not None:
        raise ValueError(
            "max_staleness with vllm_mode colocate: one process cannot sample while it trains: give a rollout server "
            "(--rollout_server_url)"
        )
    if args.rollout_server_sleep:
        raise ValueError(
            "max_staleness: the server samples while the policy trains, so it cannot sleep: leave rollout_server_sleep "
            "out"
        )
    # Processes exchange their groups, which only their main threads may do.
    if args.dynamic_sampling and args.world_size > 1:
        raise ValueError(
            f"max_staleness with dynamic_sampling works on one process, not on {args.world_size}: leave one of them out"
        )


def _check_batch_sizes(args: Any) -> None:
    if args.tokens_per_batch is not None:
        raise ValueError("tokens_per_batch is for data that is there before training: leave it out")
    # A group stays on one process and in one step: its baseline needs all of it.
    completions_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if completions_per_step % args.completions_used:
        raise ValueError(
            f"a step takes {completions_per_step} completions on each device (per_device_train_batch_size * "
            f"gradient_accumulation_steps), which is no multiple of the {args.completions_used} of a prompt"
        )
    # A micro-batch holds whole pairs.
    if args.advantage_estimator == "pairs" and args.per_device_train_batch_size % 2:
        raise ValueError("pairs need an even per_device_train_batch_size")


def _check_advantages(args: Any) -> None:
    name, estimator = args.advantage_estimator, args.estimator()
    if estimator.needs_group and args.num_generations < 2:
        raise ValueError(f"{name} compares completions of a prompt: num_generations must be 2 or more")
    for option, parameter in READ_BY_ESTIMATORS.items():
        is_default = getattr(args, option) == type(args).__dataclass_fields__[option].default
        if parameter not in estimator.reads and not is_default:
            raise ValueError(f"{option} has no effect with advantage_estimator {name}: leave it out")
    if args.critic_warmup and args.value_model == "shared":
        raise ValueError(
            f"critic_warmup {args.critic_warmup}: a shared critic moves the policy's own layers; name a model for the "
            "critic (--value_model FOLDER), or leave critic_warmup out"
        )
    if args.critic_head == "model" and args.value_model == "shared":
        raise ValueError(
            "critic_head model: a shared critic has a new head; name a reward model for the critic "
            "(--value_model FOLDER), or leave critic_head out"
        )
    if is_own(estimator):
        settings = {"gamma": args.gamma, "lam": args.lam, "scale": args.scale_rewards}
        try_advantage_estimator(f"advantage_estimator {name}", estimator, args.num_generations, **settings)
    # The KL is subtracted from the sum of the rewards, which an estimator of each reward does not see.
    reads_components = "reward_components" in estimator.reads
    if args.multi_objective_aggregation == "normalize_then_sum" and name != "gdpo":
        raise ValueError("normalize_then_sum is for the group estimator, with KL in the loss")
    if reads_components and args.kl_in_reward:
        raise ValueError("normalize_then_sum is for the group estimator, with KL in the loss")
    if args.normalize_advantages and (estimator.is_per_token or name in ("best_of_n", "pairs")):
        raise ValueError(f"normalize_advantages is for rloo, group and remax; {name} has whiten_advantages")
    if args.uses_baselines and args.whiten_rewards:
        raise ValueError(f"{name} subtracts the rewards of greedy answers, which are not whitened: no whiten_rewards")


def _check_pairs(args: Any) -> None:
    for name in ONLY_WITH_TOKEN_LOSSES:
        if getattr(args, name) is not None:
            raise ValueError(f"{name} is for losses of tokens, and pairs have none: leave it out")
    if args.entropy_coef:
        raise ValueError("entropy_coef is for losses of tokens, and pairs have none: leave it out")
    if args.top_entropy_quantile < 1 or args.importance_sampling_level != "token":
        raise ValueError("top_entropy_quantile and importance_sampling_level are for losses of tokens")
    for column in PREFERENCE_LOSSES.find(args.loss_type).columns:
        if column not in PAIR_LENGTHS and column not in args.loss_options:
            raise ValueError(f"loss_type {args.loss_type} reads {column}, which sampled pairs do not have")
    # The loss checks its options itself, now rather than at the first step.
    what, lengths = f"loss_type {args.loss_type}", dict.fromkeys(PAIR_LENGTHS, torch.ones(TRIAL_PAIRS))
    if is_own(PREFERENCE_LOSSES.find(args.loss_type)):
        try_pair_loss(what, lambda *sums: args.pair_loss(*sums, **lengths))
        return
    ones = torch.ones(TRIAL_PAIRS)
    try:
        args.pair_loss(ones, ones, ones, ones, **lengths)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error


def _check_policy_loss(args: Any) -> None:
    loss = POLICY_LOSSES.find(args.loss_type)
    reads_ratios = loss.token_ratios or loss.coupled
    # Best-of-n is supervised: its loss needs no ratio in later steps either.
    if not reads_ratios and args.advantage_estimator != "best_of_n" and not args.one_step_per_rollout:
        raise ValueError(
            f"loss_type {args.loss_type} has no ratio to the policy that sampled, so a rollout serves one step: "
            "set num_iterations and num_mini_batches to 1, or take ppo"
        )
    if is_own(loss):
        length = {"max_completion_length": args.max_completion_length}
        options = arguments_of(loss.term, length | args.loss_options)
        try_policy_loss(f"loss_type {args.loss_type}", lambda tokens: loss.term(tokens, **options), loss.coupled)
    args.objective()  # checks the options of the loss
    # A longer sequence has more terms in these losses. (luspo is meant for ratios of sequences, weighted by length.)
    sums_over_tokens = loss.mean == "tokens" or "max_completion_length" in loss.hyper_parameters
    if args.importance_sampling_level == "sequence" and loss.token_ratios and sums_over_tokens:
        logger.warning(
            "importance_sampling_level sequence with loss_type %s weights each sequence by its completion length; "
            "GSPO is loss_type grpo",
            args.loss_type,
        )
