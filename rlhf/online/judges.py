"""What judges the policy: reward functions, and a critic with weights of its own."""

from typing import Any

from torch import nn

from rlhf.kernels import optimize
from rlhf.models import RewardModel, disable_dropout, load_reward_model, load_tokenizer
from rlhf.online.config import PPOConfig
from rlhf.rewards import ModelReward, RewardSet, reward_functions
from rlhf.trainers.preparation import warn_of_lost_updates


def load_rewards(reward_funcs: Any, tokenizers: Any, args: PPOConfig) -> RewardSet:
    """The rewards of a run, called as one.

    Args:
        reward_funcs: one or several, as :class:`rlhf.PPOTrainer` takes them.
        tokenizers: of reward models in memory, one for each of ``reward_funcs``; or None.
        args: the configuration.
    Returns:
        The rewards with their weights.
    """
    functions = reward_functions(reward_funcs, tokenizers)
    # Reward models are run by us, so they are made faster like the policy.
    if args.optimize_model:
        for function in functions:
            if isinstance(function, ModelReward):
                optimize(function.model)
    return RewardSet(
        functions,
        args.reward_weights,
        on_error=args.on_reward_error,  # type: ignore[arg-type]
        timeout=args.reward_timeout,
    )


def load_critic(folder: str, args: PPOConfig) -> RewardModel:
    """A critic from a model's folder, to be trained.

    Args:
        folder: of a causal LM or a reward model.
        args: the configuration.
    Returns:
        The critic, with dropout off.
    """
    critic = load_reward_model(folder, **args.model_kwargs())
    if args.critic_head == "zeros":
        # A reward model's head has learnt to read the last token of an answer alone: at the others its output is noise,
        # which would add to the variance of the advantages.
        nn.init.zeros_(critic.without_adapter.score.weight)
    warn_of_lost_updates(critic, args)
    # Values are recorded before training and compared in it: dropout would make them differ.
    disable_dropout(critic)
    if args.optimize_model:
        optimize(critic)
    return critic


def check_tokenizers(tokenizer: Any, folder: str) -> None:
    """Compare a critic's tokenizer with the policy's.

    A critic reads the policy's ids. (A reward model reads text, and may have any tokenizer.)

    Args:
        tokenizer: the policy's.
        folder: the critic's.
    Raises:
        ValueError: a token has another id.
    """
    vocabulary, critic_vocabulary = tokenizer.get_vocab(), load_tokenizer(folder).get_vocab()
    # Both ways: a token that one side alone has differs too.
    for token in [*vocabulary, *critic_vocabulary]:
        policy_id, critic_id = vocabulary.get(token), critic_vocabulary.get(token)
        if policy_id != critic_id:
            raise ValueError(
                f"value_model {folder}: its tokenizer is not the policy's ({token!r} is {policy_id} for the policy, "
                f"{critic_id} there), and a critic reads the policy's ids: use value_model shared"
            )
