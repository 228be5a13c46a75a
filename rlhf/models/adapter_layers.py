"""Which layers of a model LoRA is put on, if the user names none."""

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def fill_in_targets(model: nn.Module, config: Any) -> None:
    """Set the target modules of a LoRA configuration that names none.

    Args:
        model: A transformers model.
        config: Any configuration of PEFT; changed if it is LoRA's and names no target.

    Raises:
        ValueError: The model has no layer that fits.
    """
    names_no_layer = (None, "all-linear", ["all-linear"], {"all-linear"})
    if not isinstance(config, LoraConfig) or config.target_modules not in names_no_layer:
        return
    # Experts that `target_parameters` names are then adapted alone.
    has_other_targets = config.target_modules is None and config.target_parameters
    if not has_other_targets:
        config.target_modules = linear_layers(model)  # type: ignore[assignment]  # a set is fine, too


def linear_layers(model: Any) -> set[str]:
    """Find the linear layers that an adapter takes by default.

    Left out are:

    * heads;
    * routers and the like, which inherit from a linear layer but compute something else;
    * layers of a state-space block whose weights its kernels read without calling the layer;
    * experts in one tensor, which are no layers (``lora_target_parameters``).

    Args:
        model: A transformers model.

    Returns:
        Endings of module names, as short as they can be.

    Raises:
        ValueError: The model has no such layer.
    """
    modules = dict(model.named_modules())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    target_names = [name for name, module in modules.items() if module is not head and _is_target(name, modules)]
    if not target_names:
        leaf_modules = [module for module in modules.values() if not list(module.children())]
        leaf_types = sorted({type(module).__name__ for module in leaf_modules})
        raise ValueError(
            f"no linear layer for the adapter to sit on: name some (lora_target_modules); layers: {leaf_types}"
        )
    # The last part of a name stands for all layers with that ending, so it must not be the ending of another module.
    other_endings = {_last_part(name) for name in modules.keys() - set(target_names)}
    return {name if _last_part(name) in other_endings else _last_part(name) for name in target_names}


def _is_target(name: str, modules: dict[str, nn.Module]) -> bool:
    layer = modules[name]
    if not isinstance(layer, nn.Linear | Conv1D):
        return False
    # Routers and the like are classes of the model's own file.
    is_of_model = type(layer).__module__.startswith("transformers.models.")
    if is_of_model and not _computes_linear(layer):
        return False
    last_part = _last_part(name)
    parent = modules[name.rpartition(".")[0]]
    # The kernels of Mamba and its kin read the weights of all layers but the first.
    is_in_state_space_block = hasattr(parent, "A_log") and hasattr(parent, "D")
    if is_in_state_space_block and last_part != "in_proj":
        return False
    return last_part != "score"  # the head of a reward model is trained as a whole


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


@torch.no_grad()
def _computes_linear(layer: Any) -> bool:
    """Whether a layer that inherits from a linear one computes the same (Falcon's does, routers do not)."""
    if not isinstance(layer, nn.Linear) or layer.weight.is_meta:
        return False
    # Not random: a draw would move the random numbers of the run.
    probe_input = torch.ones(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    try:
        output = layer(probe_input)
    except RuntimeError:  # it takes its inputs in groups (DeepSeek V4)
        return False
    expected = nn.functional.linear(probe_input, layer.weight, layer.bias)
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    return torch.allclose(output, expected, rtol=1e-2, atol=1e-3)
