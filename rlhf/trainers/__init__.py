"""Trainers: thin subclasses of ``transformers.Trainer``."""

from rlhf.trainers.dpo import DPOTrainer
from rlhf.trainers.dpo_config import DPOConfig
from rlhf.trainers.kto import KTOConfig, KTOTrainer
from rlhf.trainers.reward import RewardConfig, RewardTrainer
from rlhf.trainers.sft import SFTConfig, SFTTrainer

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]
