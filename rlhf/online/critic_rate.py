"""A learning rate of the critic's own: its weights get groups of their own in the optimizer."""

from typing import Any

from rlhf.models import ActorCritic
from rlhf.models.policy import Policy

MARK = "of_critic"  # in a group of the optimizer


def with_critic_rate(optimizer: Any, policy: Policy, args: Any) -> Any:
    """Give the critic's weights their own peak learning rate, if the configuration has one.

    The schedule scales each group of the optimizer by the same factor, so that the ratio of the rates stays.

    Args:
        optimizer: of policy and critic, without a schedule; one that was here before stays as it is.
        policy: the trained model.
        args: the configuration, with ``critic_learning_rate``.
    Returns:
        The same optimizer.
    Raises:
        ValueError: the optimizer has no group with the critic's weights.
    """
    if args.critic_learning_rate is None or not isinstance(policy, ActorCritic):
        return optimizer
    critic_ids = {id(parameter) for parameter in policy.critic_parameters()}
    num_found = 0
    for group in list(getattr(optimizer, "param_groups", [])):
        members = [parameter for parameter in group["params"] if id(parameter) in critic_ids]
        num_found += len(members)
        if not members or MARK in group:
            continue
        # The policy's groups stay where they are: the logged learning rate is that of the first group.
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in critic_ids]
        optimizer.add_param_group(group | {"params": members, "lr": args.critic_learning_rate, MARK: True})
    if num_found < len(critic_ids):
        raise ValueError(
            f"critic_learning_rate {args.critic_learning_rate}: the optimizer {args.optim} has no weights of the "
            "critic to give another rate: leave it out, or pass --optim adamw_torch"
        )
    return optimizer
