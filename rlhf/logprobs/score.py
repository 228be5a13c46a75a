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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rlhf.logprobs.chunks import Gradients, Mode, Step, Walk, check_tokens, dot, learning, plan, sum_over_chunks
from rlhf.logprobs.head import Head
from rlhf.logprobs.targets import Targets


class Comparison(NamedTuple):
    """A student beside its teacher at each scored token; constants, [N] each, in nats.

    ``divergence`` is the one asked for, at its temperature; ``kl`` is KL(teacher, student) at temperature 1, whatever
    was asked for; ``logps`` are the teacher's, of the token; ``agrees``: both find the same token likeliest. These
    three are None where only a part of the teacher's predictions was kept. ``hidden_states`` is the distance of
    matched layers, where it was asked for.
    """

    divergence: Tensor
    kl: Tensor | None = None
    logps: Tensor | None = None
    agrees: Tensor | None = None
    hidden_states: Tensor | None = None


class Scores(NamedTuple):
    """Of each scored token, float32 (float64 for float64 hidden states), in nats.

    ``loss`` is the sum over tokens of a loss that was given to the model; it carries the gradient then, not the rest.
    ``values`` are a critic's, of the state before each token; they carry a gradient of their own. ``teacher`` is what
    was found beside one. ``router_logits`` are a mixture's, of each layer, where they were asked for.
    """

    logps: Tensor
    entropy: Tensor | None = None
    loss: Tensor | None = None
    values: Tensor | None = None
    teacher: Comparison | None = None
    router_logits: tuple[Tensor, ...] | None = None


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
    learns, head_learns = learning(rows, head)
    way, size, keep = plan(
        len(targets),
        vocabulary,
        rows.device,
        learns=learns,
        head_learns=head_learns,
        local=local_loss is not None,
        entropy=entropy,
        mode=mode,
        chunk_size=chunk_size,
    )
    with torch.autocast(rows.device.type, enabled=False):
        if way == "tile":
            scores = Scores(*_scan(Walk(rows, head, size), targets.token, entropy)[0])
            return scores if local_loss is None else scores._replace(loss=local_loss(scores, *per_token).sum())
        if way == "local":
            step = _local(targets.token, entropy, local_loss, per_token)  # type: ignore[arg-type]
            found, loss = sum_over_chunks(rows, head, size, step, learns=True)
            return Scores(found[0], found[1] if entropy else None, loss)
        if way == "unit":
            return Scores(_Unit.apply(rows, head, targets.token, size))
        return Scores(*_LinearLogps.apply(rows, head.weight, head.bias, head, targets.token, size, keep, entropy))


def _scan(
    walk: Walk, token: Tensor, entropy: bool, keep: int = 0
) -> tuple[tuple[Tensor, Tensor | None], list[tuple[Tensor, Tensor | None]]]:
    """Forward over all chunks; returns logps, entropy, and the log-probs (and slopes) of the first ``keep`` chunks."""
    logps, entropies = walk.empty(), walk.empty() if entropy else None
    kept = []
    with torch.no_grad():
        for index, chunk in enumerate(walk.chunks()):
            dense, slope = walk.log_probs(chunk, keep=index < keep)
            logps[chunk] = dense.gather(1, token[chunk, None]).squeeze(1)
            if entropies is not None:
                entropies[chunk] = -dot(dense.exp(), dense)
            if index < keep:
                kept.append((dense, slope))
    return (logps, entropies), kept


def _local(token: Tensor, entropy: bool, local_loss: LocalLoss, per_token: tuple[Tensor, ...]) -> Step:
    def step(chunk: slice, dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logps = dense.gather(1, token[chunk, None]).squeeze(1)
        with torch.enable_grad():
            own = [x.requires_grad_() for x in (logps, *([-dot(dense.exp(), dense)] if entropy else []))]
            value = local_loss(Scores(own[0], own[1] if entropy else None), *(x[chunk] for x in per_token)).sum()
            g, e = (*torch.autograd.grad(value, own, allow_unused=True), None)[:2]
        dz = _grad_logits(dense, token[chunk], g, e, dense)
        return torch.stack([x.detach() for x in own]), value.detach(), dz

    return step


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
        outputs, kept = _scan(Walk(rows, head, size), token, entropy, keep)
        ctx.save_for_backward(rows, weight, bias, token, *(t for pair in kept for t in pair))
        ctx.settings = (head.scale, head.softcap, head.temperature, size)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, weight, bias, token, *kept = ctx.saved_tensors
        *settings, size = ctx.settings
        walk = Walk(rows, Head(weight, bias, *settings), size)
        gradients = Gradients(walk, ctx.needs_input_grad)
        for index, chunk in enumerate(walk.chunks()):
            if 2 * index < len(kept):
                logps, slope = kept[2 * index], kept[2 * index + 1]
                out = walk.memory(chunk)
            else:
                logps, slope = walk.log_probs(chunk)
                out = logps
            g = None if grad_logps is None else grad_logps[chunk]
            e = None if grad_entropy is None else grad_entropy[chunk]
            gradients.add(chunk, _grad_logits(logps, token[chunk], g, e, out), slope)
        return *gradients.results(), None, None, None, None, None


class _Unit(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: Head, token: Tensor, size: int) -> Tensor:
        walk = Walk(rows, head, size)
        unit, logps = Gradients(walk, (True, False, False)), walk.empty()
        for chunk in walk.chunks():
            dense, slope = walk.log_probs(chunk)
            logps[chunk] = dense.gather(1, token[chunk, None]).squeeze(1)
            unit.add(chunk, _grad_logits(dense, token[chunk], torch.ones_like(logps[chunk]), None, dense), slope)
        ctx.save_for_backward(unit.rows)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        return (unit * grad_logps[:, None]).to(unit.dtype), None, None, None


def _grad_logits(logps: Tensor, token: Tensor, g: Tensor | None, e: Tensor | None, out: Tensor | None) -> Tensor:
    """Gradient of ``g * logp_y + e * H`` with respect to the logits: ``g (1_y - p) - e p (log p + H)``.

    Written to ``out`` where there is one (which may be ``logps``) and no ``e``.
    """
    own = logps.gather(1, token[:, None])
    p = torch.exp(logps, out=out if e is None else None)
    if e is None:
        # 1 - p as -expm1(log p), formed before any downcast: exact for confident tokens.
        return p.mul_(0) if g is None else p.mul_(-g[:, None]).scatter_(1, token[:, None], -own.expm1() * g[:, None])
    entropy = -dot(p, logps)[:, None]
    dz = p * (logps + entropy).mul_(-e[:, None])
    if g is not None:
        exact = dz.gather(1, token[:, None]) - own.expm1() * g[:, None]
        dz.sub_(g[:, None] * p).scatter_(1, token[:, None], exact)
    return dz
