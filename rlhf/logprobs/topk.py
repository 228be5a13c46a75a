r"""A teacher of whom a part is kept, and a student's divergence from it: in chunks, never ``[tokens, vocab]``.

The gradient is taken while a chunk's logits live, so it costs 3 products of the student's head, 2 where the head is
frozen, 1 without a gradient; the teacher's costs none. With K the kept tokens, q the student's probabilities,
:math:`g_j` the slopes of the divergence in :math:`\log q_j` of the kept tokens, :math:`g_r` in :math:`\log q_{rest}`
and :math:`G` the sum of them all,

.. math:: \frac{\partial D}{\partial z_v} = [v \in K]\, g_v + [v \notin K]\, \frac{q_v}{q_{rest}} g_r - q_v G

so automatic differentiation sees k + 1 numbers a token, and the vocabulary is passed over twice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rlhf.logprobs.bridge import model_predictions, model_scores
from rlhf.logprobs.chunk_plan import plan_chunks
from rlhf.logprobs.chunk_scores import ChunkPredictions
from rlhf.logprobs.chunks import ChunkedHead, ChunkResult, Step
from rlhf.logprobs.head import Head, Predictions
from rlhf.logprobs.objective import Comparison, HeadObjective, Scores
from rlhf.logprobs.score import score
from rlhf.logprobs.targets import Targets
from rlhf.losses import interpolated_kl, top_k_outcomes

Estimate = Literal["tail", "truncate"]


class TopK(NamedTuple):
    """The part of a teacher's predictions that is kept, one row for each scored token.

    Args:
        ids: int64 [N, k], its most likely tokens, the most likely first.
        logps: [N, k], their log-probs over the whole vocabulary, nats.
        rest: [N], log of the mass of all other tokens; without meaning at k = V.
    """

    ids: Tensor
    logps: Tensor
    rest: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TopK":
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TopK":
        """The same in pinned memory."""
        return self._each(Tensor.pin_memory)

    def rows(self, chunk: slice) -> "TopK":
        """Of some tokens alone."""
        return self._each(lambda tensor: tensor[chunk])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TopK":
        return TopK(change(self.ids), change(self.logps), change(self.rest))


class TopKScores(NamedTuple):
    """``loss`` is a scalar sum and carries the gradient; ``divergence`` and ``logps`` are [N], nats, without one.

    ``logps`` are those of the targets at temperature 1, whatever the divergence's.
    """

    loss: Tensor
    divergence: Tensor
    logps: Tensor


@dataclass(frozen=True)
class TopKDivergence(HeadObjective):
    """The divergence from a teacher's stored tokens, mixed with the loss of hard labels.

    Args:
        teacher: of the same N tokens, in the order of the targets.
        estimate: ``"tail"`` over k + 1 outcomes, the last of them "any other token"; ``"truncate"`` over the k,
            renormalised on both sides.
        beta: 0 is the forward KL(p, q), 1 the reverse KL(q, p), between them the generalised JSD.
        distillation_weight: of the divergence. crossentropy_weight: of the hard labels, scored at temperature 1.
        temperature: > 0, divides the student's logits in the divergence; the one that ``teacher`` was kept at.
        scale_by_temperature: multiply the divergence by T², against the fall of gradients with the temperature.
    Raises:
        ValueError: beta outside [0, 1], or an unknown estimate.
    """

    teacher: TopK
    estimate: Estimate = "tail"
    beta: float = 0.0
    distillation_weight: float = 1.0
    crossentropy_weight: float = 0.0
    temperature: float = 1.0
    scale_by_temperature: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")
        if self.estimate not in ("tail", "truncate"):
            raise ValueError(f'estimate must be "tail" or "truncate", got {self.estimate!r}')

    def check(self, student: Predictions, token: Tensor) -> Predictions:
        ids, vocabulary = self.teacher.ids, student.vocabulary
        if len(ids) != len(token) or not ids.size(1):
            raise ValueError(
                f"{len(token)} tokens are scored, but the teacher's ids are {tuple(ids.shape)}: expected a row for each"
            )
        # On a GPU, looking at the ids would make the host wait.
        if ids.device.type == "cpu" and len(ids):
            lowest, highest = int(ids.min()), int(ids.max())
            if lowest < 0 or highest >= vocabulary:
                wrong_id = lowest if lowest < 0 else highest
                raise ValueError(f"teacher id {wrong_id} is outside the student's vocabulary [0, {vocabulary})")
        return student

    def begin(self, token: Tensor, chunk_size: int, with_grad: bool, entropy: bool) -> Step:
        def step(chunk: slice, predictions: ChunkPredictions) -> ChunkResult:
            log_q = predictions.log_probs()
            logps = log_q.gather(1, token[chunk, None]).squeeze(1)
            divergence, grad_logits = self._divergence(log_q, token[chunk], self.teacher.rows(chunk), with_grad)
            if self.scale_by_temperature:
                divergence = divergence * self.temperature**2
            loss = (self.distillation_weight * divergence - self.crossentropy_weight * logps).sum()
            return ChunkResult(torch.stack([divergence, logps]), loss, grad_logits)

        return step

    def scores(self, per_token: Tensor, loss: Tensor) -> Scores:
        divergence, logps = per_token.unbind()
        return Scores(logps, loss=loss, teacher=Comparison(divergence))

    def _divergence(self, log_q: Tensor, token: Tensor, teacher: TopK, with_grad: bool) -> tuple[Tensor, Tensor]:
        """The divergence [c], and the gradient of the loss with respect to the logits [c, V]; overwrites ``log_q``."""
        temperature, hard_weight, ids = self.temperature, self.crossentropy_weight, teacher.ids
        tempered_log_q = log_q if temperature == 1 else (log_q / temperature).log_softmax(1)
        top_k_log_q = tempered_log_q.gather(1, ids)  # before it is overwritten by the probabilities
        probs = torch.exp(tempered_log_q, out=tempered_log_q)
        rest = None
        if self.estimate == "tail" and ids.size(1) < probs.size(1):
            # Summed over the others alone: 1 minus the kept would be rounding.
            # The lower bound keeps the logarithm of an empty rest, and its slope, finite.
            rest = probs.scatter_(1, ids, 0.0).sum(1).clamp_(min=torch.finfo(probs.dtype).tiny)
        divergences, slopes, slope_of_rest = self._slopes(top_k_log_q, rest, teacher, probs.size(1), with_grad)
        if not with_grad:
            return divergences, probs
        if self.estimate == "truncate":
            # Renormalised probabilities do not see a common factor, so the slopes add up to 0.
            slope_sum = torch.zeros_like(divergences)
        else:
            slope_sum = slopes.sum(1) if slope_of_rest is None else slopes.sum(1) + slope_of_rest
        # At temperature 1 the hard labels have the same q, so one pass over it serves both.
        probs_factor = (hard_weight if temperature == 1 else 0.0) - slope_sum
        if rest is not None and slope_of_rest is not None:
            gradient = probs.mul_((slope_of_rest / rest + probs_factor)[:, None])
            # The kept probabilities were set to 0 for the sum of the rest.
            gradient.scatter_(1, ids, slopes + top_k_log_q.exp() * probs_factor[:, None])
        else:
            # The probabilities of the top k are intact here, so their slopes are added on top.
            gradient = probs.mul_(probs_factor[:, None]).scatter_add_(1, ids, slopes)
        if hard_weight and temperature != 1:
            # The divergence has the q of its temperature; the hard labels need that of temperature 1.
            gradient.add_(log_q.exp_(), alpha=hard_weight)
        if hard_weight:
            gradient.scatter_add_(1, token[:, None], gradient.new_full((1, 1), -hard_weight).expand(len(token), 1))
        return divergences, gradient

    def _slopes(
        self, log_q: Tensor, rest: Tensor | None, teacher: TopK, vocabulary: int, with_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """The divergence [c]; the slopes of the loss in the kept tokens' logits [c, k] and in that of the rest [c]."""
        teacher_logps, teacher_rest = teacher.logps.to(log_q.dtype), teacher.rest.to(log_q.dtype)
        has_tail = self.estimate == "tail"
        with torch.set_grad_enabled(with_grad):
            # New leaves: autograd runs on the k + 1 outcomes of a token, not on the vocabulary.
            log_q = log_q.detach().requires_grad_(with_grad)
            log_rest = None if rest is None else rest.log().requires_grad_(with_grad)
            # Without a tail nobody reads the rest.
            student_outcomes, teacher_outcomes = top_k_outcomes(
                log_q, teacher_rest if log_rest is None else log_rest, teacher_logps, teacher_rest, vocabulary, has_tail
            )
            divergences = interpolated_kl(student_outcomes, teacher_outcomes, self.beta)
            if not with_grad:
                return divergences, log_q, None
            # The chain rule: the logits enter the divergence divided by the temperature.
            weight = self.distillation_weight / self.temperature
            if self.scale_by_temperature:
                weight *= self.temperature**2
            leaves = [log_q] if log_rest is None else [log_q, log_rest]
            slopes = torch.autograd.grad(weight * divergences.sum(), leaves)
        return divergences.detach(), slopes[0], slopes[1] if log_rest is not None else None


