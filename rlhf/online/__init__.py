"""On-policy training: PPO and its family."""

from rlhf.online.config import PPOConfig
from rlhf.online.online_dpo import OnlineDPOTrainer
from rlhf.online.presets import (
    BestOfNConfig,
    BestOfNTrainer,
    GRPOConfig,
    GRPOTrainer,
    OnlineDPOConfig,
    RLOOConfig,
    RLOOTrainer,
)
from rlhf.online.trainer import PPOTrainer

__all__ = [
    "BestOfNConfig",
    "BestOfNTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
]
