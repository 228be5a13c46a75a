"""A student beside a teacher of another vocabulary: their sorted probabilities, from hidden states and two heads."""

import torch
from torch import Tensor

from rlhf.logprobs.chunks import Step, Walk, check_tokens, learning, plan, sum_over_chunks
from rlhf.logprobs.divergence import Divergence, Predictions
from rlhf.logprobs.score import Comparison, Scores, _grad_logits
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
        learns, head_learns = learning(rows, head)
        size = plan(
            len(token), HELD * (student.vocabulary + teacher.vocabulary), rows.device,
            learns=learns, head_learns=head_learns, local=True, chunk_size=chunk_size,
        ).chunk_size  # fmt: skip
        has, place = partner >= 0, partner.clamp(min=0)
        beside = Walk(teacher.rows[place], teacher.head, size)
        step = _step(beside, has, token, teacher_token[place], weights, learns)
        table, loss = sum_over_chunks(rows, head, size, step, learns)
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


def _step(teacher: Walk, has: Tensor, token: Tensor, teacher_token: Tensor, weights: Divergence, learns: bool) -> Step:
    """Finds [3, c]: sorted difference, log-probs of the token under the student and of the partner's."""
    soft, hard = weights.distillation_weight, weights.crossentropy_weight

    def step(chunk: slice, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = teacher.log_probs(chunk)[0].to(log_q.dtype)
        own = log_q.gather(1, token[chunk, None]).squeeze(1)
        taught = torch.where(has[chunk], log_p.gather(1, teacher_token[chunk, None]).squeeze(1), 0.0)
        with torch.set_grad_enabled(learns):
            logits = log_q.detach().requires_grad_(learns)  # but for a constant, which changes nothing
            value = uld_loss(logits, log_p, weights.temperature, reduction="none", mask=has[chunk])
            dz = torch.autograd.grad(value.sum(), logits)[0].mul_(soft) if learns else log_q
        found = torch.stack([value.detach(), own, taught])
        if learns and hard:
            dz.add_(_grad_logits(log_q, token[chunk], torch.full_like(own, -hard), None, log_q))
        return found, weights.loss(found[0], own).sum(), dz

    return step