def top_k_divergence(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    teacher: TopK,
    *,
    estimate: Estimate = "tail",
    beta: float = 0.0,
    soft: float = 1.0,
    hard: float = 0.0,
    chunk_size: int | None = None,
) -> TopKScores:
    r"""The student's divergence from a teacher's stored tokens, mixed with the loss of hard labels in one pass.

    .. math:: L = \sum_t \left[ s\, D(p_t, q_t) - h \log q_t(y_t) \right]

    Args:
        hidden: [..., H], the student's last hidden states; flattened, ``targets.source`` indexes its rows.
        head: the student's; its temperature is that of the divergence and must be the one that ``teacher`` was kept
            at. The hard labels are scored at temperature 1.
        targets: the N scored tokens.
        teacher: of the same N tokens, in the order of ``targets``.
        estimate: as in :class:`TopKDivergence`.
        beta: as in :class:`TopKDivergence`.
        soft: weight s. Against the fall of gradients with the temperature, it takes a factor T².
        hard: weight h.
        chunk_size: rows of logits at a time, as in :func:`rlhf.logprobs.score`.
    Returns:
        The sum with its gradient, the divergence before its weight, and the log-probs of the targets.
    Raises:
        ValueError: sizes do not fit, an id lies outside the student's vocabulary (checked on CPU), or beta outside
            [0, 1].

    Source: arXiv 2503.16870 for the sparse estimates; the gradient above is our own.
    """
    # The objective divides by the temperature itself, because the hard labels are scored at 1.
    objective = TopKDivergence(teacher, estimate, beta, soft, hard, head.temperature)
    return _top_k_scores(
        score(hidden, replace(head, temperature=1.0), targets, objective=objective, chunk_size=chunk_size)
    )


