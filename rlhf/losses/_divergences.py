r"""Divergences between two categorical distributions, from logits: distilling a teacher (p) into a student (q).

Every function is called as ``divergence(student_logits, teacher_logits, ...)`` on [..., V] and takes ``temperature``,
``reduction``, ``weight`` and ``mask`` ([...], one for each token). ``"mean"`` divides by the tokens that
count: for [B, V] that is torch's ``batchmean``. Values are in nats, at least float32; 0 where the two agree.

A temperature divides the logits of both sides, which makes gradients smaller by 1 / T²; ``scale_by_temperature=True``
multiplies by T² to compensate. ValueError: shapes differ, a temperature <= 0, or an option out of range.

For different tokenizers: :func:`uld_loss` compares sorted probabilities, and :func:`span_loss` the probabilities of
the same spans of text (:mod:`rlhf.distillation.alignment` finds them).
"""

import inspect
import math
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape, check_tensors
from rlhf.losses._classification import cross_entropy_loss
from rlhf.losses._reduction import document_options, reducible, upcast
from rlhf.losses.registry import Registry

LOGITS_HELP = {
    "student_logits": "[..., V]; carries gradient.",
    "teacher_logits": "[..., V]; constant.",
    "temperature": "> 0, divides the logits of both sides.",
    "scale_by_temperature": "multiply by the temperature squared, so that gradients keep their size.",
}


def of_logits(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of log-probs as a divergence of logits, with temperature, reduction, weight and mask.

    Args:
        function: ``function(log_q, log_p, ...)``, of the log-probs of student and teacher, [..., V]; returns [...].
    Returns:
        ``divergence(student_logits, teacher_logits, ..., temperature=1.0, *, scale_by_temperature=False, reduction=...,
        weight=None, mask=None)``. Its other parameters are those of the function.
    """
    parameters = list(inspect.signature(function).parameters.values())[2:]
    # Settings may be positional, before the temperature: generalized_jsd(student, teacher, 0.5, 2.0).
    settings = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    switches = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]

    @wraps(function)
    def divergence_of_logits(
        student_logits: Tensor,
        teacher_logits: Tensor,
        temperature: float = 1.0,
        *,
        scale_by_temperature: bool = False,
        **options: Any,
    ) -> Tensor:
        check_range("temperature", temperature, 0.0, math.inf, open_low=True)
        check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
        if temperature != 1:  # a division by 1 would be two passes over the logits
            student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
        # log_softmax keeps tokens whose probability would underflow to 0, and its logarithm to -inf.
        values = function(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), **options)
        # Gradients of the divided logits are smaller by T^2.
        return values * temperature**2 if scale_by_temperature else values

    # The public call: logits in place of log-probs, and the temperature after the settings of the divergence.
    student, teacher, temperature, scale, _ = inspect.signature(
        divergence_of_logits, follow_wrapped=False
    ).parameters.values()
    # reducible, below, binds positional arguments by this signature.
    divergence_of_logits.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [student, teacher, *settings, temperature, *switches, scale], return_annotation=Tensor
    )
    docstring = function.__doc__ or ""
    for name, log_probs in (("student_logits", "log_q"), ("teacher_logits", "log_p")):
        docstring = document_options(docstring, {name: LOGITS_HELP[name]}, instead_of=log_probs)
    divergence_of_logits.__doc__ = document_options(docstring, LOGITS_HELP)
    return reducible("student_logits", "teacher_logits")(divergence_of_logits)


DIVERGENCES: Registry[Callable[..., Tensor]] = Registry("divergence", of_logits)
"""Divergences over the whole vocabulary by name. Filled by :func:`divergence`."""


def divergence(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function of log-probs as a divergence.

    Args:
        name: its key in :data:`DIVERGENCES`, and what ``--divergence`` takes.
    Returns:
        A decorator of ``function(log_q, log_p, ...)``: log-probs of the student and of the teacher, [..., V], to [...].
        It returns the function as a divergence of logits, which also takes ``temperature``, ``scale_by_temperature``,
        ``reduction``, ``weight`` and ``mask``.
    Example:
        >>> @divergence("squared")
        ... def squared(log_q, log_p, power=2.0):
        ...     return ((log_q.exp() - log_p.exp()).abs() ** power).sum(-1)
        >>> squared(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]).log())
        tensor(0.5000)
        >>> del DIVERGENCES["squared"]
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        DIVERGENCES[name] = of_logits(function)
        return DIVERGENCES[name]

    return register


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p, q) of log-probs. Where p is 0 its term is 0, whatever q."""
    # Masked in place, as a copy would be as large as the logits. The backward pass does not read the product.
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).masked_fill_(log_p == -math.inf, 0.0).sum(-1)


