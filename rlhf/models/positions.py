"""How long a sequence a model can read."""

from typing import Any

from torch import nn


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