def model_top_k_divergence(
    model: nn.Module,
    targets: Targets,
    teacher: TopK,
    *,
    temperature: float = 1.0,
    estimate: Estimate = "tail",
    beta: float = 0.0,
    soft: float = 1.0,
    hard: float = 0.0,
    **inputs: Any,
) -> TopKScores:
    """:func:`top_k_divergence` of a causal LM or a PEFT model, with any head.

    Inside DDP, FSDP or ZeRO, call the wrapped policy with :class:`TopKDivergence` instead.

    Args:
        model: the student.
        targets: as in :func:`top_k_divergence`.
        teacher: as in :func:`top_k_divergence`.
        temperature: as in :class:`TopKDivergence`.
        estimate: as in :class:`TopKDivergence`.
        beta: as in :class:`TopKDivergence`.
        soft: as in :func:`top_k_divergence`.
        hard: as in :func:`top_k_divergence`.
        inputs: the arguments of the model's forward.
    Returns:
        As :func:`top_k_divergence`.
    """
    objective = TopKDivergence(teacher, estimate, beta, soft, hard, temperature)
    return _top_k_scores(model_scores(model, targets, objective=objective, **inputs))


def _top_k_scores(scores: Scores) -> TopKScores:
    assert scores.loss is not None and scores.teacher is not None
    return TopKScores(scores.loss, scores.teacher.divergence, scores.logps)


def top_k(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    k: int,
    *,
    chunk_size: int | None = None,
) -> TopK:
    """A teacher's ``k`` most likely tokens at each target, and the mass of the others: one product, no gradient.

    Args:
        hidden: [..., H], the teacher's last hidden states; flattened, ``targets.source`` indexes its rows.
        head: the teacher's; its temperature divides the logits.
        targets: the N scored tokens.
        k: in [1, V].
        chunk_size: rows of logits at a time, as in :func:`rlhf.logprobs.score`.
    Returns:
        The part that is to be kept.
    Raises:
        ValueError: k outside its range.
    """
    rows = hidden.reshape(-1, hidden.size(-1)).index_select(0, targets.source)
    return _top_k(Predictions(rows, head), k, chunk_size)


def model_top_k(
    model: nn.Module,
    targets: Targets,
    k: int,
    *,
    temperature: float = 1.0,
    **inputs: Any,
) -> TopK:
    """:func:`top_k` of a causal LM with any head.

    Args:
        model: the teacher.
        targets: the N scored tokens.
        k: in [1, V].
        temperature: > 0, divides the logits.
        inputs: the arguments of the model's forward.
    Returns:
        The part that is to be kept.
    Raises:
        ValueError: k outside its range.
    """
    with torch.no_grad():
        return _top_k(model_predictions(model, targets, temperature=temperature, **inputs), k)


@torch.no_grad()
def _top_k(teacher: Predictions, k: int, chunk_size: int | None = None) -> TopK:
    vocabulary = teacher.vocabulary
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be in [1, {vocabulary}], the teacher's vocabulary; got {k}")
    device = teacher.rows.device
    plan = plan_chunks(
        len(teacher.rows), vocabulary, device, needs_grad=False, head_needs_grad=False, chunk_size=chunk_size
    )
    chunk_results = []
    # Autocast would round the product of the head to half precision.
    with torch.autocast(device.type, enabled=False):
        chunked_head = ChunkedHead(teacher, plan.chunk_size)
        for chunk in chunked_head.chunks():
            # The slope of a soft-cap is for gradients, and a teacher gets none.
            log_probs, _ = chunked_head.log_probs(chunk)
            logps, ids = log_probs.topk(k, dim=1)
            # The rest is summed over the others: 1 minus the kept would be rounding where they hold nearly all.
            other_probs = log_probs.exp_().scatter_(1, ids, 0.0)
            rest = other_probs.sum(1).clamp_(min=torch.finfo(other_probs.dtype).tiny).log()
            chunk_results.append(TopK(ids, logps, rest))
    ids, logps, rest = (torch.cat(columns) for columns in zip(*chunk_results, strict=True))
    return TopK(ids, logps, rest)
