r"""Log-probabilities of the scored tokens, from hidden states and the head, in chunks.

With :math:`z = Wh` and M = one product of N x V x H, the modes are

=========  =========================================  ================  ===================
mode       for                                        products          extra memory
=========  =========================================  ================  ===================
TILE       no gradient                                1 M               one chunk of logits
LOCAL      a loss that is a sum over tokens           3 M (2 M frozen)  one chunk of logits
UNIT       any loss, frozen head                      2 M               N x H
SAVE       any loss                                   3 M (2 M frozen)  N x V
RECOMPUTE  any loss                                   4 M (3 M frozen)  one chunk of logits
=========  =========================================  ================  ===================

LOCAL takes the loss's gradient while a chunk's logits live. UNIT keeps :math:`\partial\log p_t/\partial h_t`, which
does not depend on what comes after. SAVE and RECOMPUTE are one function: the first chunks are kept as far as memory
allows, the rest computed again.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rlhf.logprobs.head import Head
from rlhf.logprobs.products import add_product, product, takes
from rlhf.logprobs.targets import Targets

Mode = Literal["auto", "unit", "save", "recompute"]


class Comparison(NamedTuple):
    """A student beside its teacher at each scored token; constants, [N] each, in nats.

    ``divergence`` is the one asked for, at its temperature; ``kl`` is KL(teacher, student) at temperature 1, whatever
    was asked for; ``logps`` are the teacher's, of the token; ``agrees``: both find the same token likeliest. These
    three are None where only a part of the teacher's predictions was kept. ``matched``: further losses, by name.
    """

    divergence: Tensor
    kl: Tensor | None = None
    logps: Tensor | None = None
    agrees: Tensor | None = None
    matched: dict[str, Tensor] | None = None


class Scores(NamedTuple):
    """Of each scored token, float32 (float64 for float64 hidden states), in nats.

    ``loss`` is the sum over tokens of a loss that was given to the model; it carries the gradient then, not the rest.
    ``values`` are a critic's, of the state before each token; they carry a gradient of their own. ``teacher`` is what
    was found beside one.
    """

    logps: Tensor
    entropy: Tensor | None = None
    loss: Tensor | None = None
    values: Tensor | None = None
    teacher: Comparison | None = None


LocalLoss = Callable[..., Tensor]
"""From a chunk's :class:`Scores` and its slices of further per-token tensors, [c], to the loss of each token, [c]."""


