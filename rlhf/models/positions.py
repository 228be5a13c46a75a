"""Where a model's positions begin, and how long a sequence it can read."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf.data import Batch

_own: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What ``model`` is given of a batch: positions, unless it finds its own (padding is on the right)."""
    inputs = batch.inputs()
    if batch.segments is None and finds_own_positions(model):
        del inputs["position_ids"]
    return inputs


def finds_own_positions(model: nn.Module) -> bool:
    """Whether a model must find its positions itself: RoBERTa's begin after the padding's row, some models read none.

    Checked once, by two forwards of a few tokens in evaluation mode: without positions, and with 0, 1, 2, …
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    if model not in _own:
        _own[model] = _in_memory(model) and not _takes_positions(model)
    return _own[model]


def first_position(model: nn.Module) -> int | None:
    """The position of a text's first token, where a table of the model begins with padding; None for 0."""
    named = (table for name, table in model.named_modules() if "position_emb" in name)
    tables = [table for table in named if isinstance(table, nn.Embedding) and not hasattr(table, "offset")]
    found = [table.padding_idx + 1 for table in tables if table.padding_idx is not None]
    return max(found, default=None)


def sees_ahead(model: Any) -> bool:
    """Whether the hidden state of a token changes with what comes after it: no causal model, or not set up as one."""
    if not _in_memory(model):
        return False
    try:
        ids = _few_tokens(model)
        return not _alike(_hidden(model, ids)[:, :3], _hidden(model, ids[:, :3]))
    except Exception:  # whatever an unknown model raises, it is found where it is trained
        return False


def reads_padding(model: Any) -> bool:
    """Whether padding on the right, masked, changes the hidden states of the tokens before it."""
    if not _in_memory(model):
        return False
    try:
        ids = _few_tokens(model)
        mask = (torch.arange(ids.size(1), device=ids.device) < 3)[None].long()
        return not _alike(_hidden(model, ids, attention_mask=mask)[:, :3], _hidden(model, ids[:, :3]))
    except Exception:  # whatever an unknown model raises, it is found where it is trained
        return False


def _takes_positions(model: Any) -> bool:
    try:
        ids = _few_tokens(model)
        want = _hidden(model, ids)
    except Exception:  # whatever an unknown model raises, it is found where it is trained
        return True
    try:
        return _alike(_hidden(model, ids, position_ids=torch.arange(ids.size(1), device=ids.device)[None]), want)
    except (TypeError, ValueError):
        return False


def _few_tokens(model: Any) -> Tensor:
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = [i for i in (5, 6, 7, 3, 4, 2) if i != pad][:5]
    return torch.tensor([ids], device=next(model.parameters()).device)


@torch.no_grad()
def _hidden(model: Any, ids: Tensor, **given: Tensor) -> Tensor:
    given.setdefault("attention_mask", torch.ones_like(ids))
    return model.base_model(input_ids=ids, use_cache=False, **given)[0]


def _alike(got: Tensor, want: Tensor) -> bool:
    tolerance = 1e-4 if want.dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


def _in_memory(model: nn.Module) -> bool:
    return not any(getattr(p, "ds_id", None) is not None or p.is_meta for p in model.parameters())


def max_positions(model: nn.Module) -> int | None:
    """Tokens of the longest sequence that a model has learned positions for; None where positions are computed.

    Rotary, ALiBi and sinusoidal positions have no end; a table of them (GPT-2, OPT, BART, RoBERTa, …) has.
    """
    sizes = [
        table.num_embeddings - _first_row(table)
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and _holds_positions(name.rpartition(".")[2]) and not _of_media(name)
    ]
    return min(sizes, default=None)


def trained_length(model: Any) -> int | None:
    """Tokens of the longest sequence that the model's configuration knows of."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _holds_positions(name: str) -> bool:
    return name == "wpe" or "position" in name


def _of_media(name: str) -> bool:
    """Whether a module reads images or sound: its positions are not those of the text."""
    return any(word in name for word in ("vision", "visual", "image", "audio"))


def _first_row(table: nn.Embedding) -> int:
    """The row of the first token: OPT and BART begin at 2, RoBERTa after the padding's row."""
    if (offset := getattr(table, "offset", None)) is not None:
        return int(offset)
    return 0 if table.padding_idx is None else table.padding_idx + 1
