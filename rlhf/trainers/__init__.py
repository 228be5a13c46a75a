"""Trainers: thin subclasses of ``transformers.Trainer``."""

from rlhf.trainers.dpo import DPOConfig, DPOTrainer
from rlhf.trainers.sft import SFTConfig, SFTTrainer

__all__ = ["DPOConfig", "DPOTrainer", "SFTConfig", "SFTTrainer"]