@torch.compiler.disable  # chunks of large products: nothing to gain, and a graph for each number of them
def score(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    *,
    entropy: bool = False,
    mode: Mode = "auto",
    chunk_size: int | None = None,
    local_loss: LocalLoss | None = None,
    per_token: tuple[Tensor, ...] = (),
) -> Scores:
    r"""Score ``targets`` without ever building ``[batch, seq, vocab]``.

    .. math:: \log p_t = z_{y_t} - \log\sum_v e^{z_v}, \qquad H_t = -\sum_v p_v \log p_v

    Args:
        hidden: [..., H], the last hidden states that enter the head; flattened, ``targets.source`` indexes its rows.
        head: the head; its weight and bias receive gradients where they require them.
        entropy: also return the entropy of each prediction, with gradient.
        mode: ``"save"`` keeps the log-probs of all chunks for the backward pass, ``"recompute"`` none, ``"unit"``
            (frozen head, no entropy) the gradient of each log-prob; ``"auto"`` is unit where it can be, else keeps as
            many chunks as fit in a quarter of the free memory, at most 2 GiB (none on a GPU).
        chunk_size: rows of logits at a time; by default 512 (at most 512 MiB of them) on CPU, 1 GiB of them on a GPU.
        local_loss: a loss that is a sum over tokens, such as ``lambda scores: -scores.logps``; its gradient is taken
            chunk by chunk, and ``mode`` does not matter.
        per_token: [N] tensors, constants that ``local_loss`` takes after the scores, such as advantages.
    Returns:
        Scores of [N] vectors, and with ``local_loss`` its sum. None depends on mode or chunk size beyond rounding.
    Raises:
        ValueError: hidden sizes differ, a target lies outside the vocabulary (checked on CPU), or ``"unit"`` is asked
            for where the head or the entropy needs a gradient.

    Source: Liger (2410.10989) and Cut Cross-Entropy (2411.09009) for the problem; the chunking is our own.
    """
    if hidden.size(-1) != head.weight.size(1):
        raise ValueError(f"hidden states have size {hidden.size(-1)}, the head {head.weight.size(1)}")
    vocabulary = head.weight.size(0)
    check_tokens(targets.token, vocabulary)
    rows = hidden.reshape(-1, hidden.size(-1)).index_select(0, targets.source)
    head_learns = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    way, size, keep = plan(
        len(targets),
        vocabulary,
        rows.device,
        learns=torch.is_grad_enabled() and (rows.requires_grad or head_learns),
        head_learns=head_learns,
        local=local_loss is not None,
        entropy=entropy,
        mode=mode,
        chunk_size=chunk_size,
    )
    with torch.autocast(rows.device.type, enabled=False):
        if way == "tile":
            scores = Scores(*_scan(rows, head, targets.token, size, entropy)[0])
            return scores if local_loss is None else scores._replace(loss=local_loss(scores, *per_token).sum())
        if way == "local":
            return Scores(
                *_Local.apply(rows, head.weight, head.bias, head, targets.token, size, entropy, local_loss, per_token)
            )
        if way == "unit":
            return Scores(_Unit.apply(rows, head, targets.token, size))
        return Scores(*_LinearLogps.apply(rows, head.weight, head.bias, head, targets.token, size, keep, entropy))


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


class _Operands(NamedTuple):
    """The head in the dtypes of its products, cast once a call."""

    weight: Tensor
    bias: Tensor | None
    operand: torch.dtype  # what enters a product
    result: torch.dtype  # what leaves it: float32, or float64


def _operands(rows: Tensor, head: Head) -> _Operands:
    result = torch.float64 if torch.float64 in (rows.dtype, head.weight.dtype) else torch.float32
    # A GPU multiplies half precision and accumulates in float32; a CPU would emulate it, so it works in float32.
    half = rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)
    operand = rows.dtype if half else result
    bias = None if head.bias is None else head.bias.detach().to(result)
    return _Operands(head.weight.detach().to(operand), bias, operand, result)


def _product(a: Tensor, b: Tensor, op: _Operands, out: Tensor | None = None) -> Tensor:
    a, b = a.to(op.operand), b.to(op.operand)
    return product(a, b, out) if op.operand == op.result else torch.mm(a, b, out_dtype=op.result)


def _scratch(rows: Tensor, size: int, op: _Operands) -> Tensor | None:
    """One chunk's logits for all chunks: fresh memory of that size costs a CPU a page fault for each 4 KiB."""
    if rows.is_cuda or takes(rows, op.weight):
        return None
    return rows.new_empty(min(size, rows.size(0)), op.weight.size(0), dtype=op.result)


