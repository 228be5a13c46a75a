"""Attention over segments: many sequences in one row without padding, and prompts that several answers share."""

import logging
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.data.batch import Batch, Layout, Segments
from rlhf.data.collate import Collator
from rlhf.kernels.recompute import mark_recomputable
from rlhf.models.positions import inputs_of

logger = logging.getLogger(__name__)

NAME = "rlhf_segments"
UNKNOWN_PARTS = ("s_aux", "softcap", "position_bias")  # sinks; soft-capped scores; ALiBi and relative positions
LARGEST_VARLEN_HEAD = 256  # that torch's variable-length attention takes
VARLEN_HEAD_MULTIPLE = 8  # of which its head sizes must be multiples
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}
# Two pairs: branches behind a prompt of several tokens, and behind one of a single token.
TRIAL_EXAMPLES = (
    {"prompt_ids": [5, 3, 4], "chosen_ids": [6, 7, 3, 2], "rejected_ids": [2, 4, 6]},
    {"prompt_ids": [2], "chosen_ids": [3, 4], "rejected_ids": [7]},
)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer.

    Attention is quadratic in one span, never in the row; a branch's queries see the keys of its prompt and its own.
    A GPU in half precision takes torch's variable-length attention, everything else SDPA for each span.

    Args:
        module: the layer.
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, D].
        attention_mask: empty with segments.
        dropout: of the attention probabilities.
        scaling: of the scores; 1 / sqrt(D) by default.
        sliding_window: a token sees this many, itself included, counted in positions of its own sequence.
        segments: the spans; without them (generation, padded rows), transformers' own SDPA answers.
        kwargs: what else a layer passes.
    Returns:
        [1, T, heads, D], and no attention probabilities.
    Raises:
        NotImplementedError: the layer has a part that segments do not know, such as attention sinks.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    for name in UNKNOWN_PARTS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"segments know no {name}")
    if attention_mask is not None and attention_mask.numel():
        raise NotImplementedError("segments know no mask that the model makes")
    # Recorded for `use_segments`, which checks that a model's window reaches this function.
    segments.attention_cache.setdefault("windows", set()).add(sliding_window)
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        # Rotary embeddings in float32 give a float32 query and key beside a half-precision value: one type for all
        # three, as autocast casts what enters torch's own attention.
        autocast_dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (tensor.to(autocast_dtype) for tensor in (query, key, value))
    is_half_on_gpu = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    head_size = query.size(-1)
    takes_head_size = head_size <= LARGEST_VARLEN_HEAD and head_size % VARLEN_HEAD_MULTIPLE == 0
    if is_half_on_gpu and not dropout and takes_head_size:
        return _varlen(query, key, value, segments, scaling, sliding_window), None
    return _sdpa(query, key, value, segments, dropout, scaling, sliding_window), None


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """One call of torch's attention for each span."""
    lengths = [span.length for span in segments.spans]
    # One split and one concatenation: slices of the row would each be a gradient of the row's size.
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for index, (length, parent, prefix) in enumerate(segments.spans):
        span_keys, span_values = keys[index], values[index]
        if prefix:
            span_keys = torch.cat((keys[parent][:, :, :prefix], span_keys), dim=2)
            span_values = torch.cat((values[parent][:, :, :prefix], span_values), dim=2)
        # Without a mask, "causal" aligns the first query with the first key: wrong behind a prefix, whose keys come
        # before all queries.
        mask = None
        if prefix or (sliding_window is not None and length > sliding_window):
            mask = _mask(segments, length, prefix, sliding_window, query)
        output = F.scaled_dot_product_attention(
            queries[index],
            span_keys,
            span_values,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.size(1) != key.size(1),
        )
        outputs.append(output.transpose(1, 2))
    if len(outputs) == 1:
        return outputs[0]
    # Each span's attention saves its output for the backward pass. The layer after this one would save the
    # concatenation too; it is recomputed from them instead.
    detached = [output.detach() for output in outputs]
    return mark_recomputable(torch.cat(outputs, dim=1), lambda: torch.cat(detached, dim=1))


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, sliding_window: int | None
) -> Tensor:  # fmt: skip
    """All spans in one call of torch's variable-length attention, each with the keys of ``[prefix, span]``."""
    # Every layer reads the same layout, so the first layer makes it for all of them.
    cache_key = ("varlen", query.device)
    if cache_key not in segments.attention_cache:
        segments.attention_cache[cache_key] = _varlen_layout(segments, query.device)
    layout: VarlenLayout = segments.attention_cache[cache_key]
    # Aligned at the bottom right: the last query of a span sees all its keys.
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).index_select(0, layout.key_rows),
        value[0].transpose(0, 1).index_select(0, layout.key_rows),
        layout.query_starts,
        layout.key_starts,
        layout.longest_query,
        layout.longest_key,
        scale=scaling,
        # Here a window counts the keys before the query, and not the query itself.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.size(1) != key.size(1),
    )
    return output.unsqueeze(0)  # type: ignore[union-attr]


