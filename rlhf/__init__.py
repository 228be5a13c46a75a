"""Fine-tune language models on text and on preferences: exact, fast, small, kind."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.trainers import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

__version__ = "0.1.0"
__all__ = ["DPOConfig", "DPOTrainer", "RewardConfig", "RewardTrainer", "SFTConfig", "SFTTrainer"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `rlhf.losses` needs torch alone and `rlhf --help` answers at once.
    if name in __all__:
        return getattr(import_module("rlhf.trainers"), name)
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
