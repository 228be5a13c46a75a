r"""Divergences between two categorical distributions, from logits: distilling a teacher (p) into a student (q).

Every function is called as ``divergence(student_logits, teacher_logits, ...)`` on [..., V] and takes ``temperature``,
``reduction``, ``weight`` and ``mask`` ([...]: a token counts, not a class). ``"mean"`` divides by the tokens that
count: for [B, V] that is torch's ``batchmean``. Values are in nats, at least float32; 0 where the two agree.

A temperature divides both sides' logits, and gradients fall as 1 / T²; ``scale_by_temperature=True`` multiplies by T²
against that. ValueError: shapes differ, a temperature <= 0, or an option out of range.

Where the two have different tokenizers: :func:`uld_loss` compares what needs no vocabulary, and :func:`span_loss` the
probabilities of the same stretches of text (:mod:`rlhf.distillation.alignment` finds them).
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape
from rlhf.losses._classification import cross_entropy_loss
from rlhf.losses._reduction import reducible, upcast

_distributions = reducible("student_logits", "teacher_logits")


def _log_probs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``(log q, log p)``."""
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    check_same_shape(student_logits=student, teacher_logits=teacher)
    if temperature != 1:  # else two passes over the logits for nothing
        student, teacher = student / temperature, teacher / temperature
    return student.log_softmax(-1), teacher.log_softmax(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of log-probs. Where p is 0 its term is 0, whatever q."""
    return F.kl_div(q, p, reduction="none", log_target=True).masked_fill_(p == -math.inf, 0.0).sum(-1)


def _scaled(values: Tensor, temperature: float, scale_by_temperature: bool) -> Tensor:
    return values * temperature**2 if scale_by_temperature else values


@_distributions
def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    reverse: bool = False,
    scale_by_temperature: bool = False,
) -> Tensor:
    r"""Forward KL covers what the teacher does; reverse KL keeps to what it does most.

    .. math:: \mathrm{KL}(p\,\|\,q) = \sum_v p_v\log\frac{p_v}{q_v}, \text{ or } \mathrm{KL}(q\,\|\,p)

    Args:
        reverse: KL(student, teacher) instead of KL(teacher, student).
    Example:
        >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]).log())    # all on one of two: log 2
        tensor(0.6931)

    Source: Kullback and Leibler 1951; temperature arXiv 1503.02531 §2.
    """
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return _scaled(_kl(q, p) if reverse else _kl(p, q), temperature, scale_by_temperature)


@_distributions
def generalized_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    *,
    scale_by_temperature: bool = False,
) -> Tensor:
    r"""Jensen–Shannon with a dial: KL(p, q) as beta → 0 and KL(q, p) as beta → 1, each divided by beta or 1 - beta.

    .. math:: \beta\,\mathrm{KL}(p\,\|\,m) + (1-\beta)\,\mathrm{KL}(q\,\|\,m),\; m = \beta p + (1-\beta) q

    Args:
        beta: in [0, 1]; at 0 and 1 the two limits themselves, KL(p, q) and KL(q, p), as TRL has them.
    Example:
        >>> apart = torch.tensor([[0.0, 200.0]])
        >>> generalized_jsd(apart, -apart)    # nothing in common: log 2
        tensor(0.6931)

    Source: arXiv 2306.13649 eq. 1.
    """
    check_range("beta", beta, 0.0, math.nextafter(1.0, 2.0))
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    if beta in (0, 1):
        values = _kl(p, q) if beta == 0 else _kl(q, p)
    else:
        m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
        values = beta * _kl(p, m) + (1 - beta) * _kl(q, m)
    return _scaled(values, temperature, scale_by_temperature)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, **options: Any) -> Tensor:
    r"""The symmetric divergence, at most log 2; its square root is a distance.

    .. math:: \tfrac12\mathrm{KL}(p\,\|\,m) + \tfrac12\mathrm{KL}(q\,\|\,m),\; m = \tfrac12(p + q)

    Args:
        options: as in :func:`generalized_jsd`.
    Example:
        >>> jensen_shannon(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor(0.)

    Source: Lin 1991.
    """
    return generalized_jsd(student_logits, teacher_logits, 0.5, temperature, **options)


@_distributions
def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float = 0.1,
    temperature: float = 1.0,
    *,
    reverse: bool = False,
    scale_by_temperature: bool = False,
) -> Tensor:
    r"""KL against a mixture, which bounds the gradient where one side has no mass.

    .. math:: \mathrm{KL}(p\,\|\,\alpha p + (1-\alpha) q), \text{ or } \mathrm{KL}(q\,\|\,(1-\alpha) p + \alpha q)

    Args:
        alpha: in [0, 1); 0 is :func:`kl_divergence`. reverse: the second form.
    Example:
        >>> apart = torch.tensor([[0.0, 200.0]])
        >>> skew_kl(apart, -apart, alpha=0.5)
        tensor(0.6931)

    Source: DistiLLM, arXiv 2402.03898.
    """
    check_range("alpha", alpha, 0.0, 1.0)
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    of, other = (q, p) if reverse else (p, q)
    mixture = other if alpha == 0 else torch.logaddexp(of + math.log(alpha), other + math.log1p(-alpha))
    return _scaled(_kl(of, mixture), temperature, scale_by_temperature)


@_distributions
def total_variation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Half the summed difference of probabilities, in [0, 1]: how often the two can be told apart.

    .. math:: \tfrac12\sum_v |p_v - q_v|

    Example:
        >>> apart = torch.tensor([[0.0, 200.0]])
        >>> total_variation(apart, -apart)
        tensor(1.)

    Source: for distillation arXiv 2307.15190.
    """
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return (p.exp() - q.exp()).abs().sum(-1) / 2


@_distributions
def alpha_divergence(
    student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.5, temperature: float = 1.0
) -> Tensor:  # fmt: skip
    r"""Amari's family between the two KLs.

    .. math:: \frac{1 - \sum_v p_v^\alpha q_v^{1-\alpha}}{\alpha(1-\alpha)}

    Args:
        alpha: in [0, 1]; 1 is KL(p, q), 0 is KL(q, p), 0.5 four times the squared Hellinger distance.
    Example:
        >>> apart = torch.tensor([[0.0, 200.0]])
        >>> alpha_divergence(apart, -apart)
        tensor(4.)

    Source: Amari 1985; Minka 2005.
    """
    check_range("alpha", alpha, 0.0, math.nextafter(1.0, 2.0))
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    if alpha in (0, 1):
        return _kl(p, q) if alpha == 1 else _kl(q, p)
    # 1 - sum as -expm1 of its logarithm: exact where the two nearly agree.
    return -torch.expm1((alpha * p + (1 - alpha) * q).logsumexp(-1)) / (alpha * (1 - alpha))


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    divergence.__name__: divergence
    for divergence in (kl_divergence, generalized_jsd, skew_kl, alpha_divergence, total_variation)
}
"""Divergences over the whole vocabulary by name; each takes ``temperature`` and what else its signature names."""


