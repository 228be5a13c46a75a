r"""Log-probabilities of the scored tokens, from hidden states and the head, in chunks.

With :math:`z = Wh` and M = one product of N x V x H, the modes are

=========  ==============================  ======  =========================
TILE       no gradient                     1 M     one chunk of logits
SAVE       log-probs kept for backward     3 M     N x V
RECOMPUTE  logits computed again           4 M     one chunk of logits
=========  ==============================  ======  =========================

SAVE and RECOMPUTE are one function: the first chunks are kept as far as memory allows, the rest computed again.
"""

from typing import Any, Literal, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rlhf.logprobs.head import Head
from rlhf.logprobs.targets import Targets

Mode = Literal["auto", "save", "recompute"]


class Scores(NamedTuple):
    """Of each scored token, float32 (float64 for float64 hidden states), in nats."""

    logps: Tensor
    entropy: Tensor | None = None


def score(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    *,
    entropy: bool = False,
    mode: Mode = "auto",
    chunk_size: int | None = None,
) -> Scores:
    r"""Score ``targets`` without ever building ``[batch, seq, vocab]``.

    .. math:: \log p_t = z_{y_t} - \log\sum_v e^{z_v}, \qquad H_t = -\sum_v p_v \log p_v

    Args:
        hidden: [..., H], the last hidden states that enter the head; flattened, ``targets.source`` indexes its rows.
        head: the head; its weight and bias receive gradients where they require them.
        entropy: also return the entropy of each prediction, with gradient.
        mode: ``"save"`` keeps the log-probs of all chunks for the backward pass (3 products), ``"recompute"`` none
            (4 products), ``"auto"`` as many as fit in a quarter of the free memory, at most 2 GiB (none on a GPU).
            Without gradient there is 1 product and nothing is kept.
        chunk_size: rows of logits at a time; by default 64 MiB of them on CPU, 1 GiB on a GPU.
    Returns:
        Scores of [N] vectors. The result does not depend on mode or chunk size beyond rounding.
    Raises:
        ValueError: hidden sizes differ, or a target lies outside the vocabulary (checked on CPU).

    Source: Liger (2410.10989) and Cut Cross-Entropy (2411.09009) for the problem; the chunking is our own.
    """
    if hidden.size(-1) != head.weight.size(1):
        raise ValueError(f"hidden states have size {hidden.size(-1)}, the head {head.weight.size(1)}")
    vocabulary = head.weight.size(0)
    if targets.token.device.type == "cpu" and len(targets):
        low, high = int(targets.token.min()), int(targets.token.max())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(f"target token {wrong} is outside the vocabulary [0, {vocabulary})")
    rows = hidden.reshape(-1, hidden.size(-1)).index_select(0, targets.source)
    size = chunk_size or _chunk_size(len(targets), vocabulary, rows.device)
    differentiable = (rows, head.weight) if head.bias is None else (rows, head.weight, head.bias)
    with torch.autocast(rows.device.type, enabled=False):
        if torch.is_grad_enabled() and any(t.requires_grad for t in differentiable):
            keep = _chunks_to_keep(mode, len(targets), size, vocabulary, rows.device)
            outputs = _LinearLogps.apply(rows, head.weight, head.bias, head, targets.token, size, keep, entropy)
        else:
            outputs = _scan(rows, head, targets.token, size, entropy)[0]
    return Scores(*outputs)


def _chunk_size(rows: int, vocabulary: int, device: torch.device) -> int:
    budget, low, high = (2**26, 64, 512) if device.type == "cpu" else (2**30, 512, 8192)
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


def _product(a: Tensor, b: Tensor, op: _Operands) -> Tensor:
    a, b = a.to(op.operand), b.to(op.operand)
    return a @ b if op.operand == op.result else torch.mm(a, b, out_dtype=op.result)


def _log_softmax(rows: Tensor, head: Head, op: _Operands) -> tuple[Tensor, Tensor | None]:
    """Log-probs [c, V], and the slope of the soft-cap [c, V] where there is one: one product."""
    logits = _product(rows.detach() * head.scale, op.weight.T, op)
    if op.bias is not None:
        logits += op.bias * head.scale
    slope = None
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        slope = 1 - logits**2
        logits.mul_(head.softcap)
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
    kept = []
    with torch.no_grad():
        for index, start in enumerate(range(0, rows.size(0), size)):
            chunk = slice(start, start + size)
            dense, slope = _log_softmax(rows[chunk], head, op)
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
        ctx.settings = (head.scale, head.softcap, size)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, weight, bias, token, *kept = ctx.saved_tensors
        scale, softcap, size = ctx.settings
        head = Head(weight, bias, scale, softcap)
        op = _operands(rows, head)
        need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_rows = torch.empty_like(rows) if need_rows else None
        # Accumulated in the result's precision: adding chunks in bf16 biases training.
        grad_weight = torch.zeros_like(weight, dtype=op.result) if need_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=op.result) if need_bias else None
        for index, start in enumerate(range(0, rows.size(0), size)):
            chunk = slice(start, start + size)
            if 2 * index < len(kept):
                logps, slope = kept[2 * index], kept[2 * index + 1]
            else:
                logps, slope = _log_softmax(rows[chunk], head, op)
            g = None if grad_logps is None else grad_logps[chunk]
            e = None if grad_entropy is None else grad_entropy[chunk]
            dz = _grad_logits(logps, token[chunk], g, e)
            if slope is not None:
                dz *= slope
            if grad_rows is not None:
                grad_rows[chunk] = _product(dz, op.weight, op).mul_(scale)
            if grad_weight is not None:
                scaled = rows[chunk] * scale
                if op.operand == op.result:
                    grad_weight.addmm_(dz.T, scaled.to(op.operand))
                else:
                    grad_weight += _product(dz.T, scaled, op)
            if grad_bias is not None:
                grad_bias += dz.sum(0).mul_(scale)
        to_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        to_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_rows, to_weight, to_bias, None, None, None, None, None


def _grad_logits(logps: Tensor, token: Tensor, g: Tensor | None, e: Tensor | None) -> Tensor:
    """Gradient of ``g * logp_y + e * H`` with respect to the logits: ``g (1_y - p) - e p (log p + H)``."""
    p = logps.exp()
    dz = torch.zeros_like(p) if e is None and g is None else p
    if e is not None:
        entropy = _entropy(p, logps)[:, None]
        dz = p * (logps + entropy).mul_(-e[:, None])
        if g is not None:
            dz -= g[:, None] * p
    elif g is not None:
        dz = p.mul_(-g[:, None])
    if g is not None:
        logp = logps.gather(1, token[:, None])
        # 1 - p as -expm1(log p), formed before any downcast: exact for confident tokens.
        own = -logp.expm1() * g[:, None]
        if e is not None:
            own += dz.gather(1, token[:, None]) + g[:, None] * logp.exp()
        dz.scatter_(1, token[:, None], own)
    return dz
