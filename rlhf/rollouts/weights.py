"""A policy's weights under the names of an ordinary checkpoint, for an engine that loads such."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


@torch.no_grad()
def plain_weights(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` (of ``model``, whole) with a LoRA adapter added into new tensors; the model's own are not touched.

    Merging in place and taking it out again would leave a rounding error in the frozen weights each time.

    Raises:
        ValueError: the adapter is not a plain LoRA.
    """
    if not hasattr(model, "peft_config"):
        return state
    adapter = model.active_adapter
    weights = {
        _plain(name, adapter): tensor
        for name, tensor in state.items()
        if ".lora_" not in name and ".original_module." not in name
    }
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer):
            raise ValueError(f"{name}: only plain LoRA can be merged for another process, not {type(layer).__name__}")
        if not isinstance(layer, LoraLayer) or adapter not in (*layer.lora_A, *layer.lora_embedding_A):
            continue
        if adapter in layer.lora_variant:
            raise ValueError(f"{name}: only plain LoRA can be merged for another process, not DoRA and the like")
        delta: Any = layer.get_delta_weight(adapter)  # type: ignore[attr-defined]
        delta = delta.full_tensor() if hasattr(delta, "full_tensor") else delta
        weight = weights[key := f"{_plain(name, adapter)}.weight"]
        weights[key] = weight + delta.to(weight)
    return weights


def _plain(name: str, adapter: Any) -> str:
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name.replace(f".modules_to_save.{adapter}.", ".")
