r"""Divergences between two categorical distributions, from logits: distilling a teacher (p) into a student (q).

Every function is called as ``divergence(student_logits, teacher_logits, ...)`` on [..., V] and takes ``temperature``,
``reduction``, ``weight`` and ``mask`` ([...]: a token counts, not a class). ``"mean"`` divides by the tokens that
count: for [B, V] that is torch's ``batchmean``. Values are in nats, at least float32; 0 where the two agree.

A temperature divides both sides' logits, and gradients fall as 1 / T²; ``scale_by_temperature=True`` multiplies by T²
against that. ValueError: shapes differ, a temperature <= 0, or an option out of range.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape
from rlhf.losses._classification import cross_entropy_loss
from rlhf.losses._reduction import reducible

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
