"""A critic with weights of its own."""

from typing import Any

from rlhf.kernels import optimize
from rlhf.models import RewardModel, disable_dropout, load_reward_model, load_tokenizer
from rlhf.trainers.preparation import warn_of_lost_updates


def load_critic(args: Any) -> RewardModel:
    critic = load_reward_model(args.value_model, **args.model_kwargs())
    warn_of_lost_updates(critic, args)
    disable_dropout(critic)
    if args.optimize_model:
        optimize(critic)
    return critic


def check_tokenizers(tokenizer: Any, folder: str) -> None:
    """A critic reads the policy's ids (a reward model reads text, and may have any tokenizer)."""
    own, theirs = tokenizer.get_vocab(), load_tokenizer(folder).get_vocab()
    if own != theirs:
        token = next((token for token in own if own[token] != theirs.get(token)), next(iter(theirs.keys() - own), ""))
        raise ValueError(
            f"value_model {folder}: its tokenizer is not the policy's ({token!r} is {own.get(token)} for the policy, "
            f"{theirs.get(token)} there), and a critic reads the policy's ids: use value_model shared"
        )
