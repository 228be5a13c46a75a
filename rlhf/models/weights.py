"""The weights of a model's folder: all there, numbers, and finite."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.distributed.utils import is_local_dist_rank_0
from transformers.integrations import is_fsdp_enabled

from rlhf.models.attention import is_flash, register_flash

_NAMES_SHOWN = 3
_INTEGERS = ("I", "U", "B")  # first letters of safetensors' names of integer types and of BOOL
_FLOATS_IN_B = ("BF16",)


def load_whole(auto_class: Any, location: str, *, new_head: str | None = None, **kwargs: Any) -> Any:
    """Load a model whose weights must all be in its files.

    transformers initialises missing weights at random, and only warns.

    Args:
        auto_class: Such as ``AutoModelForCausalLM``.
        location: A folder, or a name on the hub.
        new_head: Module whose weights may be missing.
        kwargs: Of ``from_pretrained``.

    Returns:
        The model.

    Raises:
        ValueError: Weights are missing, are integers where the model has floats, or are not finite.
    """
    model, report = auto_class.from_pretrained(location, output_loading_info=True, **kwargs)
    implementation = model.config._attn_implementation
    if implementation is not None and is_flash(implementation):
        # Now, so that float32 weights can be checked before training by forwards without autocast.
        register_flash(implementation)
    # With FSDP the first process of a machine alone has weights yet.
    if is_fsdp_enabled() and not is_local_dist_rank_0():
        return model
    missing = sorted(key for key in report["missing_keys"] if new_head is None or not key.startswith(f"{new_head}."))
    if missing:
        unexpected = some_of(sorted(report["unexpected_keys"]))
        hint = f", and it has {unexpected}, which the model does not" if unexpected else ""
        raise ValueError(f"weights are missing: {some_of(missing)}{hint}; copy or download its files again")
    _check_types(model, Path(location))
    check_finite(model)
    return model


def some_of(names: list[str]) -> str:
    """Name the first few of many.

    Args:
        names: At least one.

    Returns:
        Three of them, and how many more there are.
    """
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _check_types(model: nn.Module, folder: Path) -> None:
    """Refuse integers in the place of floats, which would be converted without a word."""
    # The integers of quantised weights mean something.
    if getattr(model.config, "quantization_config", None) is not None:
        return
    parameters = dict(model.named_parameters())
    for file in sorted(folder.glob("*.safetensors")):
        for name, dtype in integer_weights(file).items():
            if name in parameters and parameters[name].is_floating_point():
                raise ValueError(f"{file.name}: {name} is of type {dtype}, expected a float")


def integer_weights(file: Path) -> dict[str, str]:
    """Weights of a file that are stored as integers.

    Args:
        file: Of safetensors. Its header alone is read.

    Returns:
        Their types by name.
    """
    with safe_open(file, framework="pt") as weights:
        dtypes = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118  # not a dict
    return {name: dtype for name, dtype in dtypes.items() if dtype.startswith(_INTEGERS) and dtype not in _FLOATS_IN_B}


@torch.no_grad()
def check_finite(model: nn.Module) -> None:
    """Refuse weights that are not finite.

    Args:
        model: With weights in memory.

    Raises:
        ValueError: Names the first such weight.
    """
    for name, weight in model.named_parameters():
        # `quant_storage` of bitsandbytes may be a float type: its bits are those of several 4-bit numbers.
        if weight.is_meta or not weight.is_floating_point() or type(weight).__name__ == "Params4bit":
            continue
        # A sum reads each number once, and is not finite where one of them is not.
        total = weight.sum(dtype=torch.float32)
        if not total.isfinite() and not weight.isfinite().all():
            kind = "NaN" if weight.isnan().any() else "infinity"
            raise ValueError(f"its weight {name} holds {kind}; take another checkpoint")
