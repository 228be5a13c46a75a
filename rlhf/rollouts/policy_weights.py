"""The weights of a policy as a server takes them: a checkpoint with an adapter merged in, or the adapter alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.models.adapter_files import unserved_part


@dataclass(frozen=True)
class AdapterWeights:
    """A LoRA adapter without its base model.

    Args:
        config: of PEFT.
        tensors: by the names of PEFT's files.
    """

    config: LoraConfig
    tensors: Mapping[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write the files that PEFT writes.

        Args:
            folder: an empty folder.
        """
        self.config.save_pretrained(str(folder))
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter_weights(model: nn.Module, state: dict[str, Tensor]) -> AdapterWeights:
    """The active adapter of a policy.

    Args:
        model: PEFT around a model; :func:`whole_model_reason` is None.
        state: its whole state, by the names of its parameters.
    Returns:
        The adapter.
    """
    name: Any = model.active_adapter
    tensors = get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)
    return AdapterWeights(_config_of(model), tensors)


def adapter_rank(model: nn.Module) -> int:
    """The largest rank of a layer of the active adapter.

    Args:
        model: PEFT around a model, with LoRA.
    Returns:
        The rank.
    """
    config = _config_of(model)
    return int(max([config.r, *(config.rank_pattern or {}).values()]))


def whole_model_reason(model: nn.Module) -> str | None:
    """Why a server needs the whole model and not an adapter alone, if so.

    Args:
        model: a model, or PEFT around one.
    Returns:
        The end of a sentence about the adapter; None where the adapter is enough.
    """
    if not hasattr(model, "peft_config"):
        return "is missing"
    config = _config_of(model)
    reason = unserved_part(config)
    if reason is not None:
        return reason
    if config.bias != "none":
        return "trains biases of the model"
    if any(isinstance(layer, LoraLayer) and layer.lora_embedding_A for layer in model.modules()):
        return "is on the embedding"
    trained_in_base = [
        name for name, weight in model.named_parameters() if weight.requires_grad and ".lora_" not in name
    ]
    return f"is not all that is trained ({trained_in_base[0]})" if trained_in_base else None


def _config_of(model: Any) -> Any:
    return model.peft_config[model.active_adapter]


@torch.no_grad()
def merged_weights(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of an ordinary checkpoint, with a LoRA adapter added into new tensors.

    The model's own weights are not touched: merging in place and taking the adapter out again would leave a rounding
    error in the frozen weights each time.

    Args:
        model: a model, or PEFT around one.
        state: its whole state, by the names of its parameters.
    Returns:
        Name to tensor.
    Raises:
        ValueError: the adapter is not a plain LoRA.
    """
    if not hasattr(model, "peft_config"):
        return state
    adapter: Any = model.active_adapter
    # Under PEFT a wrapped layer's weight is in its base layer, and a copied module beside the original one.
    weights = {
        _checkpoint_name(name, adapter): tensor
        for name, tensor in state.items()
        if ".lora_" not in name and ".original_module." not in name
    }
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer):
            raise ValueError(f"{name}: only plain LoRA can be merged for another process, not {type(layer).__name__}")
        # Layers without this adapter are as they are in the checkpoint.
        if not isinstance(layer, LoraLayer) or adapter not in (*layer.lora_A, *layer.lora_embedding_A):
            continue
        if adapter in layer.lora_variant:
            raise ValueError(f"{name}: only plain LoRA can be merged for another process, not DoRA and the like")
        delta: Any = layer.get_delta_weight(adapter)  # type: ignore[attr-defined]
        if hasattr(delta, "full_tensor"):  # sharded by FSDP2
            delta = delta.full_tensor()
        weight_name = f"{_checkpoint_name(name, adapter)}.weight"
        # A new tensor, because those of the state are the model's own.
        weights[weight_name] = weights[weight_name] + delta.to(weights[weight_name])
    return weights


def _checkpoint_name(name: str, adapter: str) -> str:
    """A parameter's name without what PEFT puts into it."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name.replace(f".modules_to_save.{adapter}.", ".")
