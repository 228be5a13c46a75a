"""The weights that an adapter is on, saved beside it if no other checkpoint holds them."""

import copy
import logging
import shutil
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
PARTIAL = ".partial"  # in the folder of a run: what is being written, until it is whole and renamed
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
    base_model: Any = model.get_base_model()
    checkpoint_name, base_folder = base_model.__dict__.get("name_or_path"), (home / BASE).resolve()
    # Each save of a run comes here; the checkpoint is read for the first one alone.
    if checkpoint_name and Path(checkpoint_name) in known_folders:
        return
    weights = _plain_base(model, model.state_dict() if state is None else state)
    if checkpoint_name and _holds(checkpoint_name, weights):
        known_folders.add(Path(checkpoint_name))
        return
    base_model.name_or_path = ""
    for config in model.peft_config.values():
        # Absolute, so that the adapter loads from any working directory.
        config.base_model_name_or_path = str(base_folder)
    if base_folder not in known_folders:
        known_folders.add(base_folder)
        if getattr(base_model, "is_quantized", False):
            base_model, weights = _dequantised(base_model, weights)
        _write_base(base_model, weights, base_folder)
        logger.info("%s: the weights that the adapter sits on; no other checkpoint holds them", base_folder)


def _write_base(base_model: Any, weights: dict[str, Tensor], base_folder: Path) -> None:
    """Save a model whole or not at all, and readable for others."""
    partial_folder = base_folder.parent / PARTIAL / base_folder.name
    shutil.rmtree(partial_folder, ignore_errors=True)
    base_model.save_pretrained(partial_folder, state_dict=weights)
    # safetensors makes files that only their owner can read; the configuration has the permissions of any new file.
    mode = (partial_folder / "config.json").stat().st_mode
    for file in partial_folder.iterdir():
        file.chmod(mode)
    shutil.rmtree(base_folder, ignore_errors=True)
    partial_folder.rename(base_folder)


def name_lengths(model: Any, folder: Path) -> None:
    """Complete the names of DoRA's magnitude vectors in a saved adapter.

    PEFT leaves out ``.weight`` and reads both names; the loader of transformers skips the shorter one silently.

    Args:
        model: The model that was saved.
        folder: Holds the adapter.
    """
    for adapter_name, config in getattr(model, "peft_config", {}).items():
        adapter_file = folder / ("" if adapter_name == "default" else adapter_name) / "adapter_model.safetensors"
        if not getattr(config, "use_dora", False) or not adapter_file.exists():
            continue
        weights = load_file(adapter_file)
        # The keys are listed first, because the loop changes them.
        for key in [key for key in weights if key.endswith("lora_magnitude_vector")]:
            weights[f"{key}.weight"] = weights.pop(key)
        # With the format, as PEFT writes it: older loaders of transformers refuse a file without one.
        save_file(weights, adapter_file, {"format": "pt"})


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
    config_file = Path(name, "config.json") if is_folder else try_to_load_from_cache(name, "config.json")
    if isinstance(config_file, str | Path):
        yield from Path(config_file).parent.glob("*.safetensors")


def _is_same_matrix(saved: Any, weight: Tensor) -> bool:
    """Whether the first row of a saved matrix is that of ``weight``; True if they cannot be compared."""
    has_same_shape = list(weight.shape) == saved.get_shape()
    if weight.dim() < 2 or not has_same_shape or not weight.is_floating_point() or weight.is_meta:
        return True
    # The model may have been loaded in another type than the checkpoint has.
    # One row: reading whole matrices would take as long as loading the model.
    return torch.equal(saved[:1].to(weight.dtype), weight[:1].cpu())


def _plain_base(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the weights of the model under an adapter.

    Args:
        model: The PEFT model.
        state: All of its weights.

    Returns:
        The weights under the names that they have without the adapter.
    """
    adapter_markers = (model.base_model.prefix, ".modules_to_save.", ".trainable_tokens_", ".token_indices")
    wrappers = ("base_model.model.", "token_adapter.", "base_layer.", "original_module.")
    weights = {}
    for parameter_name, weight in state.items():
        if any(part in parameter_name for part in adapter_markers):
            continue
        for part in wrappers:
            parameter_name = parameter_name.replace(part, "")
        weights[parameter_name] = weight
    return weights


def _dequantised(quantised_model: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Turn quantised weights into ordinary ones: weights of few bits cannot be loaded on every machine.

    Args:
        base: A quantised model.
        weights: Its weights.

    Returns:
        A model without weights and without quantisation, and the weights that fill it.
    """
    full_weights = dict(weights)
    for module_name, module in quantised_model.named_modules():
        is_quantised = type(getattr(module, "weight", None)).__name__ in _QUANTISED_WEIGHTS
        # A LoRA layer shows the weight of the layer inside, which is visited by itself.
        if not is_quantised or hasattr(module, "base_layer"):
            continue
        module_name = module_name.replace(".base_layer", "")
        # Beside its weight, a quantised layer has scales and tables.
        for key in [key for key in full_weights if key.startswith(f"{module_name}.") and key != f"{module_name}.bias"]:
            del full_weights[key]
        full_weights[f"{module_name}.weight"] = dequantize_module_weight(module).detach().to(quantised_model.dtype)
    # A copy: the model itself stays quantised and may still be trained.
    config = copy.deepcopy(quantised_model.config)
    del config.quantization_config
    with torch.device("meta"):
        # Without memory: the shell only writes the files, and the weights are passed to it.
        empty_model = type(quantised_model)(config)
    empty_model.generation_config = quantised_model.generation_config
    return empty_model, full_weights
