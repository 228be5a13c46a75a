"""Trainers: thin subclasses of ``transformers.Trainer``."""

from rlhf.trainers.dpo import DPOConfig, DPOTrainer
from rlhf.trainers.reward import RewardConfig, RewardTrainer
from rlhf.trainers.sft import SFTConfig, SFTTrainer

__all__ = ["DPOConfig", "DPOTrainer", "RewardConfig", "RewardTrainer", "SFTConfig", "SFTTrainer"]
