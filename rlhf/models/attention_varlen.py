"""Attention of all spans in one call, by torch's variable-length attention or by a flash-attention package."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from rlhf.data.segments import Segments
from rlhf.models.attention_spans import ScoreOptions


class FlashAttention(NamedTuple):
    """A variable-length flash-attention function, as transformers found it.

    Args:
        attend: the function.
        arguments: transformers' translation of its options into those of the function.
        options: the names of the function's parameters.
    """

    attend: Callable[..., Any]
    arguments: Callable[..., dict[str, Any]]
    options: frozenset[str]

    def attend_spans(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: ScoreOptions
    ) -> Tensor:
        """Attention of all spans, each with the keys of ``[prefix, span]``.

        Args:
            query: [1, heads, T, D], in half precision on a GPU.
            key: [1, kv_heads, T, D].
            value: [1, kv_heads, T, D].
            segments: the spans, with their layout on the device.
            options: of the layer, as far as the function takes them.
        Returns:
            [1, T, heads, D].
        """
        layout = segments.layout
        arguments = self.arguments(
            query_length=layout.longest_query,
            key_length=layout.longest_key,
            is_causal=True,
            dropout=options.dropout,
            softmax_scale=options.scaling,
            sliding_window=options.window,
            softcap=options.softcap,
            s_aux=None if options.sinks is None else options.sinks.to(query.dtype),
            max_seqlen_q=layout.longest_query,
            max_seqlen_k=layout.longest_key,
        )
        output = self.attend(
            _flat(query),
            _keys(key, layout.key_rows),
            _keys(value, layout.key_rows),
            cu_seqlens_q=layout.query_starts,
            cu_seqlens_k=layout.key_starts,
            **arguments,
        )
        # Some versions return the log-sum-exp too.
        return (output[0] if isinstance(output, tuple) else output).unsqueeze(0)


def load_flash_attention(implementation: str) -> FlashAttention | None:
    """The function behind an attention implementation of transformers.

    Args:
        implementation: ``flash_attention_2``, ``flash_attention_3``, or a kernel such as
            ``kernels-community/flash-attn2``.
    Returns:
        The function; None if that kernel has none for spans of different lengths.
    """
    (_, attend, *_), (arguments, _) = lazy_import_flash_attention(implementation)
    if attend is None:
        return None
    return FlashAttention(attend, arguments, frozenset(inspect.signature(attend).parameters))


def attend_by_varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: ScoreOptions) -> Tensor:
    """Attention by torch's own function, each span with the keys of ``[prefix, span]``.

    Args:
        query: [1, heads, T, D], in half precision on a GPU.
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, D].
        segments: the spans, with their layout on the device.
        options: of the layer: no dropout, softcap or sinks.
    Returns:
        [1, T, heads, D].
    """
    layout = segments.layout
    # Aligned at the bottom right: the last query of a span sees all its keys.
    output = varlen_attn(
        _flat(query),
        _keys(key, layout.key_rows),
        _keys(value, layout.key_rows),
        layout.query_starts,
        layout.key_starts,
        layout.longest_query,
        layout.longest_key,
        scale=options.scaling,
        # Here a window counts the keys before the query, and not the query itself.
        window_size=(-1 if options.window is None else options.window - 1, 0),
        enable_gqa=query.size(1) != key.size(1),
    )
    return output.unsqueeze(0)  # type: ignore[union-attr]


def _flat(tensor: Tensor) -> Tensor:
    """[1, heads, T, D] as [T, heads, D]."""
    return tensor[0].transpose(0, 1)


def _keys(tensor: Tensor, key_rows: Tensor | None) -> Tensor:
    """Keys or values in the order of the spans: [keys, kv_heads, D]."""
    flat = _flat(tensor)
    # The keys of a span must be consecutive, so those of a shared prompt are copied for each branch.
    return flat if key_rows is None else flat.index_select(0, key_rows)