@divergence("kl_divergence")
def kl_divergence(log_q: Tensor, log_p: Tensor, *, reverse: bool = False) -> Tensor:
    r"""KL divergence: forward KL covers all modes of the teacher, reverse KL seeks the largest.

    .. math:: \mathrm{KL}(p\,\|\,q) = \sum_v p_v\log\frac{p_v}{q_v}, \text{ or } \mathrm{KL}(q\,\|\,p)

    Args:
        log_q: [..., V], log-probs of the student.
        log_p: [..., V], log-probs of the teacher.
        reverse: KL(student, teacher) instead of KL(teacher, student).
    Returns:
        The divergence at each place, [...], nats, before the reduction.
    Example:
        >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]).log())    # all on one of two: log 2
        tensor(0.6931)

    Source: Kullback and Leibler 1951; temperature arXiv 1503.02531 §2.
    """
    return _kl(log_q, log_p) if reverse else _kl(log_p, log_q)


@divergence("generalized_jsd")
def generalized_jsd(log_q: Tensor, log_p: Tensor, beta: float = 0.5) -> Tensor:
    r"""Generalised Jensen–Shannon divergence; divided by beta or 1 - beta, its limits are the two KL divergences.

    .. math:: \beta\,\mathrm{KL}(p\,\|\,m) + (1-\beta)\,\mathrm{KL}(q\,\|\,m),\; m = \beta p + (1-\beta) q

    Args:
        log_q: [..., V], log-probs of the student.
        log_p: [..., V], log-probs of the teacher.
        beta: in [0, 1]; at 0 and 1 the two limits themselves, KL(p, q) and KL(q, p), as TRL has them.
    Returns:
        The divergence at each place, [...], nats, before the reduction.
    Example:
        >>> apart = torch.tensor([[0.0, 200.0]])
        >>> generalized_jsd(apart, -apart)    # nothing in common: log 2
        tensor(0.6931)

    Source: arXiv 2306.13649 eq. 1.
    """
    check_range("beta", beta, 0.0, math.nextafter(1.0, 2.0))
    return interpolated_kl(log_q, log_p, beta)


def interpolated_kl(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    r"""The generalised Jensen–Shannon divergence of log-probs; at beta 0 and 1 a KL divergence.

    Args:
        log_q: [..., n], log-probs of the student.
        log_p: [..., n], log-probs of the teacher.
        beta: in [0, 1]; 0 is KL(p, q), 1 is KL(q, p).
    Returns:
        [...], nats.
    Example:
        >>> interpolated_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0]).log(), 0.0)
        tensor(0.6931)
    """
    check_tensors(log_q=log_q, log_p=log_p)
    # At the ends the mixture is one of the two sides, and the divergence 0.
    # As in TRL the KLs take its place: the divergence divided by beta or 1 - beta tends to them.
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    # Mixed as logarithms: tokens with a probability below the smallest float stay apart.
    log_mixture = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_mixture) + (1 - beta) * _kl(log_q, log_mixture)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, **options: Any) -> Tensor:
    r"""Jensen–Shannon divergence: symmetric, at most log 2; its square root is a distance.

    .. math:: \tfrac12\mathrm{KL}(p\,\|\,m) + \tfrac12\mathrm{KL}(q\,\|\,m),\; m = \tfrac12(p + q)

    Args:
        student_logits: [..., V]; carries gradient.
        teacher_logits: [..., V]; constant.
        temperature: > 0, divides the logits of both sides.
        options: ``scale_by_temperature``, ``reduction``, ``weight``, ``mask``.
    Returns:
        Scalar, or [...] for ``reduction="none"``, nats.
    Example:
        >>> jensen_shannon(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor(0.)

    Source: Lin 1991.
    """
    return generalized_jsd(student_logits, teacher_logits, 0.5, temperature, **options)