def _log_softmax(
    rows: Tensor, head: Head, op: _Operands, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [c, V], and the slope of the soft-cap [c, V] where there is one: one product."""
    out = None if scratch is None else scratch[: len(rows)]
    if op.operand == op.result:
        logits = _product(rows.detach().to(op.operand) * head.scale, op.weight.T, op, out)
    else:  # half precision would round the scaled rows
        logits = _product(rows.detach(), op.weight.T, op, out)
        if head.scale != 1:
            logits *= head.scale
    if op.bias is not None:
        logits += op.bias * head.scale
    slope = None
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        slope = 1 - logits**2
        logits.mul_(head.softcap)
    if head.temperature != 1:
        logits.div_(head.temperature)
    if logits.is_cuda:
        return logits.log_softmax(-1), slope
    return torch.ops.aten._log_softmax.out(logits, 1, False, out=logits), slope  # in place: one pass, no second buffer


def _entropy(p: Tensor, logps: Tensor) -> Tensor:
    return -torch.bmm(p[:, None], logps[:, :, None]).view(-1)


def _scan(
    rows: Tensor, head: Head, token: Tensor, size: int, entropy: bool, keep: int = 0
) -> tuple[tuple[Tensor, Tensor | None], list[tuple[Tensor, Tensor | None]]]:
    """Forward over all chunks; returns logps, entropy, and the log-probs (and slopes) of the first ``keep`` chunks."""
    op = _operands(rows, head)
    logps = rows.new_empty(rows.size(0), dtype=op.result)
    entropies = torch.empty_like(logps) if entropy else None
    scratch = _scratch(rows, size, op) if keep * size < rows.size(0) else None
    kept = []
    with torch.no_grad():
        for index, start in enumerate(range(0, rows.size(0), size)):
            chunk = slice(start, start + size)
            dense, slope = _log_softmax(rows[chunk], head, op, scratch if index >= keep else None)
            logps[chunk] = dense.gather(1, token[chunk, None]).squeeze(1)
            if entropies is not None:
                entropies[chunk] = _entropy(dense.exp(), dense)
            if index < keep:
                kept.append((dense, slope))
    return (logps, entropies), kept


class _LinearLogps(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        token: Tensor,
        size: int,
        keep: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        outputs, kept = _scan(rows, head, token, size, entropy, keep)
        ctx.save_for_backward(rows, weight, bias, token, *(t for pair in kept for t in pair))
        ctx.settings = (head.scale, head.softcap, head.temperature, size)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, weight, bias, token, *kept = ctx.saved_tensors
        *settings, size = ctx.settings
        head = Head(weight, bias, *settings)
        op = _operands(rows, head)
        gradients = _Gradients(rows, head, op, ctx.needs_input_grad)
        scratch = _scratch(rows, size, op)
        for index, start in enumerate(range(0, rows.size(0), size)):
            chunk = slice(start, start + size)
            if 2 * index < len(kept):
                logps, slope = kept[2 * index], kept[2 * index + 1]
                out = None if scratch is None else scratch[: len(logps)]
            else:
                logps, slope = _log_softmax(rows[chunk], head, op, scratch)
                out = logps
            g = None if grad_logps is None else grad_logps[chunk]
            e = None if grad_entropy is None else grad_entropy[chunk]
            gradients.add(chunk, _grad_logits(logps, token[chunk], g, e, out), slope)
        return *gradients.results(), None, None, None, None, None


class _Local(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        token: Tensor,
        size: int,
        entropy: bool,
        local_loss: LocalLoss,
        per_token: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        op = _operands(rows, head)
        gradients = _Gradients(rows, head, op, ctx.needs_input_grad)
        scratch = _scratch(rows, size, op)
        logps = rows.new_empty(rows.size(0), dtype=op.result)
        entropies = torch.empty_like(logps) if entropy else None
        total = logps.new_zeros(())
        for start in range(0, rows.size(0), size):
            chunk = slice(start, start + size)
            dense, slope = _log_softmax(rows[chunk], head, op, scratch)
            logps[chunk] = dense.gather(1, token[chunk, None]).squeeze(1)
            if entropies is not None:
                entropies[chunk] = _entropy(dense.exp(), dense)
            with torch.enable_grad():
                own = [x[chunk].detach().requires_grad_() for x in (logps, entropies) if x is not None]
                scores = Scores(own[0], None if entropies is None else own[1])
                value = local_loss(scores, *(x[chunk] for x in per_token)).sum()
                g, e = (*torch.autograd.grad(value, own, allow_unused=True), None)[:2]
            total += value.detach()
            gradients.add(chunk, _grad_logits(dense, token[chunk], g, e, dense), slope)
        ctx.save_for_backward(*gradients.results())
        ctx.mark_non_differentiable(logps, *([] if entropies is None else [entropies]))
        return logps, entropies, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx.saved_tensors, grads[2]), None, None, None, None, None, None


def _scaled(gradients: tuple[Tensor | None, ...], factor: Tensor) -> list[Tensor | None]:
    """In place: they were taken in the forward pass for this one use."""
    return [None if x is None else x.mul_(factor.to(x.dtype)) for x in gradients]


class _Unit(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: Head, token: Tensor, size: int) -> Tensor:
        op = _operands(rows, head)
        unit = _Gradients(rows, head, op, (True, False, False))
        scratch = _scratch(rows, size, op)
        logps = rows.new_empty(rows.size(0), dtype=op.result)
        for start in range(0, rows.size(0), size):
            chunk = slice(start, start + size)
            dense, slope = _log_softmax(rows[chunk], head, op, scratch)
            logps[chunk] = dense.gather(1, token[chunk, None]).squeeze(1)
            unit.add(chunk, _grad_logits(dense, token[chunk], torch.ones_like(logps[chunk]), None, dense), slope)
        ctx.save_for_backward(unit.rows)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        return (unit * grad_logps[:, None]).to(unit.dtype), None, None, None


class _Gradients:
    """What the chunks' ``dz = dL/dz`` add up to; weight and bias in the result's precision, as bf16 sums drift."""

    def __init__(self, rows: Tensor, head: Head, op: _Operands, needed: tuple[bool, ...]) -> None:
        self.hidden, self.head, self.op = rows.detach(), head, op
        self.needs_weight, self.needs_bias = needed[1:3]
        self.rows = torch.empty_like(self.hidden) if needed[0] else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, chunk: slice, dz: Tensor, slope: Tensor | None) -> None:
        op, scale = self.op, self.head.scale / self.head.temperature
        if slope is not None:
            dz *= slope
        if self.rows is not None:
            self.rows[chunk] = _product(dz, op.weight, op).mul_(scale)
        if self.needs_weight:
            scaled = self.hidden[chunk].to(op.operand) * scale
            if self.weight is None:
                self.weight = _product(dz.T, scaled, op)
            elif op.operand == op.result:
                add_product(self.weight, dz.T, scaled.to(op.operand))
            else:
                self.weight += _product(dz.T, scaled, op)
        if self.needs_bias:
            added = dz.sum(0).mul_(scale)
            self.bias = added if self.bias is None else self.bias.add_(added)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """For rows, weight and bias, in their own types; zero where there was no chunk."""
        weight, bias = self.head.weight, self.head.bias
        if self.needs_weight and self.weight is None:
            self.weight = torch.zeros_like(weight)
        if self.needs_bias and bias is not None and self.bias is None:
            self.bias = torch.zeros_like(bias)
        to_weight = None if self.weight is None else self.weight.to(weight.dtype)
        to_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return self.rows, to_weight, to_bias


def _grad_logits(logps: Tensor, token: Tensor, g: Tensor | None, e: Tensor | None, out: Tensor | None) -> Tensor:
    """Gradient of ``g * logp_y + e * H`` with respect to the logits: ``g (1_y - p) - e p (log p + H)``.

    Written to ``out`` where there is one (which may be ``logps``) and no ``e``.
    """
    own = logps.gather(1, token[:, None])
    p = torch.exp(logps, out=out if e is None else None)
    if e is None:
        # 1 - p as -expm1(log p), formed before any downcast: exact for confident tokens.
        return p.mul_(0) if g is None else p.mul_(-g[:, None]).scatter_(1, token[:, None], -own.expm1() * g[:, None])
    entropy = _entropy(p, logps)[:, None]
    dz = p * (logps + entropy).mul_(-e[:, None])
    if g is not None:
        exact = dz.gather(1, token[:, None]) - own.expm1() * g[:, None]
        dz.sub_(g[:, None] * p).scatter_(1, token[:, None], exact)
    return dz
