"""Attention of all spans in one call of FlexAttention, which takes softcaps, sinks and heads of any size.

A branch reads the keys of its prompt where they are: each query sees two intervals of rows, one in its own span and one
in its prompt.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from rlhf.data.segments import Segments
from rlhf.models.attention_spans import ScoreOptions

BLOCK = 128  # rows of a block of queries or keys
ScoreChange = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class VisibleRows(NamedTuple):
    """The rows that each query sees: from ``own_start`` to itself, and from ``prefix_start`` to before ``prefix_end``.

    Args:
        own_start: int32 [T].
        prefix_start: int32 [T].
        prefix_end: int32 [T].
    """

    own_start: Tensor
    prefix_start: Tensor
    prefix_end: Tensor


def attend_by_flex(query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: ScoreOptions) -> Tensor:
    """Attention by FlexAttention, compiled at the first call.

    Args:
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, D'].
        segments: the spans, with their layout on the device.
        options: of the layer: no dropout.
    Returns:
        [1, T, heads, D'].
    """
    # All layers with the same window read the same mask.
    cache_key = ("flex", options.window, query.device)
    if cache_key not in segments.attention_cache:
        # A later pass may have a gradient, which cannot save a tensor of inference mode.
        with torch.inference_mode(False):
            segments.attention_cache[cache_key] = block_mask(segments, query.size(2), options.window)
    mask: BlockMask = segments.attention_cache[cache_key]
    num_rows = query.size(2)
    # Whole blocks: a row of another length would be another compilation.
    query, key, value = (F.pad(tensor, (0, 0, 0, mask.shape[-1] - num_rows)) for tensor in (query, key, value))
    # Inside of a compiled model, this function is compiled with it.
    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
    output = attend(
        query,
        key,
        value,
        score_mod=None if options.softcap is None else _softcap(options.softcap),
        block_mask=mask,
        scale=options.scaling,
        enable_gqa=query.size(1) != key.size(1),
        return_aux=None if options.sinks is None else AuxRequest(lse=True),
    )
    if options.sinks is not None:
        output, auxiliary = output
        # The share of the probability that the keys keep: exp(lse) / (exp(lse) + exp(sink)).
        share = torch.sigmoid(auxiliary.lse - options.sinks.float()[:, None])
        output = (output * share[..., None]).to(query.dtype)
    return output[:, :, :num_rows].transpose(1, 2)


def visible_rows(segments: Segments, num_rows: int, window: int | None) -> VisibleRows:
    """The rows that each query sees, on the device of the segments' layout.

    Args:
        segments: the spans.
        num_rows: T.
        window: a token sees this many, itself included, counted in positions of its own sequence; None for all.
    Returns:
        Two intervals for each query.
    """
    layout = segments.layout
    starts = layout.query_starts
    lengths = starts.diff()
    prefix_lengths = layout.prefix_lengths()

    def for_each_row(per_span: Tensor) -> Tensor:
        # With the size given, the host does not wait for the lengths.
        return per_span.repeat_interleave(lengths, output_size=num_rows)

    own_start, prefix_start, prefix = map(for_each_row, (starts[:-1], layout.prefix_starts, prefix_lengths))
    prefix_end = prefix_start + prefix
    if window is not None:
        rows = torch.arange(num_rows, device=starts.device, dtype=starts.dtype)
        position = prefix + rows - own_start
        first_position = position - window + 1
        # The prefix has positions 0, 1, …, so its first visible row follows from the first visible position.
        prefix_start = torch.minimum(prefix_start + first_position.clamp(min=0), prefix_end)
        own_start = torch.maximum(own_start, rows - window + 1)
    return VisibleRows(own_start, prefix_start, prefix_end)


def block_mask(segments: Segments, num_rows: int, window: int | None) -> BlockMask:
    """What FlexAttention needs to know: which blocks of keys a block of queries sees in part, and which in full.

    Made of intervals, in time and memory linear in the row; no mask of T x T exists. Nothing waits for the device.

    Args:
        segments: the spans.
        num_rows: T.
        window: as in :func:`visible_rows`.
    Returns:
        The mask of T rounded up to whole blocks, and two at least: a single one would be another compilation.
    """
    num_blocks = max(-(-num_rows // BLOCK), 2)
    padded_rows = num_blocks * BLOCK
    rows = torch.arange(padded_rows, device=segments.layout.query_starts.device)
    visible = visible_rows(segments, num_rows, window)
    # A row of padding sees itself.
    own_start = torch.cat((visible.own_start, rows[num_rows:]))
    prefix_start, prefix_end = (F.pad(rows_of, (0, padded_rows - num_rows)) for rows_of in visible[1:])
    own_touched, own_covered = _blocks_of(own_start, rows + 1, num_blocks)
    prefix_touched, prefix_covered = _blocks_of(prefix_start, prefix_end, num_blocks)
    is_full = own_covered + prefix_covered == BLOCK
    is_partial = (own_touched + prefix_touched > 0) & ~is_full

    def sees(batch: Tensor, head: Tensor, query_row: Tensor, key_row: Tensor) -> Tensor:
        is_own = (key_row >= own_start[query_row]) & (key_row <= query_row)
        is_prefix = (key_row >= prefix_start[query_row]) & (key_row < prefix_end[query_row])
        return is_own | is_prefix

    return BlockMask.from_kv_blocks(*_ordered(is_partial), *_ordered(is_full), BLOCK_SIZE=BLOCK, mask_mod=sees)


def _blocks_of(first_row: Tensor, end_row: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """How many queries of each block see something of each block of keys, and how many see all of it.

    Args:
        first_row: int [T], where the interval of each query begins.
        end_row: int [T], the row behind its last one.
        num_blocks: T / BLOCK.
    Returns:
        Two tensors, int32 [blocks, blocks].
    """
    is_empty = end_row <= first_row
    touched_from, touched_to = first_row // BLOCK, (end_row + BLOCK - 1) // BLOCK
    covered_from, covered_to = (first_row + BLOCK - 1) // BLOCK, end_row // BLOCK
    touched_to = torch.where(is_empty, touched_from, touched_to)
    covered_to = torch.where(is_empty, covered_from, torch.maximum(covered_to, covered_from))
    return _count_intervals(touched_from, touched_to, num_blocks), _count_intervals(
        covered_from, covered_to, num_blocks
    )


def _count_intervals(first_block: Tensor, end_block: Tensor, num_blocks: int) -> Tensor:
    """For each block of queries and each block of keys, the queries whose interval of blocks holds it."""
    query_block = torch.arange(num_blocks, device=first_block.device).repeat_interleave(
        BLOCK, output_size=num_blocks * BLOCK
    )
    # +1 where an interval begins and -1 behind its end: the running sum counts the intervals that are open.
    changes = torch.zeros(num_blocks * (num_blocks + 1), dtype=torch.int32, device=first_block.device)
    ones = torch.ones_like(query_block, dtype=torch.int32)
    row_of_table = query_block * (num_blocks + 1)
    changes.index_add_(0, row_of_table + first_block, ones).index_add_(0, row_of_table + end_block, -ones)
    return changes.view(num_blocks, num_blocks + 1).cumsum(1, dtype=torch.int32)[:, :num_blocks]


def _ordered(is_listed: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are listed, and all blocks with those first: int32 [1, 1, B] and [1, 1, B, B]."""
    order = is_listed.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return is_listed.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


@lru_cache
def _compiled() -> Callable[..., Any]:
    # Dynamic: batches differ in their number of tokens, and a compilation takes seconds.
    attend = torch.compile(flex_attention, dynamic=True, fullgraph=True)

    # A soft-cap is a constant of the code: as an input, like the sizes, it cannot be compiled.
    @torch._dynamo.config.patch(specialize_float=True)
    def attend_with_constants(*args: Any, **options: Any) -> Any:
        return attend(*args, **options)

    return attend_with_constants


# Cached: a new function for each call would be compiled again.
@lru_cache
def _softcap(softcap: float) -> ScoreChange:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query_row: Tensor, key_row: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
