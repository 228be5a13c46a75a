"""Wrappers around Hugging Face models; no architectures."""

from rlhf.models.actor_critic import ActorCritic
from rlhf.models.adapters import add_adapter, add_adapter_beside
from rlhf.models.generation import add_answer_ends, mend_generation_config
from rlhf.models.layout import choose_layout, use_segments
from rlhf.models.loading import load_model, load_tokenizer
from rlhf.models.policy import Policy
from rlhf.models.randomness import add_embedding_noise, configured_dropout, disable_dropout
from rlhf.models.reward_model import RewardModel, add_scalar_head, load_reward_model
from rlhf.models.routing import Balancing, Routing, balancing_of, routing
from rlhf.models.vocabulary import vocabulary_size

__all__ = [
    "ActorCritic",
    "Balancing",
    "Policy",
    "RewardModel",
    "Routing",
    "add_adapter",
    "add_adapter_beside",
    "add_answer_ends",
    "add_embedding_noise",
    "add_scalar_head",
    "balancing_of",
    "choose_layout",
    "configured_dropout",
    "disable_dropout",
    "load_model",
    "load_reward_model",
    "load_tokenizer",
    "mend_generation_config",
    "routing",
    "use_segments",
    "vocabulary_size",
]
