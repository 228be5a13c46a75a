"""Context parallelism: each process has a part of the row's tokens, and attention sees the keys of all of them.

Keys and values are gathered in each layer, as for Llama 3 (arXiv 2407.21783, 3.3.2). With grouped heads they are small,
and any mask stays exact: windows, packed sequences, and a prompt that several answers share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from rlhf.data import Batch
from rlhf.data.segments import Segments, Span, SpanLayout
from rlhf.logprobs import HeadObjective, Scores, Targets, TokenLoss


class ContextPart(NamedTuple):
    """A process's part of a batch.

    Args:
        batch: its tokens, and the targets that they predict.
        targets: int64 [n], which of the whole batch's targets these are.
        order: int64 [T'], where each row of the padded whole is among the gathered rows.
    """

    batch: Batch
    targets: Tensor
    order: Tensor


@dataclass(frozen=True)
class ContextParallel:
    """The processes that share each batch.

    Args:
        group: of these processes, in the order of their parts.
    """

    group: Any

    def part_of(self, batch: Batch) -> ContextPart:
        """This process's part of a batch, which all processes of the group have whole.

        Args:
            batch: in segments.
        Returns:
            The part. All parts have the same number of tokens: the row is padded with tokens that nothing sees.
        """
        assert batch.segments is not None
        num_rows, device = batch.input_ids.size(1), batch.input_ids.device
        parts = rows_of_parts(num_rows, self.group.size())
        rows = parts[self.group.rank()]
        padding = parts.numel() - num_rows
        spans = (*batch.segments.spans, Span(padding)) if padding else batch.segments.spans
        segments = segments_of_part(spans, rows).to(device)
        order = parts.flatten().argsort().to(device)
        # -1 for the rows of other processes.
        own_row = torch.full((parts.numel(),), -1)
        own_row[rows] = torch.arange(len(rows))
        sources = own_row.to(device)[batch.targets.source]
        own_targets = (sources >= 0).nonzero().squeeze(1)

        def own_tokens(tensor: Tensor) -> Tensor:
            return F.pad(tensor, (0, padding))[:, rows.to(device)]

        part = Batch(
            own_tokens(batch.input_ids),
            own_tokens(batch.attention_mask),
            own_tokens(batch.position_ids),
            Targets(
                sources[own_targets],
                batch.targets.token[own_targets],
                batch.targets.sequence[own_targets],
                batch.targets.num_sequences,
            ),
            replace(segments, gather=lambda tensor: gather_rows(tensor, order, self.group)),
            per_sequence=batch.per_sequence,
        )
        return ContextPart(part, own_targets, order)

    def whole_scores(self, scores: Scores, part: ContextPart, batch: Batch) -> Scores:
        """The scores of all targets of a batch, from those of each process.

        Args:
            scores: of this process's part.
            part: of the batch.
            batch: the whole.
        Returns:
            As without context parallelism, on each process.
        """
        num_targets, num_rows = len(batch.targets), batch.input_ids.size(1)

        def whole(values: Tensor) -> Tensor:
            return sum_over_group(values.new_zeros(num_targets).index_copy(0, part.targets, values), self.group)

        router_logits = scores.router_logits
        if router_logits is not None:
            layers = (logits.reshape(-1, logits.size(-1)) for logits in router_logits)
            order = part.order[:num_rows]  # without padding
            router_logits = tuple(gather_rows(logits, order, self.group) for logits in layers)
        return scores._replace(
            logps=whole(scores.logps),
            entropy=None if scores.entropy is None else whole(scores.entropy),
            values=None if scores.values is None else whole(scores.values),
            loss=None if scores.loss is None else sum_over_group(scores.loss, self.group),
            router_logits=router_logits,
        )


def own_objective(objective: HeadObjective | None, targets: Tensor) -> HeadObjective | None:
    """An objective for some of the targets.

    Args:
        objective: for all targets of a batch; None for none.
        targets: int64 [n].
    Returns:
        The same function, with the constants of these targets.
    Raises:
        NotImplementedError: the objective reads more than its constants, such as a teacher.
    """
    if objective is None or not isinstance(objective, TokenLoss):
        if objective is not None:
            raise NotImplementedError(f"context parallelism cannot divide a {type(objective).__name__}")
        return None
    return replace(objective, columns=tuple(column[targets] for column in objective.columns))


def rows_of_parts(num_rows: int, size: int) -> Tensor:
    """Which rows each process has.

    The row is cut into ``2 * size`` pieces. Process r has the pieces r and ``2 * size - 1 - r``: later tokens see more
    keys, and so all processes have nearly the same work.

    Args:
        num_rows: tokens of the row.
        size: number of processes.
    Returns:
        int64 [size, rows of each]; numbers from ``num_rows`` on are padding.
    """
    piece = -(-num_rows // (2 * size))
    pieces = torch.arange(2 * size * piece).view(2 * size, piece)
    return torch.cat((pieces[:size], pieces[size:].flip(0)), dim=1)


def segments_of_part(spans: Sequence[Span], rows: Tensor) -> Segments:
    """The spans of a process's queries, with the rows of their keys in the whole row.

    Args:
        spans: of the whole row, padding included.
        rows: int64, the rows of this process, in two pieces of equal length.
    Returns:
        A span for each run of queries that are neighbours in a span of the whole. Its ``prefix`` counts all keys before
        the run's first query: those of the shared prompt, and those before it in its span.
    """
    starts = [0, *accumulate(span.length for span in spans)]
    runs: list[Span] = []
    key_rows: list[Tensor] = []
    for piece in rows.chunk(2):
        piece_start, piece_end = int(piece[0]), int(piece[-1]) + 1
        for span, start in zip(spans, starts, strict=False):
            run_start, run_end = max(start, piece_start), min(start + span.length, piece_end)
            if run_start >= run_end:
                continue
            runs.append(Span(run_end - run_start, prefix=span.prefix + run_start - start))
            if span.prefix:
                prompt_start = starts[span.parent]
                key_rows.append(torch.arange(prompt_start, prompt_start + span.prefix))
            key_rows.append(torch.arange(start, run_end))
    query_lengths = [run.length for run in runs]
    key_lengths = [run.prefix + run.length for run in runs]
    layout = SpanLayout(
        query_starts=_starts(query_lengths),
        key_starts=_starts(key_lengths),
        prefix_starts=torch.zeros(len(runs), dtype=torch.int32),  # read by no kernel of a part
        key_rows=torch.cat(key_rows),
        longest_query=max(query_lengths),
        longest_key=max(key_lengths),
    )
    return Segments(tuple(runs), layout)


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def gather_rows(rows: Tensor, order: Tensor, group: Any) -> Tensor:
    """The rows of all processes; each process gets the sum of the gradients of its own.

    Args:
        rows: [t, ...], as many on each process.
        order: int64, where each row of the whole is among the gathered ones.
        group: of the processes.
    Returns:
        [T', ...], in the order of the whole.
    """
    gathered: Tensor = _GatherRows.apply(rows, group)
    return gathered.index_select(0, order)


def sum_over_group(values: Tensor, group: Any) -> Tensor:
    """The sum over processes, on each of them.

    Args:
        values: of the same shape on each process.
        group: of the processes.
    Returns:
        The sums.
    """
    result: Tensor = _SumOverGroup.apply(values, group)
    return result


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty(group.size() * rows.size(0), *rows.shape[1:])
        dist.all_gather_single(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Each process has a gradient for all rows, from its own queries.
        own = gradient.new_empty(gradient.size(0) // ctx.group.size(), *gradient.shape[1:])
        dist.reduce_scatter_single(own, gradient.contiguous(), group=ctx.group)
        return own, None


class _SumOverGroup(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.size = group.size()
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Every process computes the same loss from the same sums, so that all have this gradient. Trainers average
        # gradients over processes: the sum over the group and the mean of its losses agree.
        return gradient * ctx.size, None
