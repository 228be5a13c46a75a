r"""A student compared with its teacher, token by token, from hidden states and the two heads, in chunks.

With M and M' one product of the student's and of the teacher's head, the loss and its gradients cost 3 M + M' (2 M + M'
under a frozen student head), without gradient M + M'; never more logits than a chunk of each. The loss is a sum over
tokens, so its gradient is taken while a chunk's logits live: by a function of :data:`rlhf.logprobs.fused.FUSED` where
there is one, else by autograd on the chunk.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.kernels.token_divergences import compare_tokens, side, write_divergence_gradient
from rlhf.kernels.trial import divergence_kernels_work
from rlhf.logprobs.chunk_scores import IN_CACHE, ChunkPredictions, FusedChunk, dot
from rlhf.logprobs.chunks import ChunkedHead, ChunkResult, Step
from rlhf.logprobs.fused import FUSED, Fused, interpolation
from rlhf.logprobs.head import Predictions
from rlhf.logprobs.objective import Comparison, HeadObjective, Scores
from rlhf.logprobs.score import score_predictions
from rlhf.logprobs.topk import TopK, TopKDivergence
from rlhf.losses import DIVERGENCES


@dataclass(frozen=True)
class Divergence:
    r"""The loss of a token: ``distillation_weight`` · D + ``crossentropy_weight`` · (- log q_y).

    Args:
        name: of ``rlhf.losses.DIVERGENCES``, or ``file.py:name``.
        temperature: > 0, divides both sides' logits in D alone.
        options: further arguments of that function: ``beta``, ``alpha``, ``reverse``, ``scale_by_temperature``.
        distillation_weight: >= 0.
        crossentropy_weight: >= 0.
        vocab_size: of the tokens that both know, where the two heads are padded to different sizes; probabilities are
            then those among these tokens.
        estimate: of :data:`rlhf.logprobs.topk.Estimate`, where a part of the teacher's predictions was kept.
    Raises:
        ValueError: an unknown name or option, or a value out of range.
    """

    name: str = "generalized_jsd"
    temperature: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    distillation_weight: float = 1.0
    crossentropy_weight: float = 0.0
    vocab_size: int | None = None
    estimate: str = "tail"

    def __post_init__(self) -> None:
        parameters = inspect.signature(DIVERGENCES.find(self.name)).parameters
        for option in self.options:
            if option not in parameters:
                raise ValueError(f"{self.name} takes no {option}: leave it out, or choose another divergence")
        for weight in ("distillation_weight", "crossentropy_weight"):
            if not getattr(self, weight) >= 0:
                raise ValueError(f"{weight} must be at least 0, got {getattr(self, weight)}")
        self.dense(torch.zeros(1, 1), torch.zeros(1, 1))  # the function itself checks its options

    def dense(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """D of each token by the plain formula, with autograd's gradient.

        Args:
            student_logits: [N, V].
            teacher_logits: [N, V].
        Returns:
            [N], before its weight.
        """
        function = DIVERGENCES.find(self.name)
        return function(
            student_logits, teacher_logits, temperature=self.temperature, reduction="none", **self.options
        )  # fmt: skip

    def fused(self) -> Fused | None:
        """The function that gives D and its gradient together; None where autograd has to."""
        function = DIVERGENCES.find(self.name)
        if function not in FUSED:
            return None
        parameters = inspect.signature(function).parameters
        # The fused form has no defaults of its own, so the two cannot come to differ.
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        return FUSED[function](defaults | self.options)

    def against(self, teacher: Predictions) -> "TeacherDivergence":
        """The objective that compares with a teacher's predictions of the same tokens."""
        return TeacherDivergence(teacher, self)

    def from_top_k(self, teacher: TopK) -> TopKDivergence:
        """The objective that compares with the part of a teacher's predictions that was kept.

        Args:
            teacher: the kept part, for the same tokens.
        Returns:
            The objective.
        Raises:
            ValueError: a divergence that has no estimate.
        """
        return TopKDivergence(
            teacher,
            estimate=self.estimate,  # type: ignore[arg-type]  # which the objective checks
            beta=self.top_k_beta(),
            distillation_weight=self.distillation_weight,
            crossentropy_weight=self.crossentropy_weight,
            temperature=self.temperature,
            scale_by_temperature=bool(self.options.get("scale_by_temperature")),
        )

    def top_k_beta(self) -> float:
        """The same divergence as ``beta`` of :class:`rlhf.logprobs.TopKDivergence`.

        Returns:
            0 for the forward KL, 1 for the reverse KL, between them the generalised JSD.

        Raises:
            ValueError: a divergence that has no estimate from a part of the teacher's predictions.
        """
        # The KLs are the limits of the generalised JSD, so one number stands for all three.
        betas = {"kl_divergence": float(self.options.get("reverse", False)), "generalized_jsd": 0.5}
        if self.name not in betas:
            raise ValueError(f"{self.name} has no estimate from what is kept of a teacher; {' and '.join(betas)} have")
        return float(self.options.get("beta", betas[self.name]))

    def loss(self, divergence: Tensor, logps: Tensor) -> Tensor:
        """The loss of each token, [N], from its divergence and the log-prob of its label."""
        return self.distillation_weight * divergence - self.crossentropy_weight * logps

    @property
    def factor(self) -> float:
        """On D, for gradients of the same size at any temperature."""
        return self.temperature**2 if self.options.get("scale_by_temperature") else 1.0