@divergence("skew_kl")
def skew_kl(log_q: Tensor, log_p: Tensor, alpha: float = 0.1, *, reverse: bool = False) -> Tensor:
    r"""KL to a mixture of both distributions, which bounds the gradient where a probability is 0.

    .. math:: \mathrm{KL}(p\,\|\,\alpha p + (1-\alpha) q), \text{ or } \mathrm{KL}(q\,\|\,(1-\alpha) p + \alpha q)

    Args:
        log_q: [..., V], log-probs of the student.
        log_p: [..., V], log-probs of the teacher.
        alpha: in [0, 1), share of the first side in the mixture; 0 is :func:`kl_divergence`.
        reverse: the second form.
    Returns:
        The divergence at each place, [...], nats, before the reduction.
    Example:
        >>> apart = torch.tensor([[0.0, 200.0]])
        >>> skew_kl(apart, -apart, alpha=0.5)
        tensor(0.6931)

    Source: DistiLLM, arXiv 2402.03898.
    """
    check_range("alpha", alpha, 0.0, 1.0)
    first_logps, second_logps = (log_q, log_p) if reverse else (log_p, log_q)
    if alpha == 0:  # log 0 below would give a mixture of -inf
        return _kl(first_logps, second_logps)
    log_mixture = torch.logaddexp(first_logps + math.log(alpha), second_logps + math.log1p(-alpha))
    return _kl(first_logps, log_mixture)


@divergence("alpha_divergence")
def alpha_divergence(log_q: Tensor, log_p: Tensor, alpha: float = 0.5) -> Tensor:
    r"""Amari's alpha divergence, which has both KL divergences as limits.

    .. math:: \frac{1 - \sum_v p_v^\alpha q_v^{1-\alpha}}{\alpha(1-\alpha)}

    Args:
        log_q: [..., V], log-probs of the student.
        log_p: [..., V], log-probs of the teacher.
        alpha: in [0, 1]; 1 is KL(p, q), 0 is KL(q, p), 0.5 four times the squared Hellinger distance.
    Returns:
        The divergence at each place, [...], nats, before the reduction.
    Example:
        >>> apart = torch.tensor([[0.0, 200.0]])
        >>> alpha_divergence(apart, -apart)
        tensor(4.)

    Source: Amari 1985; Minka 2005.
    """
    check_range("alpha", alpha, 0.0, math.nextafter(1.0, 2.0))
    # There the formula is 0 / 0; its limits are the two KLs.
    if alpha in (0, 1):
        return _kl(log_p, log_q) if alpha == 1 else _kl(log_q, log_p)
    log_overlap = (alpha * log_p + (1 - alpha) * log_q).logsumexp(-1)
    # 1 - overlap as -expm1 of its logarithm: exact where the two nearly agree.
    return -torch.expm1(log_overlap) / (alpha * (1 - alpha))


