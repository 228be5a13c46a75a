"""Segments: many sequences in one flat row, as attention reads them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class Span(NamedTuple):
    """``length`` tokens of a flat row: each sees those before it in its span, and ``prefix`` tokens of another.

    ``parent`` is the index of the span whose first ``prefix`` tokens they are (a branch sees the prompt that its
    group's first span begins with).
    """

    length: int
    # Not 0, which is the first span.
    parent: int = -1
    prefix: int = 0


class SpanLayout(NamedTuple):
    """The spans as variable-length attention reads them: each has the keys of ``[prefix, span]``.

    Args:
        query_starts: int32 [spans + 1], the row at which the queries of each span begin; the last entry is the end.
        key_starts: int32 [spans + 1], where the keys of each span begin among ``key_rows``.
        prefix_starts: int32 [spans], the row at which the prefix of each span begins; without a prefix, any row.
        key_rows: int64, rows of the keys in their order; None if that is the order of the row itself. The keys of a
            shared prompt occur once for each branch.
        longest_query: queries of the longest span.
        longest_key: keys of the span that has most.
    """

    query_starts: Tensor
    key_starts: Tensor
    prefix_starts: Tensor
    key_rows: Tensor | None
    longest_query: int
    longest_key: int

    def prefix_lengths(self) -> Tensor:
        """Tokens of the prompt that each span shares: int32 [spans]."""
        return self.key_starts.diff() - self.query_starts.diff()

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "SpanLayout":
        """The same layout with changed tensors.

        Args:
            change: called with each tensor.
        Returns:
            The layout.
        """
        return self._replace(
            query_starts=change(self.query_starts),
            key_starts=change(self.key_starts),
            prefix_starts=change(self.prefix_starts),
            key_rows=None if self.key_rows is None else change(self.key_rows),
        )


# eq=False: a generated `==` would compare tensors, whose comparison is no single truth value.
@dataclass(frozen=True, eq=False)
class Segments:
    """The spans of a flat row, in order and without gaps.

    The collator makes them, with the layout in tensors, so that a layer of the model never has to wait for a copy.

    Args:
        spans: the spans.
        layout: the same in tensors.
        attention_cache: what attention functions derive from them (masks): the first layer fills it, all other layers
            reuse it.
        windows_seen: the sliding windows that layers have asked for, where somebody wants to know.
        gather: gives the rows of the whole row, where this process has a part of them (context parallelism). The keys
            of each span are those that ``layout.key_rows`` names then.
    """

    spans: tuple[Span, ...]
    layout: SpanLayout
    attention_cache: dict[Any, Any] = field(default_factory=dict)
    windows_seen: set[int | None] | None = None
    gather: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, spans: tuple[Span, ...]) -> Self:
        """Segments with the layout of these spans, on the CPU.

        Args:
            spans: in the order of the row.
        Returns:
            The segments.
        """
        return cls(spans, _layout_of(spans))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same segments with all tensors on ``device``."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same segments in pinned memory, from which a GPU copies while the host goes on."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, layout=self.layout.map_tensors(change))

    def last_rows(self) -> Tensor:
        """The row of the last token of each sequence: int64 [spans].

        That of an empty answer is the last token of its prompt.
        """
        layout = self.layout
        prompt_ends = layout.prefix_starts + layout.prefix_lengths()
        ends = torch.where(layout.query_starts.diff() > 0, layout.query_starts[1:], prompt_ends)
        return ends.long() - 1


def _layout_of(spans: tuple[Span, ...]) -> SpanLayout:
    query_lengths = [span.length for span in spans]
    key_lengths = [span.prefix + span.length for span in spans]
    query_starts = [0, *accumulate(query_lengths)]
    key_starts = [0, *accumulate(key_lengths)]
    # Without a prefix the parent is -1, which reads the end of the row: never used.
    prefix_starts = [query_starts[span.parent] for span in spans]
    return SpanLayout(
        torch.tensor(query_starts, dtype=torch.int32),
        torch.tensor(key_starts, dtype=torch.int32),
        torch.tensor(prefix_starts, dtype=torch.int32),
        _key_rows(spans, query_starts, prefix_starts),
        max(query_lengths),
        max(key_lengths),
    )


def _key_rows(spans: tuple[Span, ...], query_starts: list[int], prefix_starts: list[int]) -> Tensor | None:
    """Rows of the keys of ``[prefix, span]``, one span after the other; None if no span has a prefix."""
    if not any(span.prefix for span in spans):
        return None
    # Each span has two pieces of consecutive rows. A piece without a token adds nothing.
    piece_lengths = torch.tensor([length for span in spans for length in (span.prefix, span.length)])
    first_rows = torch.tensor(
        [row for starts in zip(prefix_starts, query_starts, strict=False) for row in starts]
    )  # fmt: skip
    first_keys = piece_lengths.cumsum(0) - piece_lengths
    offsets = (first_rows - first_keys).repeat_interleave(piece_lengths)
    return torch.arange(len(offsets)) + offsets
