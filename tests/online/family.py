"""The on-policy trainers by the names of their commands, and a reward that each of them can raise."""

from rlhf import (
    BestOfNConfig,
    BestOfNTrainer,
    GRPOConfig,
    GRPOTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RLOOConfig,
    RLOOTrainer,
)

FAMILY = {
    "ppo": (PPOTrainer, PPOConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
    "online-dpo": (OnlineDPOTrainer, OnlineDPOConfig),
    "best-of-n": (BestOfNTrainer, BestOfNConfig),
}


def vowels(completions, **_):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]
