"""Trainers: thin subclasses of ``transformers.Trainer``."""

from rlhf.trainers.distill import DistillTrainer
from rlhf.trainers.distill_config import DistillConfig
from rlhf.trainers.dpo import DPOConfig, DPOTrainer
from rlhf.trainers.kto import KTOConfig, KTOTrainer
from rlhf.trainers.online_dpo import OnlineDPOTrainer
from rlhf.trainers.ppo import BestOfNTrainer, GRPOTrainer, PPOTrainer, RLOOTrainer
from rlhf.trainers.ppo_config import BestOfNConfig, GRPOConfig, OnlineDPOConfig, PPOConfig, RLOOConfig
from rlhf.trainers.reward import RewardConfig, RewardTrainer
from rlhf.trainers.sft import SFTConfig, SFTTrainer

__all__ = [
    "BestOfNConfig",
    "BestOfNTrainer",
    "DPOConfig",
    "DPOTrainer",
    "DistillConfig",
    "DistillTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]
