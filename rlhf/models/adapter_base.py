"""What an adapter sits on, saved beside it where no other checkpoint holds it."""

import copy
import logging
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


def keep_base(model: Any, home: Path, kept: set[Path], state: dict[str, Tensor] | None = None) -> None:
    """Save an adapter's base model into ``home/base`` if no checkpoint holds it, and name it in the adapter's config.

    This is the case for a model made in memory, a model with another adapter merged in, and a vocabulary that has
    grown. Weights that were changed in memory are recognised by comparing them with the checkpoint's.

    Args:
        model: a PEFT model; nothing is done for another one.
        home: the folder that the adapter is saved in.
        kept: folders that hold the base model already; grows.
        state: all weights of ``model``, where they are sharded.
    """
    if not isinstance(model, PeftModel):
        return
    base: Any = model.get_base_model()
    named, folder = base.__dict__.get("name_or_path"), (home / BASE).resolve()
    if named and Path(named) in kept:
        return
    weights = plain_base(model, model.state_dict() if state is None else state)
    if named and holds(named, weights):
        kept.add(Path(named))
        return
    base.name_or_path = ""
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(folder)
    if folder not in kept:
        kept.add(folder)
        if getattr(base, "is_quantized", False):
            base, weights = dequantised(base, weights)
        base.save_pretrained(folder, state_dict=weights)
        logger.info("%s: the weights that the adapter sits on; no other checkpoint holds them", folder)


def name_lengths(model: Any, folder: Path) -> None:
    """Give the lengths that DoRA learns their whole names in what was saved in ``folder``.

    PEFT leaves out ``.weight`` and reads both; transformers' loader passes over the shorter name without a word.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        file = folder / ("" if name == "default" else name) / "adapter_model.safetensors"
        if getattr(config, "use_dora", False) and file.exists():
            weights = load_file(file)
            short = [key for key in weights if key.endswith("lora_magnitude_vector")]
            weights |= {f"{key}.weight": weights.pop(key) for key in short}
            save_file(weights, file, {"format": "pt"})


def holds(name: str, weights: dict[str, Tensor]) -> bool:
    """Whether the checkpoint ``name`` has these weights: the first row of each matrix is compared.

    True where there is nothing to compare: no file here, other names or shapes, few bits.
    """
    config = Path(name, "config.json") if Path(name).is_dir() else try_to_load_from_cache(name, "config.json")
    files = Path(config).parent.glob("*.safetensors") if isinstance(config, (str, Path)) else []
    for file in files:
        with safe_open(file, framework="pt") as saved:
            for key in saved.keys() & weights.keys():
                part, ours = saved.get_slice(key), weights[key]
                comparable = ours.dim() > 1 and list(ours.shape) == part.get_shape() and ours.is_floating_point()
                if comparable and not ours.is_meta and not torch.equal(part[:1].to(ours.dtype), ours[:1].cpu()):
                    logger.warning("%s: its %s is not the one in memory, which was changed after loading", name, key)
                    return False
    return True


def plain_base(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of ``state``, the weights without the adapter, under the names that they have there."""
    learned = (model.base_model.prefix, ".modules_to_save.", ".trainable_tokens_", ".token_indices")
    weights = {}
    for name, weight in state.items():
        if any(part in name for part in learned):
            continue
        for part in ("base_model.model.", "token_adapter.", "base_layer.", "original_module."):
            name = name.replace(part, "")
        weights[name] = weight
    return weights


def dequantised(base: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """An empty model without quantisation, and the weights that fill it; few bits cannot be read back everywhere."""
    whole = dict(weights)
    for name, module in base.named_modules():
        kind = type(getattr(module, "weight", None)).__name__
        if kind not in ("Params4bit", "Int8Params") or hasattr(module, "base_layer"):
            continue
        name = name.replace(".base_layer", "")
        for key in [key for key in whole if key.startswith(f"{name}.") and key != f"{name}.bias"]:
            del whole[key]
        whole[f"{name}.weight"] = dequantize_module_weight(module).detach().to(base.dtype)
    config = copy.deepcopy(base.config)
    del config.quantization_config
    with torch.device("meta"):
        shell = type(base)(config)
    shell.generation_config = base.generation_config
    return shell, whole
