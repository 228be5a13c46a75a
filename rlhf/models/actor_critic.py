"""A policy with a critic, which estimates the value of the state before each token."""

from typing import Any

import torch
from torch import nn

from rlhf.data import Batch
from rlhf.logprobs import HeadObjective, Scores
from rlhf.models.policy import Policy
from rlhf.models.reward_model import RewardModel


class ActorCritic(Policy):
    """A :class:`Policy` whose scores come with ``values`` [N].

    Args:
        model: the causal LM.
        critic: a reward model that is read at every token, with its own weights; None puts a linear head of zeros on
            the policy's last hidden states, so that one trunk (under LoRA, one adapter) serves both.
    """

    def __init__(self, model: nn.Module, critic: RewardModel | None = None) -> None:
        super().__init__(model)
        self.critic = critic
        if critic is None:
            output_weight: Any = self.without_adapter.get_output_embeddings().weight
            hidden_size, device = output_weight.size(1), output_weight.device
            self.value_head = nn.Linear(hidden_size, 1, device=device, dtype=torch.float32)
            # Zeros, as for reward models: the first advantages are the rewards, the first gradients of the trunk none.
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def critic_parameters(self) -> list[nn.Parameter]:
        """The weights of the critic that are trained; those of a shared critic are its head."""
        critic = self.value_head if self.critic is None else self.critic
        assert critic is not None
        return [parameter for parameter in critic.parameters() if parameter.requires_grad]

    def forward(self, batch: Batch, objective: HeadObjective | None = None, entropy: bool = False) -> Scores:
        """As :class:`Policy`, with values. A separate critic is run on the same batch."""
        scores = super().forward(batch, objective, entropy)
        if self.critic is None:
            return scores  # with the values of the value head
        return scores._replace(values=self.critic(batch, batch.targets.source))
