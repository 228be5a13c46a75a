"""The weights that an adapter is on, saved beside it if no other checkpoint holds them."""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

BASE = "base"  # the folder beside an adapter
_QUANTISED_WEIGHTS = ("Params4bit", "Int8Params")  # of bitsandbytes


def keep_base(model: Any, home: Path, known_folders: set[Path], state: dict[str, Tensor] | None = None) -> None:
    """Save the weights under an adapter into ``home/base`` if no checkpoint holds them.

    The adapter's configuration gets the name of that folder. This happens to a model made in memory, one with another
    adapter merged in, one whose vocabulary has grown, and one whose weights differ from its checkpoint's.

    Args:
        model: A PEFT model; any other is left alone.
        home: The output directory.
        known_folders: Folders that are known to hold the weights; grows.
        state: All weights of ``model``, if they are sharded.
    """
    if not isinstance(model, PeftModel):
        return
    base: Any = model.get_base_model()
    source, folder = base.__dict__.get("name_or_path"), (home / BASE).resolve()
    if source and Path(source) in known_folders:
        return
    weights = _plain_base(model, model.state_dict() if state is None else state)
    if source and _holds(source, weights):
        known_folders.add(Path(source))
        return
    base.name_or_path = ""
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(folder)
    if folder not in known_folders:
        known_folders.add(folder)
        if getattr(base, "is_quantized", False):
            base, weights = _dequantised(base, weights)
        base.save_pretrained(folder, state_dict=weights)
        logger.info("%s: the weights that the adapter sits on; no other checkpoint holds them", folder)


def name_lengths(model: Any, folder: Path) -> None:
    """Complete the names of DoRA's magnitude vectors in a saved adapter.

    PEFT leaves out ``.weight`` and reads both names; the loader of transformers skips the shorter one silently.

    Args:
        model: The model that was saved.
        folder: Holds the adapter.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        file = folder / ("" if name == "default" else name) / "adapter_model.safetensors"
        if not getattr(config, "use_dora", False) or not file.exists():
            continue
        weights = load_file(file)
        for key in [key for key in weights if key.endswith("lora_magnitude_vector")]:
            weights[f"{key}.weight"] = weights.pop(key)
        save_file(weights, file, {"format": "pt"})


def _holds(name: str, weights: dict[str, Tensor]) -> bool:
    """Whether a checkpoint has the same weights: the first row of each matrix is compared.

    Args:
        name: A folder, or a name on the hub whose files are in the cache.
        weights: The weights in memory.

    Returns:
        False if one differs; True also if nothing can be compared (no file, other names or shapes, few bits).
    """
    for file in _checkpoint_files(name):
        with safe_open(file, framework="pt") as saved:
            for key in saved.keys() & weights.keys():
                if not _is_same_matrix(saved.get_slice(key), weights[key]):
                    logger.warning("%s: its %s is not the one in memory, which was changed after loading", name, key)
                    return False
    return True


def _checkpoint_files(name: str) -> Iterator[Path]:
    is_folder = Path(name).is_dir()
    config = Path(name, "config.json") if is_folder else try_to_load_from_cache(name, "config.json")
    if isinstance(config, str | Path):
        yield from Path(config).parent.glob("*.safetensors")


def _is_same_matrix(saved: Any, weight: Tensor) -> bool:
    """Whether the first row of a saved matrix is that of ``weight``; True if they cannot be compared."""
    has_same_shape = list(weight.shape) == saved.get_shape()
    if weight.dim() < 2 or not has_same_shape or not weight.is_floating_point() or weight.is_meta:
        return True
    return torch.equal(saved[:1].to(weight.dtype), weight[:1].cpu())


def _plain_base(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the weights of the model under an adapter.

    Args:
        model: The PEFT model.
        state: All of its weights.

    Returns:
        The weights under the names that they have without the adapter.
    """
    of_adapter = (model.base_model.prefix, ".modules_to_save.", ".trainable_tokens_", ".token_indices")
    wrappers = ("base_model.model.", "token_adapter.", "base_layer.", "original_module.")
    weights = {}
    for name, weight in state.items():
        if any(part in name for part in of_adapter):
            continue
        for part in wrappers:
            name = name.replace(part, "")
        weights[name] = weight
    return weights


def _dequantised(base: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Turn quantised weights into ordinary ones: weights of few bits cannot be loaded on every machine.

    Args:
        base: A quantised model.
        weights: Its weights.

    Returns:
        A model without weights and without quantisation, and the weights that fill it.
    """
    whole = dict(weights)
    for name, module in base.named_modules():
        is_quantised = type(getattr(module, "weight", None)).__name__ in _QUANTISED_WEIGHTS
        if not is_quantised or hasattr(module, "base_layer"):
            continue
        name = name.replace(".base_layer", "")
        # Beside its weight, a quantised layer has scales and tables.
        for key in [key for key in whole if key.startswith(f"{name}.") and key != f"{name}.bias"]:
            del whole[key]
        whole[f"{name}.weight"] = dequantize_module_weight(module).detach().to(base.dtype)
    config = copy.deepcopy(base.config)
    del config.quantization_config
    with torch.device("meta"):
        shell = type(base)(config)
    shell.generation_config = base.generation_config
    return shell, whole
