"""Which kernel computes the attention of a layer: a pure choice, by what the layer asks for and where it runs."""

from typing import Literal, NamedTuple

import torch

Kernel = Literal["flash", "varlen", "flex", "sdpa", "explicit"]
"""How the attention of all spans is computed.

``flash``: the flash-attention package or kernel that the user chose; all spans in one call.
``varlen``: torch's own variable-length attention; all spans in one call.
``flex``: FlexAttention, compiled; all spans in one call, and a shared prompt's keys are not copied.
``sdpa``: torch's scaled dot-product attention, one call for each span.
``explicit``: scores, softmax and products written out, for each span; takes everything.
"""

HALF = (torch.float16, torch.bfloat16)
LARGEST_VARLEN_HEAD = 256  # of torch's variable-length attention and of flash-attention
VARLEN_HEAD_MULTIPLE = 8  # of which their head sizes must be multiples
FLEX_HEADS = range(16, 257)  # head sizes of FlexAttention: larger ones do not fit into a GPU's shared memory


class AttentionCall(NamedTuple):
    """What a layer asks of its attention.

    Args:
        device: ``"cpu"``, ``"cuda"``, …
        dtype: of query, key and value.
        head_size: of query and key.
        value_size: of a head's values.
        has_window: whether it sees a sliding window of the keys.
        has_dropout: whether attention probabilities are dropped.
        has_softcap: whether scores are soft-capped (Gemma 2).
        has_sinks: whether each head has a sink, a score without a key (gpt-oss).
        is_part: whether the queries are a part of the row, and the keys are those of all processes.
    """

    device: str
    dtype: torch.dtype
    head_size: int
    value_size: int
    has_window: bool = False
    has_dropout: bool = False
    has_softcap: bool = False
    has_sinks: bool = False
    is_part: bool = False

    @property
    def needs_explicit_scores(self) -> bool:
        """Whether SDPA does not know what happens to the scores."""
        return self.has_softcap or self.has_sinks


def choose_kernel(call: AttentionCall, flash_options: frozenset[str] | None = None) -> Kernel:
    """The fastest kernel that computes exactly what a layer asks for.

    Args:
        call: what the layer asks for.
        flash_options: the parameters of the flash-attention function that the user chose; None without one.
    Returns:
        The kernel.
    """
    if call.device == "cuda" and call.dtype in HALF:
        if flash_options is not None and _flash_takes(call, flash_options):
            return "flash"
        if _varlen_takes(call):
            return "varlen"
        if _flex_takes(call):
            return "flex"
    return "explicit" if call.needs_explicit_scores else "sdpa"


def _takes_heads(call: AttentionCall) -> bool:
    is_multiple = call.head_size % VARLEN_HEAD_MULTIPLE == 0
    return call.head_size == call.value_size <= LARGEST_VARLEN_HEAD and is_multiple


def _varlen_takes(call: AttentionCall) -> bool:
    return _takes_heads(call) and not (call.has_dropout or call.needs_explicit_scores)


def _flex_takes(call: AttentionCall) -> bool:
    has_sizes = call.head_size in FLEX_HEADS and call.value_size in FLEX_HEADS
    return has_sizes and not (call.has_dropout or call.is_part)


def _flash_takes(call: AttentionCall, options: frozenset[str]) -> bool:
    # The versions of flash-attention differ in what they take; sinks have two names.
    return (
        _takes_heads(call)
        and (not call.has_window or "window_size" in options)
        and (not call.has_dropout or "dropout_p" in options)
        and (not call.has_softcap or "softcap" in options)
        and (not call.has_sinks or bool({"s_aux", "learnable_sink"} & options))
    )