@divergence("total_variation")
def total_variation(log_q: Tensor, log_p: Tensor) -> Tensor:
    r"""Total variation distance: half the summed absolute difference of probabilities, in [0, 1].

    .. math:: \tfrac12\sum_v |p_v - q_v|

    Args:
        log_q: [..., V], log-probs of the student.
        log_p: [..., V], log-probs of the teacher.
    Returns:
        The divergence at each place, [...], a difference of probabilities, before the reduction.
    Example:
        >>> apart = torch.tensor([[0.0, 200.0]])
        >>> total_variation(apart, -apart)
        tensor(1.)

    Source: for distillation arXiv 2307.15190.
    """
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


@reducible("student_logits", "teacher_logits")
def uld_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Compares sorted probabilities (ULD), for models with different vocabularies.

    .. math:: \sum_i |p_{(i)} - q_{(i)}|, \text{ each sorted from the largest, the shorter followed by zeros}

    Args:
        student_logits: [..., V]; carries gradient.
        teacher_logits: [..., W], at places of the same text; constant.
        temperature: > 0, divides the logits of both sides.
    Returns:
        [...], in [0, 2], before the reduction. It is 0 for any two distributions that are permutations of each other,
        so it does not suffice alone: combine it with a loss that knows the tokens.
    Example:
        >>> uld_loss(torch.tensor([[0.0, 200.0]]), torch.zeros(1, 4))    # 1 against four quarters
        tensor(1.5000)

    Source: arXiv 2402.12030 §3, without its factor of the hard-label mixture.
    """
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    # All dimensions must agree but the vocabularies.
    check_same_shape(student_logits=student_logits[..., 0], teacher_logits=teacher_logits[..., 0])
    student_sorted = _sorted_probs(student_logits / temperature)
    teacher_sorted = _sorted_probs(teacher_logits / temperature)
    # The tokens that only the larger vocabulary has are compared with a probability of 0.
    vocabulary = max(student_sorted.size(-1), teacher_sorted.size(-1))
    student_padded = F.pad(student_sorted, (0, vocabulary - student_sorted.size(-1)))
    teacher_padded = F.pad(teacher_sorted, (0, vocabulary - teacher_sorted.size(-1)))
    return (teacher_padded - student_padded).abs().sum(-1)


def _sorted_probs(logits: Tensor) -> Tensor:
    # The gradient flows through the sorted values; the order itself has none.
    return logits.softmax(-1).sort(-1, descending=True).values


def span_logps(logps: Tensor, span: Tensor, total: int) -> Tensor:
    r"""Log-probability of each span of text: the sum over its tokens.

    .. math:: L_s = \sum_{n:\,\mathrm{span}(n)=s} \log p_n

    Args:
        logps: [N], nats.
        span: int64 [N], the span of each token, in [0, total), or -1 for a token of no span.
        total: number of spans.
    Returns:
        [total], at least float32; 0 for a span without a token.
    Raises:
        ValueError: shapes differ.
    Example:
        >>> span_logps(torch.tensor([-1.0, -2.0, -4.0, -8.0]), torch.tensor([0, 0, -1, 1]), 2)
        tensor([-3., -8.])
    """
    check_same_shape(logps=logps, span=span)
    logps = upcast(logps)
    # Tokens of no span are added to a further place, which is dropped. Selecting them would wait for the device.
    span_index = torch.where(span < 0, total, span)
    return logps.new_zeros(total + 1).index_add(0, span_index, logps)[:total]


@reducible("student_logps", "teacher_logps")
def span_loss(
    student_logps: Tensor,
    teacher_logps: Tensor,
    temperature: float = 1.0,
    *,
    distance: Literal["kl", "squared"] = "kl",
) -> Tensor:
    r"""Matches the probabilities of the same spans of text, for models with different tokenizers.

    .. math:: P\log\frac{P}{Q} + (1-P)\log\frac{1-P}{1-Q},\; P = e^{L^t/T},\; Q = e^{L^s/T}, \quad
              \text{or } (L^s - L^t)^2/T^2

    Args:
        student_logps: [S], nats, <= 0: sums over the tokens of each span, from :func:`span_logps`; carries gradient.
        teacher_logps: [S], the same of the teacher; constant.
        temperature: T > 0; above 1, improbable (long) spans still count in the first form.
        distance: ``"kl"``, between "this text" and "any other"; or ``"squared"``, of the log-probabilities, whose
            gradient does not vanish where both are improbable.
    Returns:
        The loss of each span, [S], before the reduction.
    Raises:
        ValueError: shapes differ, a temperature <= 0, or an unknown distance.
    Example:
        >>> span_loss(torch.tensor([0.25]).log(), torch.tensor([0.5]).log())
        tensor(0.1438)

    Source: arXiv 2503.20083 §3 (binarised divergence of chunks, without its debiasing); only the tokenisation at hand
    counts as the text.
    """
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    check_same_shape(student_logps=student_logps, teacher_logps=teacher_logps)
    log_q, log_p = student_logps / temperature, teacher_logps / temperature
    if distance == "squared":
        return (log_q - log_p) ** 2
    if distance != "kl":
        raise ValueError(f'distance must be "kl" or "squared", got {distance!r}')
    # Two outcomes: this text, and any other.
    log_p_other, log_q_other = _log1mexp(log_p), _log1mexp(log_q)
    this_text = log_p.exp() * (log_p - log_q)
    other_text = log_p_other.exp() * (log_p_other - log_q_other)
    # Where p is 0 its term is 0, but 0 * inf would be NaN.
    return torch.where(log_p == -math.inf, 0.0, this_text) + other_text


def _log1mexp(log_prob: Tensor) -> Tensor:
    """``log(1 - exp(log_prob))`` for log-probs <= 0; at 0, where it is infinite, its value one rounding away."""
    log_prob = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    # Near 0, 1 - exp loses digits and expm1 keeps them; far from 0, log1p does.
    near_zero = log_prob > -math.log(2)
    # Each side gets a harmless input where the other is taken: an infinite gradient times 0 would be NaN.
    from_expm1 = torch.where(near_zero, -torch.expm1(log_prob), 1.0).log()
    from_log1p = torch.log1p(-torch.where(near_zero, -1.0, log_prob).exp())
    return torch.where(near_zero, from_expm1, from_log1p)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 0.5,
    temperature: float = 2.0,
    *,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    r"""Knowledge distillation: KL to the teacher's probabilities, mixed with cross-entropy against labels.

    .. math:: \alpha\,T^2\,\mathrm{KL}(p_T\,\|\,q_T) - (1-\alpha)\log q_y

    Args:
        student_logits: [..., V], aligned with labels (no shift); carries gradient.
        teacher_logits: [..., V], aligned with labels; constant.
        labels: [...] integer indices; ``ignore_index`` counts in neither part.
        alpha: weight of the soft part, in [0, 1].
        temperature: > 0, of the soft part only.
        ignore_index: label that is not scored.
        options: ``reduction``, ``weight``, ``mask``.
    Returns:
        Scalar, or [...] for ``reduction="none"``, nats.
    Example:
        >>> distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))    # 0 + 0.5 log 2
        tensor(0.3466)

    Source: arXiv 1503.02531 §2.
    """
    check_range("alpha", alpha, 0.0, math.nextafter(1.0, 2.0))
    is_scored = labels != ignore_index
    # The soft part knows no labels, so what they leave out is masked.
    mask = is_scored if options.get("mask") is None else is_scored & options["mask"].bool()
    # Scaled by T^2, so that alpha means the same mixture at any temperature.
    soft_loss = kl_divergence(
        student_logits, teacher_logits, temperature, scale_by_temperature=True, **{**options, "mask": mask}
    )
    # Hard labels are learned at temperature 1, as in the paper.
    hard_loss = cross_entropy_loss(student_logits, labels, ignore_index=ignore_index, **options)
    return alpha * soft_loss + (1 - alpha) * hard_loss
