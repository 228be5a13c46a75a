"""Attention one span at a time: by torch's SDPA, or written out for scores that SDPA does not know."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.data.segments import Segments
from rlhf.kernels.recompute import mark_recomputable


class ScoreOptions(NamedTuple):
    """How a layer turns products of queries and keys into attention probabilities.

    Args:
        scaling: factor of the products; 1 / sqrt(D) by default.
        window: a token sees this many, itself included, counted in positions of its own sequence; None for all.
        dropout: of the probabilities.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: [heads], a further score of each head, without a key: it takes a part of the probability.
    """

    scaling: float | None = None
    window: int | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None


def attend_by_span(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: ScoreOptions, *, explicit: bool
) -> Tensor:
    """One computation for each span.

    Args:
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, D'].
        segments: the spans.
        options: of the layer.
        explicit: whether scores are written out, which takes softcaps and sinks; otherwise SDPA.
    Returns:
        [1, T, heads, D'].
    """
    lengths = [span.length for span in segments.spans]
    # One split and one concatenation: slices of the row would each be a gradient of the row's size.
    tensors = (query.split(lengths, dim=2), _by_span(key, segments), _by_span(value, segments))
    outputs = []
    for (length, _, prefix), span_query, span_keys, span_values in zip(segments.spans, *tensors, strict=True):
        # Without a mask, "causal" aligns the first query with the first key: wrong behind a prefix, whose keys come
        # before all queries.
        mask = None
        if explicit or prefix or (options.window is not None and length > options.window):
            mask = _mask(segments, length, prefix, options.window, query)
        if explicit:
            assert mask is not None
            output = _written_out(span_query, span_keys, span_values, mask, options)
        else:
            output = F.scaled_dot_product_attention(
                span_query,
                span_keys,
                span_values,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=options.dropout,
                scale=options.scaling,
                enable_gqa=query.size(1) != key.size(1),
            )
        outputs.append(output.transpose(1, 2))
    if len(outputs) == 1:
        return outputs[0]
    # Each span's attention saves its output for the backward pass. The layer after this one would save the
    # concatenation too; it is recomputed from them instead.
    detached = [output.detach() for output in outputs]
    return mark_recomputable(torch.cat(outputs, dim=1), lambda: torch.cat(detached, dim=1))


def _by_span(tensor: Tensor, segments: Segments) -> Iterator[Tensor]:
    """The keys or values of each span, behind those of its prefix."""
    if segments.gather is not None:
        # They are those of all processes: the layout names the rows of each span.
        assert segments.layout.key_rows is not None
        rows = tensor.index_select(2, segments.layout.key_rows)
        yield from rows.split([span.prefix + span.length for span in segments.spans], dim=2)
        return
    own_rows = tensor.split([span.length for span in segments.spans], dim=2)
    for rows, (_, parent, prefix) in zip(own_rows, segments.spans, strict=True):
        yield torch.cat((own_rows[parent][:, :, :prefix], rows), dim=2) if prefix else rows


def _written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: ScoreOptions) -> Tensor:
    """Attention of one span in plain operations; scores and softmax in float32 at least.

    Args:
        query: [1, heads, L, D].
        key: [1, kv_heads, K, D].
        value: [1, kv_heads, K, D'].
        mask: [L, K], added to the scores.
        options: of the layer.
    Returns:
        [1, heads, L, D'].
    """
    _, heads, length, head_size = query.shape
    kv_heads, num_keys = key.size(1), key.size(2)
    rows_per_key_head = heads // kv_heads * length
    score_dtype = torch.promote_types(query.dtype, torch.float32)
    scale = head_size**-0.5 if options.scaling is None else options.scaling
    # Autocast would multiply in half precision.
    with torch.autocast(query.device.type, enabled=False):
        # Query heads that share a key head are rows of one product, so that no key is copied.
        grouped_query = query.reshape(kv_heads, rows_per_key_head, head_size).to(score_dtype)
        scores = grouped_query @ key[0].to(score_dtype).transpose(1, 2) * scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        scores = scores.view(heads, length, num_keys) + mask
        if options.sinks is not None:
            sinks = options.sinks.to(score_dtype)[:, None, None].expand(heads, length, 1)
            scores = torch.cat((scores, sinks), dim=-1)
        probabilities = F.dropout(scores.softmax(-1)[..., :num_keys], options.dropout)
        grouped_probabilities = probabilities.reshape(kv_heads, rows_per_key_head, num_keys)
        output = grouped_probabilities @ value[0].to(score_dtype)
    return output.view(1, heads, length, value.size(3)).to(query.dtype)


def _mask(segments: Segments, length: int, prefix: int, window: int | None, query: Tensor) -> Tensor:
    """0 where a span's token sees a key of ``[prefix, span]``, else -inf: [length, prefix + length]."""
    cache_key = (length, prefix, window, query.dtype, query.device)
    if cache_key not in segments.attention_cache:
        # A later pass may have a gradient, which cannot save a tensor of inference mode.
        with torch.inference_mode(False):
            segments.attention_cache[cache_key] = _new_mask(length, prefix, window, query.dtype, query.device)
    return segments.attention_cache[cache_key]


def _new_mask(length: int, prefix: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    query_position = torch.arange(prefix, prefix + length, device=device)[:, None]
    key_position = torch.arange(prefix + length, device=device)
    is_hidden = key_position > query_position
    if window is not None:
        # A window counts the token itself, as in transformers.
        is_hidden |= key_position <= query_position - window
    mask = torch.zeros(is_hidden.shape, dtype=dtype, device=device)
    return mask.masked_fill_(is_hidden, -torch.inf)