def compare(
    student: Predictions,
    teacher: Predictions,
    token: Tensor,
    divergence: Divergence,
    *,
    chunk_size: int | None = None,
) -> Scores:
    """Score ``token`` under the student, and the student against the teacher.

    Args:
        student: rows and head receive gradients where they require them.
        teacher: constants, of the same tokens.
        token: int64 [N], the hard labels.
        divergence: the divergence, and the weights of the loss.
        chunk_size: rows of each model's logits at a time; by default half as many as ``score`` takes.
    Returns:
        Scores whose ``loss`` is the sum over tokens of ``divergence.loss``, with the gradient; ``logps`` and
        ``teacher`` are constants. At least float32, float64 for a float64 student.
    Raises:
        ValueError: numbers of tokens or vocabularies differ, or a token lies outside the vocabulary (checked on CPU).

    Source: arXiv 1503.02531, 2306.13649; the chunking is our own.
    """
    return score_predictions(student, token, objective=divergence.against(teacher), chunk_size=chunk_size)


@dataclass(frozen=True)
class TeacherDivergence(HeadObjective):
    """The divergence from a teacher's predictions, mixed with the hard labels' loss.

    Args:
        teacher: predictions of the same tokens; constants.
        divergence: the divergence, and the weights of the loss.
    """

    teacher: Predictions
    divergence: Divergence

    def check(self, student: Predictions, token: Tensor) -> Predictions:
        teacher, common_tokens = self.teacher, self.divergence.vocab_size
        if not len(student.rows) == len(teacher.rows) == len(token):
            raise ValueError(
                f"student, teacher and token must agree, got {len(student.rows)}, {len(teacher.rows)} and "
                f"{len(token)} rows"
            )
        if common_tokens is None and student.vocabulary != teacher.vocabulary:
            raise ValueError(
                f"the student's head has {student.vocabulary} tokens, the teacher's {teacher.vocabulary}: if they "
                "differ by padding alone, give vocab_size, the number of tokens that both know"
            )
        if common_tokens is None:
            return student
        if not 0 < common_tokens <= min(student.vocabulary, teacher.vocabulary):
            raise ValueError(
                f"vocab_size is {common_tokens}, the student's head has {student.vocabulary} tokens, the teacher's "
                f"{teacher.vocabulary}"
            )
        # Over the same tokens: logits that one side lacks are never made up.
        return student.first(common_tokens)

    def logits_per_token(self, vocabulary: int) -> int:
        return 2 * vocabulary  # logits of two models live at a time

    def begin(self, token: Tensor, chunk_size: int, with_grad: bool, entropy: bool) -> Step:
        common_tokens = self.divergence.vocab_size
        teacher = ChunkedHead(self.teacher if common_tokens is None else self.teacher.first(common_tokens), chunk_size)
        fused = self.divergence.fused()

        beta = None if fused is None else interpolation(fused)

        def step(chunk: slice, predictions: ChunkPredictions) -> ChunkResult:
            if isinstance(predictions, FusedChunk) and beta is not None and divergence_kernels_work(token.device):
                teacher_chunk = teacher.predictions(chunk)
                if isinstance(teacher_chunk, FusedChunk):
                    return _compare_by_kernels(
                        predictions, teacher_chunk, token[chunk], self.divergence, beta, with_grad
                    )
            log_q = predictions.log_probs()
            # Both sides in the precision of the student, whose gradient this is.
            log_p = teacher.log_probs(chunk)[0].to(log_q.dtype)
            labels = token[chunk, None]
            # Some rows at a time, so that a CPU's passes over them are served by its cache.
            rows_per_block = max(IN_CACHE // log_q.size(1), 1) if log_q.device.type == "cpu" else max(len(log_q), 1)
            starts = range(0, max(len(log_q), 1), rows_per_block)
            columns = []
            for rows in [slice(start, start + rows_per_block) for start in starts]:
                columns.append(_compare(log_q[rows], log_p[rows], labels[rows], self.divergence, fused, with_grad))
            per_token = torch.cat(columns, 1)
            # By now `log_q` holds the gradient, which the blocks wrote over it.
            return ChunkResult(per_token, self.divergence.loss(per_token[0], per_token[2]).sum(), log_q)

        return step

    def scores(self, per_token: Tensor, loss: Tensor) -> Scores:
        divergence, kl, logps, teacher_logps, agrees = per_token.unbind()
        return Scores(logps, loss=loss, teacher=Comparison(divergence, kl, teacher_logps, agrees.bool()))


def _compare_by_kernels(
    student: FusedChunk, teacher: FusedChunk, token: Tensor, divergence: Divergence, beta: float, with_grad: bool
) -> ChunkResult:
    """As :func:`_compare` for a chunk on a GPU."""
    temperature = divergence.temperature
    student_side = side(student.product, student.transform, token, temperature)
    teacher_side = side(teacher.product, teacher.transform, token, temperature)
    numbers = compare_tokens(student_side, teacher_side, beta, temperature)
    gradient = None
    if with_grad:
        gradient = student.gradient_memory()
        # The chain rule: the logits enter D divided by the temperature.
        soft_weight = divergence.distillation_weight * divergence.factor / temperature
        hard_weight = divergence.crossentropy_weight
        weights = beta, temperature, soft_weight, hard_weight
        write_divergence_gradient(student_side, teacher_side, token, numbers, *weights, out=gradient)
    divergences = numbers.divergence * divergence.factor
    logps, teacher_logps = student_side.scores.logps, teacher_side.scores.logps
    per_token = torch.stack([divergences, numbers.kl, logps, teacher_logps, numbers.agrees])
    return ChunkResult(per_token, divergence.loss(divergences, logps).sum(), gradient)


def _compare(
    log_q: Tensor, log_p: Tensor, token: Tensor, divergence: Divergence, fused: Fused | None, with_grad: bool
) -> Tensor:  # fmt: skip
    """A block's numbers [5, c]: divergence, KL, log-probs of the token under student and teacher, agreement.

    ``log_p`` is overwritten; ``log_q`` is too, by the gradient of the loss with respect to the logits.
    """
    logps, teacher_logps = log_q.gather(1, token), log_p.gather(1, token)
    # By value on the student's side: between two equally likely tokens, argmax would choose by the index.
    agrees = log_q.gather(1, log_p.argmax(1, keepdim=True)) == log_q.amax(1, keepdim=True)
    # Reported for every divergence, so that runs can be compared.
    kl = dot(log_p.exp(), log_p - log_q)
    if fused is None:
        divergences = _by_autograd(log_q, log_p, token, logps, divergence, with_grad)
    else:
        divergences = _by_fused(log_q, log_p, token, logps, divergence, fused, with_grad)
    columns = [divergences, kl, logps.squeeze(1), teacher_logps.squeeze(1), agrees.squeeze(1).to(divergences.dtype)]
    return torch.stack(columns)


def _by_autograd(
    log_q: Tensor, log_p: Tensor, token: Tensor, logps: Tensor, divergence: Divergence, with_grad: bool
) -> Tensor:  # fmt: skip
    """The divergence [c]; writes the gradient of the loss over ``log_q``."""
    with torch.set_grad_enabled(with_grad):
        # Log-probs are the logits but for a constant, which changes neither a divergence nor its gradient.
        logits = log_q.detach().requires_grad_(with_grad)
        divergences = divergence.dense(logits, log_p)
        if with_grad:
            (gradient,) = torch.autograd.grad(divergences.sum(), logits)
    if with_grad:
        # Only now may `log_q` be overwritten: autograd read its memory through `logits`.
        soft_weight, hard_weight = divergence.distillation_weight, divergence.crossentropy_weight
        at_token = soft_weight * gradient.gather(1, token) + hard_weight * logps.expm1()
        log_q.exp_().mul_(hard_weight).add_(gradient, alpha=soft_weight)  # q - 1 at the label follows, exactly
        log_q.scatter_(1, token, at_token)
    return divergences.detach()


def _by_fused(
    log_q: Tensor,
    log_p: Tensor,
    token: Tensor,
    logps: Tensor,
    divergence: Divergence,
    fused: Fused,
    with_grad: bool,
) -> Tensor:
    """The divergence [c]; writes the gradient of the loss over ``log_q``."""
    tempered_log_q, tempered_log_p, temperature = log_q, log_p, divergence.temperature
    if temperature != 1:
        # The softmax of log-probs over T is that of logits over T: a constant for each row cancels.
        tempered_log_q, tempered_log_p = ((log_probs / temperature).log_softmax(1) for log_probs in (log_q, log_p))
    terms = fused(tempered_log_q, tempered_log_p)
    if with_grad:
        hard_weight = divergence.crossentropy_weight
        # The chain rule: the logits enter D divided by the temperature.
        soft_weight = divergence.distillation_weight * divergence.factor / temperature
        # q - 1 as expm1(log q), formed before any downcast: exact for confident tokens.
        gradient_at_token = terms.q_times_grad.gather(1, token) - terms.mean_grad * terms.probs.gather(1, token)
        at_token = soft_weight * gradient_at_token + hard_weight * logps.expm1()
        if terms.probs is log_q:  # at temperature 1 the hard labels' q is the same
            log_q.mul_(hard_weight - soft_weight * terms.mean_grad).add_(terms.q_times_grad, alpha=soft_weight)
        else:
            soft_grad = terms.probs.mul_(-soft_weight * terms.mean_grad).add_(terms.q_times_grad, alpha=soft_weight)
            log_q.exp_().mul_(hard_weight).add_(soft_grad)
        if hard_weight:
            log_q.scatter_(1, token, at_token)
    return terms.value * divergence.factor
