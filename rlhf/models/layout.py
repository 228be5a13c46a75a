"""Which layout a model's batches have: segments, if its attention can take them, else padded rows."""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data.batch import Batch, Layout
from rlhf.data.collate import Collator
from rlhf.models.attention import EAGER_NAME, NAME, is_flash, register_flash
from rlhf.models.positions import inputs_of
from rlhf.models.single_precision import run_trial, tolerance_of

logger = logging.getLogger(__name__)

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}
# Two pairs: branches behind a prompt of several tokens, and behind one of a single token.
TRIAL_EXAMPLES = (
    {"prompt_ids": [5, 3, 4], "chosen_ids": [6, 7, 3, 2], "rejected_ids": [2, 4, 6]},
    {"prompt_ids": [2], "chosen_ids": [3, 4], "rejected_ids": [7]},
)


def choose_layout(model: nn.Module, wanted: str) -> Layout:
    """``"segments"`` where the model can (or must) take it, else ``"rows"``, with the reason as a warning.

    Args:
        model: the model; its attention function becomes ours where it takes segments.
        wanted: ``"auto"``, ``"segments"`` or ``"rows"``.
    Returns:
        The layout of its batches.
    Raises:
        ValueError: segments are asked for, and the model cannot take them.
    """
    if wanted == "rows":
        return "rows"
    reason = use_segments(model)
    if reason is None:
        return "segments"
    if wanted == "segments":
        raise ValueError(f"--layout segments: {type(model).__name__} cannot take it, {reason}; use --layout rows")
    logger.warning("%s: padded rows, because %s (exact, slower)", type(model).__name__, reason)
    return "rows"


def use_segments(model: nn.Module) -> str | None:
    """Let ``model`` read batches laid out in segments, if it can.

    Its attention function becomes one of :mod:`rlhf.models.attention`, which does what it did before for everything
    else. The model is checked once: a shared prompt and packed sequences must give what separate rows give.

    Args:
        model: a transformers model, or PEFT around one.
    Returns:
        The reason where it cannot, else None.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    config: Any = model.config
    implementation = config.get_text_config()._attn_implementation
    if config._attn_implementation in (NAME, EAGER_NAME):
        return None
    reason = unsupported_reason(model)
    if reason:
        return reason
    # A model without SDPA runs eager by default; where it has SDPA, eager is what the user chose.
    by_default = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"
    if implementation != by_default and not is_flash(implementation):
        return f"its attention is {implementation}"
    was_training = model.training
    model.eval()
    try:
        reason = run_trial(model, lambda: _try_segments(model, by_default))
        if reason is None and is_flash(implementation) and not register_flash(implementation):
            reason = f"{implementation} has no function for spans of different lengths"
    except Exception as error:  # whatever an unknown model raises, padded rows are the answer
        message = str(error).splitlines()[0] if str(error) else ""
        reason = f"it fails on them ({type(error).__name__}: {message})"
    finally:
        model.train(was_training)
    if reason or is_flash(implementation):
        # The trial has set our function for SDPA or eager, which this model must not run with.
        model.set_attn_implementation(implementation)  # type: ignore[operator]
    return reason


def _try_segments(model: nn.Module, implementation: str) -> str | None:
    """Compare hidden states in both layouts, on two examples with shared prompts; the reason where they differ.

    Args:
        model: whose attention becomes our function.
        implementation: ``"sdpa"`` or ``"eager"``, which computes the padded rows. Flash-attention may not run where
            the model is now, and a model that passes with one of these passes its layers' options on.
    """
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
    # The remainder keeps the ids inside a very small vocabulary.
    examples = [
        {key: [index % vocabulary for index in ids] for key, ids in example.items()} for example in TRIAL_EXAMPLES
    ]
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    expected = _last_hidden(model, Collator()(examples))
    model.set_attn_implementation(NAME if implementation == "sdpa" else EAGER_NAME)  # type: ignore[operator]
    if implementation == "eager":
        # Padded rows and generation go on with a function of the model's own file, which must be there.
        _last_hidden(model, Collator()(examples))
    batch = Collator(layout="segments")(examples)
    assert batch.segments is not None
    windows_seen: set[int | None] = set()
    hidden = _last_hidden(model, replace(batch, segments=replace(batch.segments, windows_seen=windows_seen)))
    tolerance = tolerance_of(model, expected) * float(expected.abs().max())
    if not torch.allclose(hidden, expected, rtol=0, atol=tolerance):
        difference = float((hidden - expected).abs().max())
        return f"its hidden states differ from those of padded rows by {difference:.2g}"
    # A window is longer than these examples, so a lost one would not show in the numbers.
    if _has_window(model) and not any(windows_seen):
        return "its sliding window is in its mask alone"
    return None


def unsupported_reason(model: nn.Module) -> str | None:
    """Why no attention function of ours can serve ``model``, where that shows without running it; None if it can."""
    whole_config: Any = model.config
    text_config = whole_config.get_text_config()
    unknown_layers = set(getattr(text_config, "layer_types", None) or []) - ATTENTION_LAYERS
    if unknown_layers:
        return f"it has layers of {', '.join(sorted(unknown_layers))}"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    if any(getattr(parameter, "ds_id", None) is not None or parameter.is_meta for parameter in model.parameters()):
        return "its weights are not in memory"
    return None


def _has_window(model: nn.Module) -> bool:
    text_config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    layer_types = getattr(text_config, "layer_types", None)
    has_size = bool(getattr(text_config, "sliding_window", None))
    return has_size and (not layer_types or "sliding_attention" in layer_types)


@torch.no_grad()
def _last_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """Hidden states that predict the scored tokens, [N, H]."""
    device = next(model.parameters()).device
    hidden = model.base_model(**inputs_of(model, batch.to(device)), use_cache=False)[0]  # type: ignore[operator]
    return hidden.reshape(-1, hidden.size(-1))[batch.targets.source]
