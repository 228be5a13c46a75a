"""The weights of a policy as a server takes them: a checkpoint with an adapter merged in, or the adapter alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from rlhf.models.adapter_files import unserved_part

# Parts of a module's name that PEFT, activation checkpointing and torch.compile put into it.
_WRAPPER_PARTS = ("base_layer", "_checkpoint_wrapped_module", "_orig_mod")


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
    if config.lora_bias:
        return "has biases"
    if any(isinstance(layer, LoraLayer) and layer.lora_embedding_A for layer in model.modules()):
        return "is on the embedding"
    trained_in_base = [
        name for name, weight in model.named_parameters() if weight.requires_grad and ".lora_" not in name
    ]
    return f"is not all that is trained ({trained_in_base[0]})" if trained_in_base else None


def _config_of(model: Any) -> Any:
    return model.peft_config[model.active_adapter]


def unties_head(model: nn.Module) -> bool:
    """Whether an adapter makes another matrix of the head than of the embedding, in a model that has one for both.

    Args:
        model: a model, or PEFT around one.
    Returns:
        True where a checkpoint under the model's own configuration would lose one of the two.
    """
    if not hasattr(model, "peft_config") or not _base_of(model).config.get_text_config().tie_word_embeddings:
        return False
    embedding, head = _base_of(model).get_input_embeddings(), _base_of(model).get_output_embeddings()
    if head is None:
        return False
    trained_in_embedding, trained_in_head = (
        {id(weight) for weight in module.parameters() if weight.requires_grad} for module in (embedding, head)
    )
    return trained_in_embedding != trained_in_head


@torch.no_grad()
def merged_weights(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of an ordinary checkpoint, with a LoRA adapter added into new tensors.

    The model's own weights are not touched: merging in place and taking the adapter out again would leave a rounding
    error in the frozen weights each time.

    Args:
        model: a model, or PEFT around one.
        state: its whole state, by the names of its parameters; empty in processes that do not have it.
    Returns:
        Name to tensor.
    Raises:
        ValueError: the adapter is not a plain LoRA.
    """
    weights = _merged(model, state) if hasattr(model, "peft_config") else state
    # transformers has all experts of a layer in one tensor, and files have a tensor for each expert.
    checkpoint: dict[str, Tensor] = revert_weight_conversion(_base_of(model), weights)
    return checkpoint


def _merged(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of the model under PEFT, by the names of its parameters, with the active adapter in it."""
    adapter: Any = model.active_adapter
    # Under PEFT a wrapped layer's weight is in its base layer, and a copied module beside the original one.
    weights = {
        _own_name(name, adapter): tensor
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
        changes = _changes(layer, adapter)
        # All processes take part in gathering the changes, and the first one alone may have the state.
        for parameter, change in changes.items() if state else ():
            weight_name = f"{_own_name(name, adapter)}.{parameter}"
            if weight_name not in weights:
                raise ValueError(f"{name}: the adapter changes its {parameter}, and the model under it has none")
            # In 8 bits they keep their shape.
            if weights[weight_name].shape != change.shape or not weights[weight_name].is_floating_point():
                raise ValueError(
                    f"{name}: its weights are quantised, and no adapter can be merged into them: start vLLM with "
                    "--enable-lora, which takes the adapter alone, or sample in this process"
                )
            # A new tensor, because those of the state are the model's own.
            weights[weight_name] = weights[weight_name] + change.to(weights[weight_name])
    return weights


def _changes(layer: Any, adapter: str) -> dict[str, Tensor]:
    """What an adapter adds to the parameters of a layer, by their names in the layer."""
    adapter_weights = [weight for name, weight in layer.named_parameters() if name.startswith("lora_")]
    # ZeRO-3 has divided them.
    with gather_params_ctx(adapter_weights, modifier_rank=None):
        parameter = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        changes = {parameter: layer.get_delta_weight(adapter)}
        if layer.lora_bias.get(adapter, False):
            changes["bias"] = layer.lora_B[adapter].bias * layer.scaling[adapter]
    return {name: _whole(change) for name, change in changes.items()}


def _whole(tensor: Any) -> Tensor:
    """A tensor that FSDP2 may have sharded."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _own_name(name: str, adapter: str) -> str:
    """The name of a parameter or module without the parts that wrappers put into it."""
    name = name.removeprefix("base_model.model.").replace(f".modules_to_save.{adapter}.", ".")
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)
