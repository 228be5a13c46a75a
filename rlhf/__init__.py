"""Fine-tune language models on text and on preferences: exact, fast, small, kind."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.cli.script_helpers import (
        ModelConfig,
        ScriptArguments,
        TrlParser,
        get_dataset,
        get_peft_config,
        get_quantization_config,
    )
    from rlhf.distillation import DistillConfig, DistillTrainer
    from rlhf.distillation import DistillConfig as DistillationConfig
    from rlhf.distillation import DistillTrainer as DistillationTrainer
    from rlhf.online import (
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
    from rlhf.trainers import (
        DPOConfig,
        DPOTrainer,
        KTOConfig,
        KTOTrainer,
        RewardConfig,
        RewardTrainer,
        SFTConfig,
        SFTTrainer,
    )

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
# Where each public name is defined. Names that TRL gives to the same things are listed with ours.
_MODULES = {
    "rlhf.trainers": ("DPO", "KTO", "Reward", "SFT"),
    "rlhf.online": ("BestOfN", "GRPO", "OnlineDPO", "PPO", "RLOO"),
    "rlhf.distillation": ("Distill",),
}
_DEFINED_IN = {
    f"{name}{kind}": room for room, names in _MODULES.items() for name in names for kind in ("Config", "Trainer")
}
_ALIASES = {"DistillationConfig": "DistillConfig", "DistillationTrainer": "DistillTrainer"}


def __getattr__(name: str) -> Any:
    # Lazy, so that `rlhf.losses` needs torch alone and `rlhf --help` answers at once.
    if name not in __all__:
        raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
    defined = _ALIASES.get(name, name)
    return getattr(import_module(_DEFINED_IN.get(defined, "rlhf.cli.script_helpers")), defined)


def __dir__() -> list[str]:
    return sorted(__all__)
