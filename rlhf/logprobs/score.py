r"""Log-probabilities of the scored tokens, from hidden states and the head, in chunks.

With :math:`z = Wh` and M = one product of N x V x H, the modes are

=========  =========================================  ================  ===================
mode       for                                        products          extra memory
=========  =========================================  ================  ===================
TILE       no gradient                                1 M               one chunk of logits
LOCAL      an objective: a sum over tokens            3 M (2 M frozen)  one chunk of logits
UNIT       any loss, frozen head                      2 M               N x H
SAVE       any loss                                   3 M (2 M frozen)  N x V
RECOMPUTE  any loss                                   4 M (3 M frozen)  one chunk of logits
=========  =========================================  ================  ===================

LOCAL takes the loss's gradient while a chunk's logits live. UNIT keeps :math:`\partial\log p_t/\partial h_t`, which
does not depend on what comes after. SAVE and RECOMPUTE are one function: the first chunks are kept as far as memory
allows, the rest computed again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rlhf.kernels.autocast import without_autocast
from rlhf.kernels.token_scores import TokenScores
from rlhf.logprobs.chunk_plan import ChunkPlan, Mode, plan_chunks
from rlhf.logprobs.chunks import (
    ChunkedHead,
    Gradients,
    check_tokens,
    multiplies_in_half,
    needs_grad,
    sum_over_chunks,
    use_fused_kernels,
)
from rlhf.logprobs.head import Head, Predictions, as_autocast_casts
from rlhf.logprobs.objective import HeadObjective, Scores, TokenLoss
from rlhf.logprobs.targets import Targets


def score(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    *,
    objective: HeadObjective | None = None,
    entropy: bool = False,
    mode: Mode = "auto",
    chunk_size: int | None = None,
) -> Scores:
    r"""Score ``targets`` without ever building ``[batch, seq, vocab]``.

    .. math:: \log p_t = z_{y_t} - \log\sum_v e^{z_v}, \qquad H_t = -\sum_v p_v \log p_v

    Args:
        hidden: [..., H], the last hidden states that enter the head; flattened, ``targets.source`` indexes its rows.
        head: the head; its weight and bias receive gradients where they require them.
        targets: the N scored tokens.
        objective: a loss that is a sum over tokens, such as ``TokenLoss(lambda scores: -scores.logps)``. Its gradient
            is taken chunk by chunk, and ``mode`` does not matter.
        entropy: also return the entropy of each prediction, with gradient.
        mode: ``"save"`` keeps the log-probs of all chunks for the backward pass, ``"recompute"`` none, ``"unit"``
            (frozen head, no entropy) the gradient of each log-prob; ``"auto"`` is unit where it can be, else keeps as
            many chunks as fit in a quarter of the free memory, at most 2 GiB (none on a GPU).
        chunk_size: rows of logits at a time; by default 512 (at most 512 MiB of them) on a CPU, 1/128 of the memory of
            a GPU.
    Returns:
        Scores of [N] vectors, and with an objective its sum. None depends on mode or chunk size beyond rounding.
    Raises:
        ValueError: hidden sizes differ, a target lies outside the vocabulary (checked on CPU), ``"unit"`` is asked for
            where the head or the entropy needs a gradient, or an objective does not fit.

    Source: Liger (2410.10989) and Cut Cross-Entropy (2411.09009) for the problem; the chunking is our own.
    """
    if hidden.size(-1) != head.weight.size(1):
        raise ValueError(f"hidden states have size {hidden.size(-1)}, the head {head.weight.size(1)}")
    # Only rows that predict a scored token go through the head: prompts and padding cost no product.
    rows = hidden.reshape(-1, hidden.size(-1)).index_select(0, targets.source)
    return score_predictions(
        Predictions(as_autocast_casts(rows), head),
        targets.token,
        objective=objective,
        entropy=entropy,
        mode=mode,
        chunk_size=chunk_size,
    )


@torch.compiler.disable  # chunks of large products: nothing to gain, and a graph for each number of them
def score_predictions(
    student: Predictions,
    token: Tensor,
    *,
    objective: HeadObjective | None = None,
    entropy: bool = False,
    mode: Mode = "auto",
    chunk_size: int | None = None,
) -> Scores:
    """As :func:`score`, from predictions of the scored tokens alone; these may be logits.

    Args:
        student: predictions of N tokens; rows and head receive gradients where they require them.
        token: int64 [N], the scored tokens.
        objective: as in :func:`score`.
        entropy: as in :func:`score`.
        mode: as in :func:`score`.
        chunk_size: as in :func:`score`.
    Returns:
        As :func:`score`.
    Raises:
        ValueError: as :func:`score`.
    """
    if objective is not None:
        student = objective.check(student, token)
    # After the objective's check, which may have reduced the vocabulary.
    check_tokens(token, student.vocabulary)
    with_grad, head_needs_grad = needs_grad(student)
    if student.head is None:
        mode = "recompute"  # the softmax alone: no product is saved by keeping anything beside the logits
    plan = plan_chunks(
        len(token),
        student.vocabulary if objective is None else objective.logits_per_token(student.vocabulary),
        student.rows.device,
        needs_grad=with_grad,
        head_needs_grad=head_needs_grad,
        has_objective=objective is not None,
        entropy=entropy,
        mode=mode,
        chunk_size=chunk_size,
        half_precision=multiplies_in_half(student.rows) and use_fused_kernels(token.device, torch.float32),
    )
    # Precision is chosen here, product by product: autocast would round log-probs.
    with torch.autocast(token.device.type, enabled=False):
        if objective is not None:
            # Other objectives return no entropy: asking for one must not be ignored without a word.
            if entropy and not isinstance(objective, TokenLoss):
                raise ValueError(f"entropy goes with log-probs or a TokenLoss, not with {type(objective).__name__}")
            step = objective.begin(token, plan.chunk_size, with_grad, entropy)
            return objective.scores(*sum_over_chunks(student, plan, step, with_grad))
        if plan.mode == "tile":
            token_scores, _ = _scan(ChunkedHead(student, plan.chunk_size), token, entropy)
            return Scores(token_scores.logps, token_scores.entropy)
        if plan.mode == "unit":
            return Scores(_Unit.apply(student.rows, student.head, token, plan.chunk_size))
        rows, head = student
        weight, bias = (None, None) if head is None else (head.weight, head.bias)
        logps, entropies = _TokenLogps.apply(rows, weight, bias, head, token, plan, entropy)
        return Scores(logps, entropies)


def _scan(
    chunked_head: ChunkedHead, token: Tensor, entropy: bool, chunks_cached: int = 0
) -> tuple[TokenScores, list[Tensor | None]]:
    """Forward over all chunks; returns the scores [N], and the tensors of the first chunks, two of each."""
    chunk_scores: list[TokenScores] = []
    cached_tensors: list[Tensor | None] = []
    with torch.no_grad():
        for index, chunk in enumerate(chunked_head.chunks()):
            is_cached = index < chunks_cached
            # A cached chunk needs memory of its own: the next chunk overwrites the shared one.
            predictions = chunked_head.predictions(chunk, keep=is_cached)
            chunk_scores.append(predictions.scores(token[chunk], entropy))
            if is_cached:
                cached_tensors += predictions.saved()
            del predictions  # before the next chunk takes memory
    return _concatenate(chunk_scores), cached_tensors


def _concatenate(chunk_scores: list[TokenScores]) -> TokenScores:
    logps, *others = zip(*chunk_scores, strict=True)
    # All chunks of a pass have the same numbers.
    return TokenScores(torch.cat(logps), *(None if column[0] is None else torch.cat(column) for column in others))


class _TokenLogps(Function):
    """Log-probs and entropies for any loss: modes SAVE and RECOMPUTE."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Head | None,
        token: Tensor,
        plan: ChunkPlan,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        chunked_head = ChunkedHead(Predictions(rows, head), plan.chunk_size)
        scores, cached_tensors = _scan(chunked_head, token, entropy, plan.chunks_cached)
        # Copies: autograd would forbid its caller to change an output in place that is saved here.
        saved_scores = [None if numbers is None else numbers.clone() for numbers in scores]
        # Weight and bias are saved as tensors, not in `head`: autograd then notices if somebody overwrites them.
        ctx.save_for_backward(rows, weight, bias, token, *saved_scores, *cached_tensors)
        ctx.settings = None if head is None else (head.scale, head.softcap, head.temperature)
        ctx.plan = plan
        ctx.set_materialize_grads(False)  # None for an output that no loss reads, not a vector of zeros
        return scores.logps, scores.entropy

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, weight, bias, token, logps, entropy, highest, log_total, *cached_tensors = ctx.saved_tensors
        scores = TokenScores(logps, entropy, highest, log_total)
        # Rebuilt from the saved tensors, with the settings that are no tensors.
        head = None if ctx.settings is None else Head(weight, bias, *ctx.settings)
        chunked_head = ChunkedHead(Predictions(rows, head), ctx.plan.chunk_size)
        gradients = Gradients(chunked_head, ctx.needs_input_grad, ctx.plan.chunks_per_product)
        for index, chunk in enumerate(chunked_head.chunks()):
            memory = gradients.memory(chunk)
            if 2 * index < len(cached_tensors):
                product, slope = cached_tensors[2 * index : 2 * index + 2]
                predictions = chunked_head.restored(chunk, product, slope, memory)
            else:
                predictions = chunked_head.predictions(chunk, gradient_memory=memory)
            chunk_grad_logps = None if grad_logps is None else grad_logps[chunk]
            chunk_grad_entropy = None if grad_entropy is None else grad_entropy[chunk]
            grad_logits = predictions.grad_of_logits(
                token[chunk], scores.rows(chunk), chunk_grad_logps, chunk_grad_entropy
            )
            gradients.add(chunk, grad_logits, predictions.slope)
            del predictions, grad_logits  # before the next chunk takes memory
        return *gradients.results(), None, None, None, None


class _Unit(Function):
    """Log-probs under a frozen head, with the gradient of each in its row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: Head, token: Tensor, chunk_size: int) -> Tensor:
        chunked_head = ChunkedHead(Predictions(rows, head), chunk_size)
        gradients = Gradients(chunked_head, (True, False, False))
        logps = chunked_head.empty()
        for chunk in chunked_head.chunks():
            predictions = chunked_head.predictions(chunk)
            scores = predictions.scores(token[chunk], entropy=False)
            logps[chunk] = scores.logps
            # With a gradient of 1 for each log-prob, the rows get the derivatives themselves.
            unit_grads = torch.ones_like(scores.logps)
            grad_logits = predictions.grad_of_logits(token[chunk], scores, unit_grads, None)
            gradients.add(chunk, grad_logits, predictions.slope)
            del predictions, grad_logits  # before the next chunk takes memory
        # d log p / d h of each token: the backward pass multiplies rows by numbers, and needs no product of the head.
        ctx.save_for_backward(gradients.rows)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        (unit_gradients,) = ctx.saved_tensors
        # The product is taken in float32, then rounded once to the type of the rows.
        return (unit_gradients * grad_logps[:, None]).to(unit_gradients.dtype), None, None, None
