r"""A student beside its teacher, token by token, from hidden states and the two heads, in chunks.

With M and M' one product of the student's and of the teacher's head, the loss and its gradients cost 3 M + M' (2 M + M'
under a frozen student head), without gradient M + M'; never more logits than a chunk of each. The loss is a sum over
tokens, so its gradient is taken while a chunk's logits live. With q and p the probabilities of student and teacher at
temperature T, and :math:`g_v = \partial D/\partial q_v` up to a constant,

.. math:: \frac{\partial D}{\partial z_v} = \frac{1}{T}\Big(q_v g_v - q_v\sum_u q_u g_u\Big)

Constants are chosen such that g is exactly 0 where the two agree. The definitions are those of ``rlhf.losses``.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.logprobs.chunks import IN_CACHE, Step, Walk, check_tokens, dot, learning, plan, sum_over_chunks
from rlhf.logprobs.head import Head
from rlhf.logprobs.score import Comparison, Scores
from rlhf.losses import DIVERGENCES

FAR = 80.0  # log-ratios beyond it change nothing in float32, whose exp overflows at 88


class Predictions(NamedTuple):
    """What a model says of each scored token, short of the softmax: rows [N, H] for ``head``; without one, logits."""

    rows: Tensor
    head: Head | None = None

    @property
    def vocabulary(self) -> int:
        return self.rows.size(1) if self.head is None else self.head.weight.size(0)

    def first(self, size: int) -> "Predictions":
        """Of the first ``size`` tokens alone."""
        return Predictions(self.rows[:, :size]) if self.head is None else self._replace(head=self.head.first(size))

    def logits(self, dtype: torch.dtype) -> Tensor:
        """All of them, [N, V]."""
        rows, head = self.rows.to(dtype), self.head
        if head is None:
            return rows
        bias = None if head.bias is None else head.bias.to(dtype)
        return replace(head, weight=head.weight.to(dtype), bias=bias).logits(rows)


@dataclass(frozen=True)
class Divergence:
    r"""The loss of a token: ``distillation_weight`` · D + ``crossentropy_weight`` · (- log q_y).

    Args:
        name: of ``rlhf.losses.DIVERGENCES``.
        temperature: > 0, divides both sides' logits in D alone.
        options: what that function takes besides: ``beta``, ``alpha``, ``reverse``, ``scale_by_temperature``.
        distillation_weight, crossentropy_weight: >= 0.
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
        if self.name not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {self.name!r}")
        taken = inspect.signature(DIVERGENCES[self.name]).parameters
        for option in self.options:
            if option not in taken:
                raise ValueError(f"{self.name} takes no {option}: leave it out, or choose another divergence")
        for weight in ("distillation_weight", "crossentropy_weight"):
            if not getattr(self, weight) >= 0:
                raise ValueError(f"{weight} must be at least 0, got {getattr(self, weight)}")
        self.dense(torch.zeros(1, 1), torch.zeros(1, 1))  # the function itself checks its options

    def dense(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """D of each token by the plain formula, [N], with autograd's gradient."""
        function = DIVERGENCES[self.name]
        return function(
            student_logits, teacher_logits, temperature=self.temperature, reduction="none", **self.options
        )  # fmt: skip

    def of_top_k(self) -> dict[str, Any]:
        """The same as arguments of :func:`rlhf.logprobs.top_k_divergence`.

        Raises:
            ValueError: a divergence that has no estimate.
        """
        betas = {"kl_divergence": float(self.options.get("reverse", False)), "generalized_jsd": 0.5}
        if self.name not in betas:
            raise ValueError(f"{self.name} has no estimate from what is kept of a teacher; {' and '.join(betas)} have")
        return {
            "estimate": self.estimate,
            "beta": self.options.get("beta", betas[self.name]),
            "soft": self.distillation_weight * self.factor,
            "hard": self.crossentropy_weight,
        }

    def loss(self, divergence: Tensor, logps: Tensor) -> Tensor:
        """Of each token, [N]."""
        return self.distillation_weight * divergence - self.crossentropy_weight * logps

    @property
    def factor(self) -> float:
        """On D, for gradients of the same size at any temperature."""
        return self.temperature**2 if self.options.get("scale_by_temperature") else 1.0

    def terms(self) -> Callable[[Tensor, Tensor], "Terms"]:
        """The function of (log q, log p) that gives D and what its gradient is made of."""
        named = inspect.signature(DIVERGENCES[self.name]).parameters
        given: dict[str, Any] = {name: parameter.default for name, parameter in named.items()} | self.options
        match self.name:
            case "total_variation":
                return _total_variation
            case "generalized_jsd":
                beta = given["beta"]
                return {0: _forward_kl, 1: _reverse_kl}.get(beta, partial(_jsd, beta=beta))
            case "alpha_divergence":
                alpha = given["alpha"]
                return {0: _reverse_kl, 1: _forward_kl}.get(alpha, partial(_alpha, alpha=alpha))
        if alpha := given.get("alpha"):
            return partial(_reverse_skew_kl if given["reverse"] else _skew_kl, alpha=alpha)
        return _reverse_kl if given["reverse"] else _forward_kl


@torch.compiler.disable
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
        student: rows and head receive gradients where they require them. teacher: constants, of the same tokens.
        token: int64 [N], the hard labels.
        chunk_size: rows of each model's logits at a time; by default half as many as ``score`` takes.
    Returns:
        Scores whose ``loss`` is the sum over tokens of ``divergence.loss``, with the gradient; ``logps`` and
        ``teacher`` are constants. At least float32, float64 for a float64 student. Where a side has no head, by the
        plain formula from all logits.
    Raises:
        ValueError: numbers of tokens or vocabularies differ, or a token lies outside the vocabulary (checked on CPU).

    Source: arXiv 1503.02531, 2306.13649; the chunking is our own.
    """
    if not len(student.rows) == len(teacher.rows) == len(token):
        raise ValueError(
            f"student, teacher and token must agree, got {len(student.rows)}, {len(teacher.rows)} and {len(token)} rows"
        )
    student, teacher = _same_vocabulary(student, teacher, divergence.vocab_size)
    check_tokens(token, student.vocabulary)
    with torch.autocast(token.device.type, enabled=False):
        if student.head is None or teacher.head is None:
            return _dense(student, teacher, token, divergence)
        rows, head = student.rows, student.head
        learns, head_learns = learning(rows, head)
        # Logits of two models live at a time.
        size = plan(
            len(token), 2 * student.vocabulary, rows.device,
            learns=learns, head_learns=head_learns, local=True, chunk_size=chunk_size,
        ).chunk_size  # fmt: skip
        step = _step(Walk(teacher.rows, teacher.head, size), token, divergence, learns)
        table, loss = sum_over_chunks(rows, head, size, step, learns)
    of, kl, logps, taught, agrees = table.unbind()
    return Scores(logps, loss=loss, teacher=Comparison(of, kl, taught, agrees.bool()))


def _same_vocabulary(
    student: Predictions, teacher: Predictions, size: int | None
) -> tuple[Predictions, Predictions]:  # fmt: skip
    """Both over the same tokens: logits that one side lacks are never made up."""
    sizes = student.vocabulary, teacher.vocabulary
    if size is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"the student's head has {sizes[0]} tokens, the teacher's {sizes[1]}: if they differ by padding alone, "
            "give vocab_size, the number of tokens that both know"
        )
    if size is not None and not 0 < size <= min(sizes):
        raise ValueError(f"vocab_size is {size}, the student's head has {sizes[0]} tokens, the teacher's {sizes[1]}")
    return (student, teacher) if size is None else (student.first(size), teacher.first(size))


def _dense(student: Predictions, teacher: Predictions, token: Tensor, divergence: Divergence) -> Scores:
    """For a model that must run its own head: [N, V] of both, and autograd."""
    dtype = torch.promote_types(student.rows.dtype, torch.float32)
    s, t = student.logits(dtype), teacher.logits(dtype).detach()
    logps, taught = (x.log_softmax(-1).gather(1, token[:, None]).squeeze(1) for x in (s, t))
    values = divergence.dense(s, t)
    kl = DIVERGENCES["kl_divergence"](s.detach(), t, reduction="none")
    agrees = s.detach().argmax(-1) == t.argmax(-1)
    loss = divergence.loss(values, logps).sum()
    return Scores(logps.detach(), loss=loss, teacher=Comparison(values.detach(), kl, taught, agrees))


def _step(teacher: Walk, token: Tensor, divergence: Divergence, learns: bool) -> Step:
    """Finds [5, c]: divergence, KL, log-probs of the token under student and teacher, agreement."""
    terms = divergence.terms()

    def step(chunk: slice, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = teacher.log_probs(chunk)[0].to(log_q.dtype)
        block = max(IN_CACHE // log_q.size(1), 1) if log_q.device.type == "cpu" else max(len(log_q), 1)
        parts = [slice(first, first + block) for first in range(0, max(len(log_q), 1), block)]
        y = token[chunk, None]
        found = torch.cat([_compare(log_q[p], log_p[p], y[p], divergence, terms, learns) for p in parts], 1)
        return found, divergence.loss(found[0], found[2]).sum(), log_q

    return step


class Terms(NamedTuple):
    """Of one divergence, at its temperature: D [c], q [c, V], q g [c, V] and its sum over v, [c, 1] or a number."""

    value: Tensor
    q: Tensor
    pull: Tensor
    mean: Tensor | float


def _compare(
    log_q: Tensor,
    log_p: Tensor,
    token: Tensor,
    divergence: Divergence,
    terms: Callable[[Tensor, Tensor], Terms],
    learns: bool,
) -> Tensor:
    """A block's columns of the table, from log-probs [c, V], which it overwrites: log q by the loss's gradient."""
    own, taught = log_q.gather(1, token), log_p.gather(1, token)
    agrees = log_q.gather(1, log_p.argmax(1, keepdim=True)) == log_q.amax(1, keepdim=True)
    kl = dot(log_p.exp(), log_p - log_q)
    q, p, t = log_q, log_p, divergence.temperature
    if t != 1:
        q, p = ((x / t).log_softmax(1) for x in (q, p))
    found = terms(q, p)
    if learns:
        _write_gradient(log_q, token, own, divergence, found)
    value = found.value * divergence.factor
    return torch.stack([value, kl, own.squeeze(1), taught.squeeze(1), agrees.squeeze(1).to(value.dtype)])


def _write_gradient(out: Tensor, token: Tensor, own: Tensor, divergence: Divergence, found: Terms) -> None:
    """Of the loss with respect to the logits, over the student's log-probs ``out``."""
    hard = divergence.crossentropy_weight
    soft = divergence.distillation_weight * divergence.factor / divergence.temperature
    # q - 1 as expm1(log q), formed before any downcast: exact for confident tokens.
    at_token = soft * (found.pull.gather(1, token) - found.mean * found.q.gather(1, token)) + hard * own.expm1()
    if found.q is out:  # at temperature 1 the hard labels' q is the same
        out.mul_(hard - soft * found.mean).add_(found.pull, alpha=soft)
    else:
        added = found.q.mul_(-soft * found.mean).add_(found.pull, alpha=soft)
        out.exp_().mul_(hard).add_(added)
    if hard:
        out.scatter_(1, token, at_token)


# Each overwrites both of its arguments.


def _forward_kl(log_q: Tensor, log_p: Tensor) -> Terms:
    p = log_p.exp()
    value = dot(p, log_p.sub_(log_q))
    return Terms(value, log_q.exp_(), p.neg_(), -1.0)


def _reverse_kl(log_q: Tensor, log_p: Tensor) -> Terms:
    gap = torch.sub(log_q, log_p, out=log_p)
    q = log_q.exp_()
    pull = gap.mul_(q)
    value = pull.sum(1)
    return Terms(value, q, pull, value[:, None])


def _jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Terms:
    p = log_p.exp()
    ratio = log_p.sub_(log_q).clamp_(max=FAR)
    q = log_q.exp_()
    value = beta * dot(p, ratio)
    r = ratio.expm1_().mul_(beta).log1p_()  # log m - log q
    value -= dot(p.mul_(beta).add_(q, alpha=1 - beta), r)
    pull = r.mul_(q).mul_(beta - 1)
    return Terms(value, q, pull, pull.sum(1, keepdim=True))


def _skew_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Terms:
    p = log_p.exp()
    ratio = torch.sub(log_q, log_p, out=log_p).clamp_(max=FAR)
    q = log_q.exp_()
    r = ratio.expm1_().mul_(1 - alpha).log1p_()  # log m - log p
    value = -dot(p, r)
    pull = r.neg_().expm1_().mul_(q).mul_(alpha - 1)
    return Terms(value, q, pull, pull.sum(1, keepdim=True))


def _reverse_skew_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Terms:
    r = log_p.sub_(log_q).clamp_(max=FAR).expm1_().mul_(1 - alpha).log1p_()  # log m - log q
    q = log_q.exp_()
    value = -dot(q, r)
    pull = r.neg().expm1_().mul_(alpha).add_(r).mul_(q).neg_()
    return Terms(value, q, pull, pull.sum(1, keepdim=True))


def _alpha(log_q: Tensor, log_p: Tensor, alpha: float) -> Terms:
    overlap = log_p.sub_(log_q).mul_(alpha).add_(log_q).exp_()
    q = log_q.exp_()
    one, total = q.sum(1, keepdim=True), overlap.sum(1, keepdim=True)  # the sum of q, with the same rounding
    value = ((one - total) / (alpha * (1 - alpha))).squeeze(1)
    return Terms(value, q, overlap.mul_(-1 / alpha), total / one / -alpha)


def _total_variation(log_q: Tensor, log_p: Tensor) -> Terms:
    q = log_q.exp_()
    gap = log_p.exp_().sub_(q)
    value = gap.abs().sum(1) / 2  # vector_norm adds one after another, as bmm does
    pull = gap.sign_().mul_(q).mul_(-0.5)
    return Terms(value, q, pull, pull.sum(1, keepdim=True))