class VarlenLayout(NamedTuple):
    """The spans as variable-length attention reads them.

    Args:
        key_rows: int64, rows of the keys in their order; those of a shared prompt occur once for each branch.
        query_starts: int32 [spans + 1], where the queries of each span begin.
        key_starts: int32 [spans + 1], where its keys begin among ``key_rows``.
        longest_query: queries of the longest span.
        longest_key: keys of the span that has most.
    """

    key_rows: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int


def _varlen_layout(segments: Segments, device: torch.device) -> VarlenLayout:
    query_lengths = [span.length for span in segments.spans]
    key_lengths = [span.prefix + span.length for span in segments.spans]
    query_starts = [0, *accumulate(query_lengths)]
    key_starts = [0, *accumulate(key_lengths)]
    key_rows = []
    for (length, parent, prefix), start in zip(segments.spans, query_starts, strict=False):
        if prefix:
            # The keys of a span must be consecutive, so those of a shared prompt are copied for each branch.
            key_rows.append(torch.arange(query_starts[parent], query_starts[parent] + prefix))
        key_rows.append(torch.arange(start, start + length))

    def on_device(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return VarlenLayout(
        on_device(torch.cat(key_rows)),
        on_device(torch.tensor(query_starts, dtype=torch.int32)),
        on_device(torch.tensor(key_starts, dtype=torch.int32)),
        max(query_lengths),
        max(key_lengths),
    )


def _mask(segments: Segments, length: int, prefix: int, sliding_window: int | None, query: Tensor) -> Tensor:
    """0 where a span's token sees a key of ``[prefix, span]``, else -inf: [length, prefix + length]."""
    cache_key = (length, prefix, sliding_window, query.dtype, query.device)
    if cache_key not in segments.attention_cache:
        query_position = torch.arange(prefix, prefix + length, device=query.device)[:, None]
        key_position = torch.arange(prefix + length, device=query.device)
        is_hidden = key_position > query_position
        if sliding_window is not None:
            # A window counts the token itself, as in transformers.
            is_hidden |= key_position <= query_position - sliding_window
        mask = torch.zeros(is_hidden.shape, dtype=query.dtype, device=query.device)
        segments.attention_cache[cache_key] = mask.masked_fill_(is_hidden, -torch.inf)
    return segments.attention_cache[cache_key]


AttentionInterface.register(NAME, segment_attention)
# transformers looks for a mask under the same name; padded rows still need the mask of SDPA.
AttentionMaskInterface.register(NAME, sdpa_mask)


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

    Its attention function becomes :func:`segment_attention`, which does what SDPA does for everything else. The
    model is then checked once: a shared prompt and packed sequences must give what separate rows give.

    Args:
        model: a transformers model, or PEFT around one.
    Returns:
        The reason where it cannot, else None.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    config: Any = model.config
    if config._attn_implementation == NAME:
        return None
    reason = unsupported_reason(model)
    if reason:
        return reason
    implementation = config.get_text_config()._attn_implementation
    if implementation != "sdpa":
        return f"its attention is {implementation}"
    was_training = model.training
    model.eval()
    try:
        reason = _try_segments(model)
    except Exception as error:  # whatever an unknown model raises, padded rows are the answer
        message = str(error).splitlines()[0] if str(error) else ""
        reason = f"it fails on them ({type(error).__name__}: {message})"
    finally:
        model.train(was_training)
    if reason:
        # The trial has set our function, which this model must not run with.
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return reason


def _try_segments(model: nn.Module) -> str | None:
    """Compare hidden states in both layouts, on two examples with shared prompts; the reason where they differ."""
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
    # The remainder keeps the ids inside a very small vocabulary.
    examples = [
        {key: [index % vocabulary for index in ids] for key, ids in example.items()} for example in TRIAL_EXAMPLES
    ]
    expected = _last_hidden(model, Collator()(examples))
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    batch = Collator(layout="segments")(examples)
    assert batch.segments is not None
    hidden = _last_hidden(model, batch)
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    if not torch.allclose(hidden, expected, rtol=0, atol=tolerance * float(expected.abs().max())):
        difference = float((hidden - expected).abs().max())
        return f"its hidden states differ from those of padded rows by {difference:.2g}"
    # A window is longer than these examples, so a lost one would not show in the numbers.
    if _has_window(model) and not any(batch.segments.attention_cache["windows"]):
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
