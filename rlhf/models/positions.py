"""Where a model's positions begin, and how long a sequence it can read.

What a config does not say is found by a forward pass of a few tokens, once for each model.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf.data import Batch
from rlhf.models.single_precision import run_trial, tolerance_of

# Weak: a model is not kept alive by having been asked.
_finds_own: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
TRIAL_IDS = (5, 6, 7, 3, 4, 2)
TRIAL_LENGTH = 5
SHORT_LENGTH = 3  # of the trial tokens, where a later one must not matter


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The arguments of ``model``'s forward for a batch.

    Args:
        model: a transformers model, or PEFT around one.
        batch: in either layout; its padding, if any, is on the right.
    Returns:
        Ids, mask or segments; and positions, unless the model finds its own.
    """
    inputs = batch.inputs()
    if batch.segments is None and finds_own_positions(model):
        del inputs["position_ids"]
    return inputs


def finds_own_positions(model: nn.Module) -> bool:
    """Whether a model must find its positions itself: RoBERTa's begin after the padding's row, some models read none.

    Checked once, by two forwards of a few tokens in evaluation mode: without positions, and with 0, 1, 2, …

    Args:
        model: a transformers model, or PEFT around one.
    Returns:
        True where positions must not be passed.
    """
    if hasattr(model, "get_base_model"):
        # The answer is kept for the transformers model, whatever is around it.
        model = model.get_base_model()  # type: ignore[operator]
    if model not in _finds_own:
        _finds_own[model] = _shows(model, _rejects_positions)
    return _finds_own[model]


def first_position(model: nn.Module) -> int | None:
    """The position of a text's first token, where a table of the model begins with padding; None for 0."""
    first_positions = []
    for name, embedding in model.named_modules():
        # Tables with an offset (OPT, BART) add it themselves.
        if "position_emb" not in name or not isinstance(embedding, nn.Embedding) or hasattr(embedding, "offset"):
            continue
        if embedding.padding_idx is not None:
            first_positions.append(embedding.padding_idx + 1)
    return max(first_positions, default=None)


def sees_ahead(model: Any) -> bool:
    """Whether the hidden state of a token changes with what comes after it: no causal model, or not set up as one.

    Args:
        model: a transformers model in evaluation mode.
    Returns:
        False too where the model's weights are sharded, or a trial fails: training will tell.
    """
    return _shows(model, _sees_ahead)


def _sees_ahead(model: Any) -> bool:
    trial_ids = _trial_ids(model)
    whole_hidden = _hidden_states(model, trial_ids)
    short_hidden = _hidden_states(model, trial_ids[:, :SHORT_LENGTH])
    return not _agree(model, whole_hidden[:, :SHORT_LENGTH], short_hidden)


def reads_padding(model: Any) -> bool:
    """Whether padding on the right, masked, changes the hidden states of the tokens before it.

    Args:
        model: a transformers model in evaluation mode.
    Returns:
        False too where the model's weights are sharded, or a trial fails: training will tell.
    """
    return _shows(model, _reads_padding)


def _reads_padding(model: Any) -> bool:
    trial_ids = _trial_ids(model)
    attention_mask = (torch.arange(TRIAL_LENGTH, device=trial_ids.device) < SHORT_LENGTH)[None].long()
    padded_hidden = _hidden_states(model, trial_ids, attention_mask=attention_mask)
    short_hidden = _hidden_states(model, trial_ids[:, :SHORT_LENGTH])
    return not _agree(model, padded_hidden[:, :SHORT_LENGTH], short_hidden)


def _rejects_positions(model: Any) -> bool:
    """Whether positions 0, 1, 2, … are refused, or do not give what the model finds by itself."""
    trial_ids = _trial_ids(model)
    expected = _hidden_states(model, trial_ids)
    positions = torch.arange(trial_ids.size(1), device=trial_ids.device)[None]
    try:
        return not _agree(model, _hidden_states(model, trial_ids, position_ids=positions), expected)
    except (TypeError, ValueError):  # it takes none
        return True


def _shows(model: Any, trial: Callable[[Any], bool]) -> bool:
    """What a trial finds; False where the weights are sharded, or it fails."""
    if not _is_in_memory(model):
        return False
    try:
        return run_trial(model, lambda: trial(model))
    except Exception:  # whatever an unknown model raises, it is found where it is trained
        return False


def _trial_ids(model: Any) -> Tensor:
    """A few tokens, none of them the padding's: a model may leave that out by its id."""
    pad_id = getattr(model.config.get_text_config(), "pad_token_id", None)
    trial_ids = [token_id for token_id in TRIAL_IDS if token_id != pad_id][:TRIAL_LENGTH]
    return torch.tensor([trial_ids], device=next(model.parameters()).device)


@torch.no_grad()
def _hidden_states(model: Any, ids: Tensor, **inputs: Tensor) -> Tensor:
    # Given, as in training: without it, some models make a mask of their own from the ids.
    inputs.setdefault("attention_mask", torch.ones_like(ids))
    return model.base_model(input_ids=ids, use_cache=False, **inputs)[0]


def _agree(model: nn.Module, hidden: Tensor, expected: Tensor) -> bool:
    # Relative to the largest value: numbers near 0 are differences of larger ones.
    tolerance = tolerance_of(model, expected) * float(expected.abs().max())
    return torch.allclose(hidden, expected, rtol=0, atol=tolerance)


def _is_in_memory(model: nn.Module) -> bool:
    """Whether the weights are there: neither sharded by ZeRO-3 nor on the meta device."""
    return not any(
        getattr(parameter, "ds_id", None) is not None or parameter.is_meta for parameter in model.parameters()
    )


def max_positions(model: nn.Module) -> int | None:
    """Tokens of the longest sequence that a model has learned positions for; None where positions are computed.

    Rotary, ALiBi and sinusoidal positions have no end; a table of them (GPT-2, OPT, BART, RoBERTa, …) has.
    """
    table_lengths = []
    for name, embedding in model.named_modules():
        if not isinstance(embedding, nn.Embedding) or _is_of_media(name):
            continue
        if _holds_positions(name.rpartition(".")[2]):
            table_lengths.append(embedding.num_embeddings - _first_row(embedding))
    # An encoder and a decoder have a table each; the shorter one is the limit.
    return min(table_lengths, default=None)


def trained_length(model: Any) -> int | None:
    """Tokens of the longest sequence that the model's configuration knows of."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _holds_positions(name: str) -> bool:
    return name == "wpe" or "position" in name


def _is_of_media(name: str) -> bool:
    """Whether a module reads images or sound: its positions are not those of the text."""
    return any(word in name for word in ("vision", "visual", "image", "audio"))


def _first_row(embedding: nn.Embedding) -> int:
    """The row of the first token: OPT and BART begin at 2, RoBERTa after the padding's row."""
    offset = getattr(embedding, "offset", None)
    if offset is not None:
        return int(offset)
    return 0 if embedding.padding_idx is None else embedding.padding_idx + 1
