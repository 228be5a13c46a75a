"""Going over scored tokens in chunks: logits of some hundred rows at a time, and what their gradients add up to."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rlhf.kernels.matmul import add_product, product, takes
from rlhf.logprobs.head import Head

Mode = Literal["auto", "unit", "save", "recompute"]
IN_CACHE = 2**17  # logits that a CPU goes over several times


def check_tokens(token: Tensor, vocabulary: int) -> None:
    """Raise for a token outside the vocabulary, where looking costs nothing."""
    if token.device.type == "cpu" and token.numel():
        low, high = int(token.min()), int(token.max())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(f"target token {wrong} is outside the vocabulary [0, {vocabulary})")


class Plan(NamedTuple):
    """How :func:`score` goes about its work."""

    mode: str  # of the table above, in lower case
    chunk_size: int
    kept: int = 0  # chunks of log-probs that are kept for the backward pass


def plan(
    rows: int,
    vocabulary: int,
    device: torch.device,
    *,
    learns: bool,
    head_learns: bool,
    local: bool = False,
    entropy: bool = False,
    mode: Mode = "auto",
    chunk_size: int | None = None,
) -> Plan:
    """What :func:`score` does with ``rows`` scored tokens.

    Args:
        learns: a gradient is wanted at all. head_learns: for the head too.
        local: there is a ``local_loss``. entropy, mode, chunk_size: as in :func:`score`.
    Raises:
        ValueError: ``"unit"`` is asked for where the head or the entropy needs a gradient.
    """
    if mode == "unit" and (head_learns or entropy):
        raise ValueError('mode "unit" is for a frozen head without entropy; use "auto"')
    size = chunk_size or _chunk_size(rows, vocabulary, device)
    if not learns:
        return Plan("tile", size)
    if local:
        return Plan("local", size)
    if mode == "unit" or (mode == "auto" and not head_learns and not entropy):
        return Plan("unit", size)
    kept = _chunks_to_keep(mode, rows, size, vocabulary, device)
    return Plan("save" if kept else "recompute", size, kept)


def _chunk_size(rows: int, vocabulary: int, device: torch.device) -> int:
    # Each chunk reads and writes the whole gradient of the weight once more: below 512 rows that is felt.
    budget, low, high = (2**29, 64, 512) if device.type == "cpu" else (2**30, 512, 8192)
    size = min(max(budget // (vocabulary * 4), low), high)
    chunks = -(-rows // size) or 1
    return max(-(-rows // chunks), 1)  # balanced: the last chunk is not a sliver


def _chunks_to_keep(mode: Mode, rows: int, size: int, vocabulary: int, device: torch.device) -> int:
    chunks = -(-rows // size)
    if mode == "auto":
        budget = min(2**31, psutil.virtual_memory().available // 4) if device.type == "cpu" else 0
        return min(chunks, budget // (size * vocabulary * 4))
    return chunks if mode == "save" else 0


def learning(rows: Tensor, head: Head) -> tuple[bool, bool]:
    """Whether a gradient is wanted at all, and for the head too."""
    head_learns = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    return torch.is_grad_enabled() and (rows.requires_grad or head_learns), head_learns


class Walk:
    """Rows [N, H] under a head, ``size`` at a time.

    The head is cast once. What enters a product is float32 on a CPU, which would emulate half precision, and half
    precision on a GPU, which accumulates in float32; what leaves it is float32, or float64 where either side is.
    """

    def __init__(self, rows: Tensor, head: Head, size: int) -> None:
        self.rows, self.head, self.size = rows.detach(), head, size
        self.result = torch.float64 if torch.float64 in (rows.dtype, head.weight.dtype) else torch.float32
        half = rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)
        self.operand = rows.dtype if half else self.result
        self.weight = head.weight.detach().to(self.operand)
        self.bias = None if head.bias is None else head.bias.detach().to(self.result)
        self._memory: Tensor | None = None

    def chunks(self) -> list[slice]:
        """At least one, which may be empty."""
        return [slice(start, start + self.size) for start in range(0, max(len(self.rows), 1), self.size)]

    def log_probs(self, chunk: slice, keep: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probs [c, V], and the slope of the soft-cap [c, V] where there is one: one product.

        They may be written over, and the next call does so; ``keep`` gives them memory of their own.
        """
        rows, head, out = self.rows[chunk], self.head, None if keep else self.memory(chunk)
        if self.operand == self.result:
            logits = self.product(rows.to(self.operand) * head.scale, self.weight.T, out)
        else:  # half precision would round the scaled rows
            logits = self.product(rows, self.weight.T, out)
            if head.scale != 1:
                logits *= head.scale
        if self.bias is not None:
            logits += self.bias * head.scale
        slope = None
        if head.softcap is not None:
            logits.div_(head.softcap).tanh_()
            slope = 1 - logits**2
            logits.mul_(head.softcap)
        if head.temperature != 1:
            logits.div_(head.temperature)
        if logits.is_cuda:
            return logits.log_softmax(-1), slope
        # In place: one pass, no second buffer.
        return torch.ops.aten._log_softmax.out(logits, 1, False, out=logits), slope

    def memory(self, chunk: slice) -> Tensor | None:
        """One chunk's logits for all chunks: fresh memory of that size costs a CPU a page fault for each 4 KiB."""
        if self.rows.is_cuda or takes(self.rows, self.weight):
            return None
        if self._memory is None:
            shape = min(self.size, len(self.rows)), self.weight.size(0)
            self._memory = self.rows.new_empty(shape, dtype=self.result)
        return self._memory[: len(self.rows[chunk])]

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        a, b = a.to(self.operand), b.to(self.operand)
        return product(a, b, out) if self.operand == self.result else torch.mm(a, b, out_dtype=self.result)

    def empty(self) -> Tensor:
        """A number for each row, [N]."""
        return self.rows.new_empty(len(self.rows), dtype=self.result)


