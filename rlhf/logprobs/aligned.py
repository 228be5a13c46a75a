"""A student beside a teacher of another vocabulary: their sorted probabilities, from hidden states and two heads."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rlhf.logprobs.divergence import Divergence, Predictions
from rlhf.logprobs.head import Head
from rlhf.logprobs.score import (
    Comparison,
    Scores,
    _grad_logits,
    _Gradients,
    _log_softmax,
    _operands,
    _scaled,
    _scratch,
    check_tokens,
    plan,
)
from rlhf.losses import uld_loss

HELD = 4  # chunks of logits at a time: probabilities, their order (int64) and the gradient


@torch.compiler.disable
def compare_sorted(
    student: Predictions,
    teacher: Predictions,
    token: Tensor,
    teacher_token: Tensor,
    partner: Tensor,
    weights: Divergence,
    *,
    chunk_size: int | None = None,
) -> Scores:
    """Score ``token`` under the student, and compare how sure student and teacher are: :func:`rlhf.losses.uld_loss`.

    Args:
        student: N tokens; rows and head receive gradients where they require them. teacher: constants, of M tokens.
        token: int64 [N], the hard labels. teacher_token: int64 [M], what follows at the teacher's places.
        partner: int64 [N], the teacher's place beside each of the student's; -1 for none, and no loss but the label's.
        weights: its temperature and its two weights alone.
        chunk_size: rows of each model's logits at a time.
    Returns:
        As :func:`compare`: the sum ``loss`` with the gradient; constants ``logps`` [N], and in ``teacher`` the
        ``divergence`` [N] and the teacher's ``logps`` [N] of the partner's token, both 0 without a partner.
    Raises:
        ValueError: numbers of tokens differ, or a token lies outside its vocabulary (checked on CPU).

    Source: arXiv 2402.12030 §3; the chunking is our own.
    """
    if {len(student.rows), len(partner)} != {len(token)} or len(teacher.rows) != len(teacher_token):
        raise ValueError(
            f"student, token and partner must agree, got {len(student.rows)}, {len(token)} and {len(partner)} rows; "
            f"teacher and teacher_token too, got {len(teacher.rows)} and {len(teacher_token)}"
        )
    check_tokens(token, student.vocabulary)
    check_tokens(teacher_token, teacher.vocabulary)
    with torch.autocast(token.device.type, enabled=False):
        if student.head is None or teacher.head is None:
            return _dense(student, teacher, token, teacher_token, partner, weights)
        rows, head = student.rows, student.head
        head_learns = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
        learns = torch.is_grad_enabled() and (rows.requires_grad or head_learns)
        size = plan(
            len(token), HELD * (student.vocabulary + teacher.vocabulary), rows.device,
            learns=learns, head_learns=head_learns, local=True, chunk_size=chunk_size,
        ).chunk_size  # fmt: skip
        given = (head, weights, teacher, token, teacher_token, partner, size)
        if learns:
            table, loss = _Local.apply(rows, head.weight, head.bias, *given)
        else:
            table = _walk(rows, head, None, *given[1:])
            loss = weights.loss(table[0], table[1]).sum()
    found, logps, taught = table.unbind()
    return Scores(logps, loss=loss, teacher=Comparison(found, logps=taught))


def _dense(
    student: Predictions,
    teacher: Predictions,
    token: Tensor,
    teacher_token: Tensor,
    partner: Tensor,
    weights: Divergence,
) -> Scores:
    """For a model that must run its own head: [N, V] of both, and autograd."""
    dtype = torch.promote_types(student.rows.dtype, torch.float32)
    has, place = partner >= 0, partner.clamp(min=0)
    s, t = student.logits(dtype), teacher.logits(dtype).detach()[place]
    logps = s.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    taught = t.log_softmax(-1).gather(1, teacher_token[place, None]).squeeze(1)
    found = uld_loss(s, t, weights.temperature, reduction="none", mask=has)
    loss = weights.loss(found, logps).sum()
    return Scores(logps.detach(), loss=loss, teacher=Comparison(found.detach(), logps=torch.where(has, taught, 0.0)))


class _Local(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, head: Head, weights: Divergence, *given: Any
    ) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(rows, head, _operands(rows, head), ctx.needs_input_grad)
        table = _walk(rows, head, gradients, weights, *given)
        ctx.save_for_backward(*gradients.results())
        ctx.mark_non_differentiable(table)
        return table, weights.loss(table[0], table[1]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx.saved_tensors, grads[1]), *[None] * 7


def _walk(
    rows: Tensor,
    head: Head,
    gradients: _Gradients | None,
    weights: Divergence,
    teacher: Predictions,
    token: Tensor,
    teacher_token: Tensor,
    partner: Tensor,
    size: int,
) -> Tensor:
    """[3, N]: sorted difference, log-probs of the token and of the partner's; adds to ``gradients``."""
    assert teacher.head is not None
    op, their = _operands(rows, head), _operands(teacher.rows, teacher.head)
    as_many = teacher.rows[:1].expand(len(rows), -1)  # a row of the teacher's for each of the student's
    scratch, their_scratch = _scratch(rows, size, op), _scratch(as_many, size, their)
    table = rows.new_empty(3, len(rows), dtype=op.result)
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        has, place = partner[chunk] >= 0, partner[chunk].clamp(min=0)
        with torch.no_grad():
            log_q, slope = _log_softmax(rows[chunk], head, op, scratch)
            log_p = _log_softmax(teacher.rows[place], teacher.head, their, their_scratch)[0].to(op.result)
            table[1, chunk] = log_q.gather(1, token[chunk, None]).squeeze(1)
            table[2, chunk] = torch.where(has, log_p.gather(1, teacher_token[place, None]).squeeze(1), 0.0)
        with torch.set_grad_enabled(gradients is not None):
            logits = log_q.detach().requires_grad_(gradients is not None)  # but for a constant, which changes nothing
            found = uld_loss(logits, log_p, weights.temperature, reduction="none", mask=has)
            pull = torch.autograd.grad(found.sum(), logits)[0] if gradients is not None else None
        table[0, chunk] = found.detach()
        if gradients is not None and pull is not None:
            pull.mul_(weights.distillation_weight)
            if weights.crossentropy_weight:
                hard = log_q.new_full((len(log_q),), -weights.crossentropy_weight)
                pull.add_(_grad_logits(log_q, token[chunk], hard, None, log_q))
            gradients.add(chunk, pull, slope)
    return table
