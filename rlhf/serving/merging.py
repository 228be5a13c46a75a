"""An adapter merged into its base model: a folder that is checked before it is called good."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from rlhf.data import answer_end_ids
from rlhf.models import add_answer_ends, load_model, load_tokenizer, mend_generation_config
from rlhf.models.adapter_base import PARTIAL
from rlhf.models.adapter_files import adapter_config, base_of, load_adapter, loading_base, merge_loaded
from rlhf.models.kinds import kind_of
from rlhf.models.loading import base_kwargs, hub_kwargs
from rlhf.models.places import resolve
from rlhf.runs.card import write_card
from rlhf.runs.files import CARD_FILE

logger = logging.getLogger(__name__)

# Largest difference of logits relative to the largest logit. The merged weights are rounded once to their type, which
# has 24, 11 or 8 bits; the difference grows with the depth of a model.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_PROBE_ROWS, _PROBE_TOKENS = 2, 16


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        folder: where it is.
        dtype: of its weights.
        num_parameters: of the model.
        num_bytes: of all files.
        difference: the largest difference of logits from the adapter's, relative to the largest logit.
    """

    folder: Path
    dtype: torch.dtype
    num_parameters: int
    num_bytes: int
    difference: float


def merge(adapter: str, folder: Path, dtype: str = "auto", **kwargs: Any) -> Merged:
    """Merge an adapter into its base model, and save a model folder that needs no adapter.

    The sum is taken in float32 and rounded once. The folder is loaded again, and its logits are compared with those of
    the model with the adapter on it. Until then it has another name, and a folder that fails is removed.

    Args:
        adapter: a folder, or a name on the hub.
        folder: is written; new or empty.
        dtype: of the merged weights. ``"auto"`` is the type of the base model's checkpoint.
        kwargs: ``revision``, ``token``, ``trust_remote_code``.

    Returns:
        What was written.

    Raises:
        ValueError: no adapter, the folder is not empty, or the merged model gives other logits.
        OSError: the folder cannot be written.
    """
    check_new_folder(folder)
    location = resolve(adapter)
    config = adapter_config(location, **hub_kwargs(kwargs))
    kind = kind_of(adapter, **hub_kwargs(kwargs))
    if config is None:
        raise ValueError(f"{adapter}: {kind}, not an adapter: it needs no merge")
    if "reward model" in kind:
        raise ValueError(
            f"{adapter}: {kind}: only adapters of causal LMs are merged; load_reward_model merges this one"
        )
    base_name = base_of(location, config)
    with loading_base(location):
        base, saved_dtype = _load_base(base_name, base_kwargs(kwargs, config))
    merged_dtype = saved_dtype if dtype == "auto" else getattr(torch, dtype)
    probe = _probe_ids(int(base.config.get_text_config().vocab_size))
    adapted = load_adapter(base, location, **hub_kwargs(kwargs))
    adapter_logits = _logits(adapted, probe)
    model: Any = merge_loaded(adapted, location)
    model.to(merged_dtype)

    tokenizer: Any = load_tokenizer(
        adapter, revision=kwargs.get("revision"), trust_remote_code=kwargs.get("trust_remote_code")
    )
    mend_generation_config(model)
    if tokenizer.chat_template:
        add_answer_ends(model, answer_end_ids(tokenizer))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    _check_space(folder, num_parameters * merged_dtype.itemsize)
    partial = folder.absolute().parent / PARTIAL / folder.name
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _write_card(location, base_name, partial)
        del model, adapted, base  # a large model fits once more
        difference = _relative_difference(_logits(load_model(str(partial)).float(), probe), adapter_logits)
        tolerance = TOLERANCES[merged_dtype]
        if not difference <= tolerance:  # NaN too
            raise ValueError(
                f"{adapter}: the merged model's logits differ from the adapter's by {difference:.1%} of the largest, "
                f"more than {tolerance:.2%} ({_name(merged_dtype)}); the folder was removed. Try --dtype float32"
            )
        _make_readable(partial)
        if folder.is_dir():
            folder.rmdir()  # empty, and a rename needs a free name
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_if_empty(partial.parent)
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return Merged(folder, merged_dtype, num_parameters, num_bytes, difference)


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that holds something.

    Args:
        folder: to be written.

    Raises:
        ValueError: it is a file, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; choose another folder")


def _load_base(name: str, kwargs: dict[str, Any]) -> tuple[Any, torch.dtype]:
    """The base model in float32, and the type of its checkpoint."""
    model: Any = load_model(name, **kwargs)
    dtype = model.dtype
    if getattr(model, "is_quantized", False):
        logger.info("%s: its weights have few bits; they are dequantised, as the adapter cannot be added to them", name)
        model = model.dequantize()
        # Saving would undo the conversion that loading made, and that of bitsandbytes cannot be undone.
        model.__dict__.pop("_weight_conversions", None)
        dtype = dtype if dtype in TOLERANCES else torch.bfloat16
    if dtype not in TOLERANCES:
        dtype = torch.float32
    return model.float(), dtype


def _probe_ids(vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (_PROBE_ROWS, _PROBE_TOKENS), generator=generator)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    model.eval()
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float().cpu()


def _relative_difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


def _check_space(folder: Path, num_bytes: int) -> None:
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(
            f"{folder}: the merged model needs {num_bytes / 1e9:.1f} GB, and {existing} has {free / 1e9:.1f} GB left"
        )


def _write_card(adapter: str, base_name: str, folder: Path) -> None:
    """A card from the record of the run, or a short one."""
    write_card(Path(adapter), folder)
    if (folder / CARD_FILE).exists():
        return
    # A path says nothing to a reader elsewhere.
    base = base_name if not Path(base_name).exists() else None
    data = ModelCardData(base_model=base, library_name="transformers", pipeline_tag="text-generation", tags=["rlhf"])
    text = f"# {folder.name}\n\nAn adapter merged into {Path(base_name).name} with `rlhf merge`.\n"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / CARD_FILE)


def _make_readable(folder: Path) -> None:
    """safetensors makes files that only their owner can read."""
    mode = (folder / "config.json").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