class Gradients:
    """What the chunks' ``dz = dL/dz`` add up to; weight and bias in the result's precision, as bf16 sums drift."""

    def __init__(self, walk: Walk, needed: tuple[bool, ...]) -> None:
        self.walk = walk
        self.needs_weight, self.needs_bias = needed[1:3]
        self.rows = torch.empty_like(walk.rows) if needed[0] else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, chunk: slice, dz: Tensor, slope: Tensor | None) -> None:
        walk = self.walk
        scale = walk.head.scale / walk.head.temperature
        if slope is not None:
            dz *= slope
        if self.rows is not None:
            self.rows[chunk] = walk.product(dz, walk.weight).mul_(scale)
        if self.needs_weight:
            scaled = walk.rows[chunk].to(walk.operand) * scale
            if self.weight is None:
                self.weight = walk.product(dz.T, scaled)
            elif walk.operand == walk.result:
                add_product(self.weight, dz.T, scaled)
            else:
                self.weight += walk.product(dz.T, scaled)
        if self.needs_bias:
            added = dz.sum(0).mul_(scale)
            self.bias = added if self.bias is None else self.bias.add_(added)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """For rows, weight and bias, in their own types."""
        weight, bias = self.walk.head.weight, self.walk.head.bias
        to_weight = None if self.weight is None else self.weight.to(weight.dtype)
        to_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return self.rows, to_weight, to_bias


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum over v of a b, [c, V] twice to [c].

    Not by ``bmm``, which on a CPU may add the terms one after another: over 50,000 of them 1e-4 of the sum is lost.
    """
    block = max(IN_CACHE // a.size(1), 1) if a.device.type == "cpu" else max(len(a), 1)
    parts = range(0, max(len(a), 1), block)
    return torch.cat([torch.linalg.vecdot(a[i : i + block], b[i : i + block]) for i in parts])


Step = Callable[[slice, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From a chunk and its log-probs [c, V], which it may overwrite, to what is found of each token [n, c], the chunk's sum
of the loss, and its gradient with respect to the logits over the head's temperature [c, V]."""


def sum_over_chunks(rows: Tensor, head: Head, size: int, step: Step, learns: bool) -> tuple[Tensor, Tensor]:
    """A loss that is a sum over tokens, whose gradient is taken while a chunk's logits live.

    Args:
        learns: take it at all.
    Returns:
        What was found of the tokens [n, N], constants; and the loss, with its gradient.
    """
    if learns:
        return _Sum.apply(rows, head.weight, head.bias, head, size, step)
    with torch.no_grad():
        return _sum(Walk(rows, head, size), step)


def _sum(walk: Walk, step: Step, gradients: Gradients | None = None) -> tuple[Tensor, Tensor]:
    parts, total = [], walk.rows.new_zeros((), dtype=walk.result)
    for chunk in walk.chunks():
        logps, slope = walk.log_probs(chunk)
        found, loss, dz = step(chunk, logps)
        parts.append(found)
        total += loss
        if gradients is not None:
            gradients.add(chunk, dz, slope)
    return torch.cat(parts, 1), total


class _Sum(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, head: Head, size: int, step: Step
    ) -> tuple[Tensor, Tensor]:
        walk = Walk(rows, head, size)
        gradients = Gradients(walk, ctx.needs_input_grad)
        found, total = _sum(walk, step, gradients)
        ctx.save_for_backward(*gradients.results())
        ctx.mark_non_differentiable(found)
        return found, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: they were taken in the forward pass for this one use.
        scaled = [None if x is None else x.mul_(grads[1].to(x.dtype)) for x in ctx.saved_tensors]
        return *scaled, None, None, None
