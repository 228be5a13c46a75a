"""A policy with a critic: what is the state before each token worth?"""

from typing import Any

import torch
from torch import nn

from rlhf.data import Batch
from rlhf.logprobs import Scores
from rlhf.models.policy import Policy
from rlhf.models.reward_model import RewardModel


class ActorCritic(Policy):
    """A :class:`Policy` whose scores come with ``values`` [N].

    Args:
        model: the causal LM.
        critic: a reward model that is read at every token, with weights of its own; None puts a linear head of zeros on
            the policy's last hidden states, so that one trunk (under LoRA, one adapter) serves both.
    """

    def __init__(self, model: nn.Module, critic: RewardModel | None = None) -> None:
        super().__init__(model)
        self.critic = critic
        if critic is None:
            like: Any = self.without_adapter.get_output_embeddings().weight
            # Zeros, as for reward models: the first advantages are the rewards, the first gradients of the trunk none.
            self.value_head = nn.Linear(like.size(1), 1, device=like.device, dtype=torch.float32)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(self, batch: Batch, *args: Any, **kwargs: Any) -> Scores:
        scores = super().forward(batch, *args, **kwargs)
        if self.critic is None:
            return scores
        return scores._replace(values=self.critic(batch, batch.targets.source))
