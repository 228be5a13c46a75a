"""A student compared with a teacher of another vocabulary: by sorted probabilities, in chunks.

The gradient is autograd's on a chunk, taken while its logits live, as in :mod:`rlhf.logprobs.divergence`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.logprobs.chunk_scores import ChunkPredictions, grad_of_logits
from rlhf.logprobs.chunks import ChunkedHead, ChunkResult, Step, check_tokens
from rlhf.logprobs.divergence import Divergence
from rlhf.logprobs.head import Predictions
from rlhf.logprobs.objective import Comparison, HeadObjective, Scores
from rlhf.logprobs.score import score_predictions
from rlhf.losses import uld_loss

# Numbers of the size of a logit for each token and model, in the sorted comparison: probabilities, their order (int64
# takes two) and the gradient.
SORTED_COPIES = 4


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
        student: N tokens; rows and head receive gradients where they require them.
        teacher: constants, of M tokens of another vocabulary.
        token: int64 [N], the hard labels.
        teacher_token: int64 [M], what follows at the teacher's places.
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
    objective = SortedComparison(teacher, teacher_token, partner, weights)
    return score_predictions(student, token, objective=objective, chunk_size=chunk_size)


@dataclass(frozen=True)
class SortedComparison(HeadObjective):
    """The difference of sorted probabilities, for a teacher of another vocabulary, mixed with the hard labels' loss.

    Args:
        teacher: predictions of M tokens; constants.
        teacher_token: int64 [M].
        partner: int64 [N], the teacher's place beside each of the student's; -1 for none.
        weights: its temperature and its two weights alone.
    """

    teacher: Predictions
    teacher_token: Tensor
    partner: Tensor
    weights: Divergence

    def check(self, student: Predictions, token: Tensor) -> Predictions:
        teacher_rows = len(self.teacher.rows)
        if {len(student.rows), len(self.partner)} != {len(token)} or teacher_rows != len(self.teacher_token):
            raise ValueError(
                f"student, token and partner must agree, got {len(student.rows)}, {len(token)} and "
                f"{len(self.partner)} rows; teacher and teacher_token too, got {teacher_rows} and "
                f"{len(self.teacher_token)}"
            )
        check_tokens(self.teacher_token, self.teacher.vocabulary)
        return student

    def logits_per_token(self, vocabulary: int) -> int:
        return SORTED_COPIES * (vocabulary + self.teacher.vocabulary)

    def begin(self, token: Tensor, chunk_size: int, with_grad: bool, entropy: bool) -> Step:
        weights = self.weights
        # Every student's token gets a row of the teacher, so that both sides have the same chunks; the row of a token
        # without a partner is computed in vain, and masked.
        has_partner, partner_position = self.partner >= 0, self.partner.clamp(min=0)
        teacher = ChunkedHead(self.teacher._replace(rows=self.teacher.rows[partner_position]), chunk_size)
        teacher_token = self.teacher_token[partner_position]

        def step(chunk: slice, predictions: ChunkPredictions) -> ChunkResult:
            log_q = predictions.log_probs()
            log_p = teacher.log_probs(chunk)[0].to(log_q.dtype)
            logps = log_q.gather(1, token[chunk, None]).squeeze(1)
            teacher_logps = log_p.gather(1, teacher_token[chunk, None]).squeeze(1)
            # Without a partner, the log-prob is that of an unrelated token.
            teacher_logps = torch.where(has_partner[chunk], teacher_logps, 0.0)
            grad_logits = log_q
            with torch.set_grad_enabled(with_grad):
                # Log-probs are the logits but for a constant, which changes nothing.
                logits = log_q.detach().requires_grad_(with_grad)
                divergences = uld_loss(logits, log_p, weights.temperature, reduction="none", mask=has_partner[chunk])
                if with_grad:
                    (gradient,) = torch.autograd.grad(divergences.sum(), logits)
                    grad_logits = gradient.mul_(weights.distillation_weight)
            divergences = divergences.detach()
            if with_grad and weights.crossentropy_weight:
                # Last, because it overwrites `log_q`, which the gradient above was computed from.
                slope_of_logps = torch.full_like(logps, -weights.crossentropy_weight)
                grad_logits.add_(grad_of_logits(log_q, token[chunk], slope_of_logps, None, out=log_q))
            loss = weights.loss(divergences, logps).sum()
            return ChunkResult(torch.stack([divergences, logps, teacher_logps]), loss, grad_logits)

        return step

    def scores(self, per_token: Tensor, loss: Tensor) -> Scores:
        divergence, logps, teacher_logps = per_token.unbind()
        return Scores(logps, loss=loss, teacher=Comparison(divergence, logps=teacher_logps))
