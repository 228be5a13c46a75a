"""Rewards: plain functions ``reward(prompts, completions, **columns) -> list[float | None]``, TRL's signature."""

from rlhf.rewards.endpoint import HttpReward
from rlhf.rewards.functions import (
    completion_text,
    exact_match,
    length_reward,
    matches,
    math_answer,
    numeric_answer,
    repetition_penalty,
    soft_overlong_punishment,
    think_format,
)
from rlhf.rewards.loading import BUILTINS, load_reward, reward_functions
from rlhf.rewards.models import ModelReward
from rlhf.rewards.scoring import RewardError, RewardSet, Scored
from rlhf.rewards.trl_names import (
    accuracy_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

__all__ = [
    "BUILTINS",
    "HttpReward",
    "ModelReward",
    "RewardError",
    "RewardSet",
    "Scored",
    "accuracy_reward",
    "completion_text",
    "exact_match",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "length_reward",
    "load_reward",
    "matches",
    "math_answer",
    "numeric_answer",
    "reasoning_accuracy_reward",
    "repetition_penalty",
    "reward_functions",
    "soft_overlong_punishment",
    "think_format",
    "think_format_reward",
]
