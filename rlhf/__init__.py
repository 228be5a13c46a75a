"""Fine-tune language models on text and on preferences: exact, fast, small, kind."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.trainers import (
        DistillConfig,
        DistillTrainer,
        DPOConfig,
        DPOTrainer,
        KTOConfig,
        KTOTrainer,
        PPOConfig,
        PPOTrainer,
        RewardConfig,
        RewardTrainer,
        SFTConfig,
        SFTTrainer,
    )

# Large tensors in pages of 2 MiB: on a CPU a tenth of a training step goes into page faults otherwise. torch reads it
# at its first tensor, so it has an effect where this package is imported early.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
__all__ = [
    "BestOfNConfig",
    "BestOfNTrainer",
    "DPOConfig",
    "DPOTrainer",
    "DistillConfig",
    "DistillTrainer",
    "DistillationConfig",
    "DistillationTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ModelConfig",
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
    "ScriptArguments",
    "TrlParser",
    "get_dataset",
    "get_peft_config",
    "get_quantization_config",
]
# Names that TRL gives to the same things.
_ALIASES = {"DistillationConfig": "DistillConfig", "DistillationTrainer": "DistillTrainer"}
_FOR_SCRIPTS = (
    "ModelConfig",
    "ScriptArguments",
    "TrlParser",
    "get_dataset",
    "get_peft_config",
    "get_quantization_config",
)


def __getattr__(name: str) -> Any:
    # Lazy, so that `rlhf.losses` needs torch alone and `rlhf --help` answers at once.
    if name in __all__:
        module = "rlhf.cli.script_helpers" if name in _FOR_SCRIPTS else "rlhf.trainers"
        return getattr(import_module(module), _ALIASES.get(name, name))
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
