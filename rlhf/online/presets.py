"""The family of PPO: each member is :class:`PPOTrainer` with other defaults."""

from typing import ClassVar

from rlhf.online.config import BestOfNConfig, GRPOConfig, RLOOConfig
from rlhf.online.trainer import PPOTrainer
from rlhf.trainers.base import BaseConfig


class GRPOTrainer(PPOTrainer):
    """:class:`PPOTrainer` under :class:`GRPOConfig`."""

    config_class: ClassVar[type[BaseConfig]] = GRPOConfig


class RLOOTrainer(PPOTrainer):
    """:class:`PPOTrainer` under :class:`RLOOConfig`."""

    config_class: ClassVar[type[BaseConfig]] = RLOOConfig


class BestOfNTrainer(PPOTrainer):
    """:class:`PPOTrainer` under :class:`BestOfNConfig`: rejection-sampling fine-tuning."""

    config_class: ClassVar[type[BaseConfig]] = BestOfNConfig