@_distributions
def uld_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""How the two spread their mass, whatever the tokens: for different vocabularies.

    .. math:: \sum_i |p_{(i)} - q_{(i)}|, \text{ each sorted from the largest, the shorter followed by zeros}

    Args:
        student_logits: [..., V]. teacher_logits: [..., W], at places of the same text.
    Returns:
        In [0, 2]. 0 for any two distributions that are permutations of each other: a companion of a loss that knows the
        tokens, not one by itself.
    Example:
        >>> uld_loss(torch.tensor([[0.0, 200.0]]), torch.zeros(1, 4))    # 1 against four quarters
        tensor(1.5000)

    Source: arXiv 2402.12030 §3, without its factor of the hard-label mixture.
    """
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    check_same_shape(student_logits=student_logits[..., 0], teacher_logits=teacher_logits[..., 0])
    q, p = ((x / temperature).softmax(-1).sort(-1, descending=True).values for x in (student_logits, teacher_logits))
    longest = max(q.size(-1), p.size(-1))
    q, p = (F.pad(x, (0, longest - x.size(-1))) for x in (q, p))
    return (p - q).abs().sum(-1)


def span_logps(logps: Tensor, span: Tensor, total: int) -> Tensor:
    r"""Log-probability of each span of text: the sum over its tokens.

    .. math:: L_s = \sum_{n:\,\mathrm{span}(n)=s} \log p_n

    Args:
        logps: [N], nats. span: int64 [N], in [0, total), or -1 for a token of no span.
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
    # What is in no span goes to a place of its own, past the last: no wait for the device, as picking would need.
    return logps.new_zeros(total + 1).index_add(0, torch.where(span < 0, total, span), logps)[:total]


@reducible("student_logps", "teacher_logps")
def span_loss(
    student_logps: Tensor,
    teacher_logps: Tensor,
    temperature: float = 1.0,
    *,
    distance: Literal["kl", "squared"] = "kl",
) -> Tensor:
    r"""Both give the same stretch of text the same probability: for different tokenizers.

    .. math:: P\log\frac{P}{Q} + (1-P)\log\frac{1-P}{1-Q},\; P = e^{L^t/T},\; Q = e^{L^s/T}, \quad
              \text{or } (L^s - L^t)^2/T^2

    Args:
        student_logps, teacher_logps: [S], nats, <= 0: sums over the tokens of each span, from :func:`span_logps`.
        temperature: T > 0; above 1, improbable (long) spans still count in the first form.
        distance: ``"kl"``, between "this text" and "any other"; or ``"squared"``, of the log-probabilities, whose pull
            does not fade where both are improbable.
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
    q, p = student_logps / temperature, teacher_logps / temperature
    if distance == "squared":
        return (q - p) ** 2
    if distance != "kl":
        raise ValueError(f'distance must be "kl" or "squared", got {distance!r}')
    rest_p, rest_q = _log1mexp(p), _log1mexp(q)
    said, unsaid = p.exp() * (p - q), rest_p.exp() * (rest_p - rest_q)
    return torch.where(p == -math.inf, 0.0, said) + unsaid


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0; at 0, where it is infinite, its value one rounding away."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    return torch.where(
        near, torch.where(near, -torch.expm1(x), 1.0).log(), torch.log1p(-torch.where(near, -1.0, x).exp())
    )


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
    r"""The classic mixture of soft and hard labels.

    .. math:: \alpha\,T^2\,\mathrm{KL}(p_T\,\|\,q_T) - (1-\alpha)\log q_y

    Args:
        student_logits, teacher_logits: [..., V], aligned with labels (no shift).
        labels: [...] integer indices; ``ignore_index`` counts in neither part.
        alpha: weight of the soft part, in [0, 1]. temperature: > 0, of the soft part only.
        options: ``reduction``, ``weight``, ``mask``.
    Example:
        >>> distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))    # 0 + 0.5 log 2
        tensor(0.3466)

    Source: arXiv 1503.02531 §2.
    """
    check_range("alpha", alpha, 0.0, math.nextafter(1.0, 2.0))
    scored = labels != ignore_index
    mask = scored if options.get("mask") is None else scored & options["mask"].bool()
    soft = kl_divergence(
        student_logits, teacher_logits, temperature, scale_by_temperature=True, **{**options, "mask": mask}
    )
    hard = cross_entropy_loss(student_logits, labels, ignore_index=ignore_index, **options)
    return alpha * soft + (1 - alpha) * hard
