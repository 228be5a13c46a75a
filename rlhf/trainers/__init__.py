"""Trainers: thin subclasses of ``transformers.Trainer``."""

from rlhf.trainers.dpo import DPOConfig, DPOTrainer
from rlhf.trainers.ppo import PPOConfig, PPOTrainer
from rlhf.trainers.reward import RewardConfig, RewardTrainer
from rlhf.trainers.sft import SFTConfig, SFTTrainer

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]
