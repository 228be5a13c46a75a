"""A student compared with its teacher on a GPU: divergences and their gradient from two products, by Triton kernels.

One kernel reads both matrices once for the numbers of each token; one reads both once more and writes the gradient.
Torch's chain of operators makes about fifteen passes over matrices of that size.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the types of a kernel's arguments from what it is called with.

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.kernels.token_scores import WARPS, LogitTransform, TokenScores, block_size, readable_columns, score_tokens

try:
    import triton
    import triton.language as tl

    from rlhf.kernels.token_scores import before_softcap, softcap_slope, with_softcap
except ImportError:  # as there
    triton = None  # type: ignore[assignment,unused-ignore]

FORWARD_KL, REVERSE_KL, GENERALIZED_JSD = 0, 1, 2
# As in :mod:`rlhf.kernels.token_scores`.
NUMBERS_OF_ROWS = (
    "Q_HIGHEST", "Q_LOG_TOTAL", "Q_TEMPERED_TOTAL", "P_HIGHEST", "P_LOG_TOTAL", "P_TEMPERED_TOTAL", "NUMBERS",
    "MEAN_GRAD", "TOKEN", "GRAD_AT_LABEL",
)  # fmt: skip


class Side(NamedTuple):
    """The predictions of student or teacher.

    Args:
        product: [c, V], of rows and weight.
        transform: from the product to the logits.
        scores: at temperature 1.
        tempered: at the temperature of the divergence.
    """

    product: Tensor
    transform: LogitTransform
    scores: TokenScores
    tempered: TokenScores


class TokenDivergences(NamedTuple):
    """Numbers of each token, float32 [c].

    Args:
        divergence: D, at its temperature.
        mean_grad: the sum of q g over the vocabulary, which the gradient reads again.
        kl: KL(teacher, student) at temperature 1.
        agrees: 1 where the teacher's most likely token is the student's too, else 0.
    """

    divergence: Tensor
    mean_grad: Tensor
    kl: Tensor
    agrees: Tensor


def side(product: Tensor, transform: LogitTransform, token: Tensor, temperature: float) -> Side:
    """The scores of one side, at temperature 1 and at another.

    Args:
        product: [c, V], float32 or half precision.
        transform: from the product to the logits.
        token: int64 [c].
        temperature: of the divergence.
    Returns:
        The predictions with their scores.
    """
    scores = tempered = score_tokens(product, token, transform, entropy=False)
    if temperature != 1:
        at_temperature = transform._replace(temperature=transform.temperature * temperature)
        tempered = score_tokens(product, token, at_temperature, entropy=False)
    return Side(product, transform, scores, tempered)


def compare_tokens(student: Side, teacher: Side, beta: float, temperature: float) -> TokenDivergences:
    """The divergence of each token, in one pass over both products.

    Args:
        student: its predictions, q.
        teacher: its predictions, p.
        beta: 0 for KL(p, q), 1 for KL(q, p), between them the generalised JSD.
        temperature: of the divergence.
    Returns:
        The numbers of each token.
    """
    rows, vocabulary = student.product.shape
    numbers = torch.empty(4, rows, dtype=torch.float32, device=student.product.device)
    if rows:
        with torch.cuda.device_of(student.product):
            _compare_kernel[(rows,)](
                *_arguments(student, teacher, beta, temperature),
                numbers,
                rows,
                vocabulary,
                **_constants(student, teacher, beta, vocabulary),
            )
    return TokenDivergences(*numbers)


def write_divergence_gradient(
    student: Side,
    teacher: Side,
    token: Tensor,
    divergences: TokenDivergences,
    beta: float,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    out: Tensor,
) -> None:
    """Write the gradient of a weighted sum of divergences and of the labels' loss.

    With respect to the student's logits before the soft-cap, times their temperature, as
    :func:`rlhf.kernels.token_scores.write_gradient`.

    Args:
        student: as in :func:`compare_tokens`.
        teacher: as in :func:`compare_tokens`.
        token: int64 [c], the labels.
        divergences: of :func:`compare_tokens`.
        beta: as in :func:`compare_tokens`.
        temperature: as in :func:`compare_tokens`.
        soft_weight: of the divergences, over their temperature.
        hard_weight: of the labels' loss, - log q.
        out: [c, V], memory for the result, in its precision; may be the student's product.
    """
    rows, vocabulary = student.product.shape
    if not rows:
        return
    constants = _constants(student, teacher, beta, vocabulary)
    # q - 1 as expm1(log q), formed before any downcast: exact for confident tokens.
    grad_at_label = hard_weight * student.scores.logps.expm1()
    with torch.cuda.device_of(student.product):
        _divergence_gradient_kernel[(rows, triton.cdiv(vocabulary, constants["BLOCK"]))](
            *_arguments(student, teacher, beta, temperature),
            divergences.mean_grad,
            token.contiguous(),
            grad_at_label,
            out,
            vocabulary,
            readable_columns(out),
            out.stride(0),
            soft_weight,
            hard_weight,
            **constants,
        )


def _arguments(student: Side, teacher: Side, beta: float, temperature: float) -> list[object]:
    arguments: list[object] = []
    for predictions in (student, teacher):
        transform = predictions.transform
        arguments += [
            predictions.product,
            transform.bias,
            predictions.scores.highest,
            predictions.scores.log_total,
            predictions.tempered.log_total,
            readable_columns(predictions.product, transform.bias),
            predictions.product.stride(0),
            transform.scale,
            transform.softcap or 1.0,
            1 / transform.temperature,
        ]
    return [*arguments, 1 / temperature, beta]


def _constants(student: Side, teacher: Side, beta: float, vocabulary: int) -> dict[str, int]:
    kind = GENERALIZED_JSD
    if beta in (0, 1):
        kind = REVERSE_KL if beta else FORWARD_KL
    return {
        "KIND": kind,
        "Q_HAS_BIAS": student.transform.bias is not None,
        "Q_HAS_SOFTCAP": student.transform.softcap is not None,
        "P_HAS_BIAS": teacher.transform.bias is not None,
        "P_HAS_SOFTCAP": teacher.transform.softcap is not None,
        "BLOCK": block_size(vocabulary, matrices=2),
        "num_warps": WARPS,
    }


# Names in capitals are pointers, or constants that a kernel is compiled for. q is the student's, p the teacher's.
if triton is not None:

    @triton.jit
    def _logits_below_highest(
        PRODUCT, BIAS, HIGHEST, row, column, vocabulary, readable, row_stride, scale, softcap, inverse_temperature,
        HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ):  # fmt: skip
        """A block of a row's logits minus the largest of the row; -inf outside of the vocabulary."""
        is_readable = column < readable
        logits = tl.load(PRODUCT + row * row_stride + column, mask=is_readable, other=0.0).to(tl.float32)
        logits = before_softcap(logits, BIAS, column, is_readable, scale, HAS_BIAS)
        if HAS_SOFTCAP:
            logits = with_softcap(logits, softcap)
        logits = logits * inverse_temperature - tl.load(HIGHEST + row)
        return tl.where(column < vocabulary, logits, -float("inf"))

    @triton.jit
    def _times(probs, factor):
        """Their product, 0 where the probability is: the factor may be infinite there."""
        return tl.where(probs == 0, 0.0, probs * factor)

    @triton.jit
    def _terms(log_q, log_p, beta, KIND: tl.constexpr):
        """The share of each entry in the divergence, and q g."""
        q = tl.exp(log_q)
        p = tl.exp(log_p)
        if KIND == 0:
            value = _times(p, log_p - log_q)
            q_times_grad = -p
        elif KIND == 1:
            value = _times(q, log_q - log_p)
            q_times_grad = value
        else:
            # Ratios beyond it change nothing in float32, whose exp overflows at 88.
            log_ratio = tl.where((q == 0) & (p == 0), 0.0, tl.minimum(log_p - log_q, 80.0))
            log_m_over_q = tl.log(1.0 + beta * (tl.exp(log_ratio) - 1.0))
            mixture = beta * p + (1.0 - beta) * q
            value = beta * _times(p, log_ratio) - _times(mixture, log_m_over_q)
            q_times_grad = (beta - 1.0) * _times(q, log_m_over_q)
        return value, q_times_grad

    @triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=NUMBERS_OF_ROWS)
    def _compare_kernel(
        Q, Q_BIAS, Q_HIGHEST, Q_LOG_TOTAL, Q_TEMPERED_TOTAL, q_readable, q_stride, q_scale, q_softcap, q_inverse,
        P, P_BIAS, P_HIGHEST, P_LOG_TOTAL, P_TEMPERED_TOTAL, p_readable, p_stride, p_scale, p_softcap, p_inverse,
        inverse_temperature, beta, NUMBERS, rows, vocabulary,
        KIND: tl.constexpr, Q_HAS_BIAS: tl.constexpr, Q_HAS_SOFTCAP: tl.constexpr, P_HAS_BIAS: tl.constexpr,
        P_HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A program reads one row of both."""
        row = tl.program_id(0).to(tl.int64)
        divergence = 0.0
        mean_grad = 0.0
        kl = 0.0
        q_highest = -float("inf")
        p_highest = -float("inf")
        q_at_highest = -float("inf")  # the student's logit at the teacher's most likely token
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            q_logits = _logits_below_highest(
                Q, Q_BIAS, Q_HIGHEST, row, column, vocabulary, q_readable, q_stride, q_scale, q_softcap, q_inverse,
                Q_HAS_BIAS, Q_HAS_SOFTCAP,
            )  # fmt: skip
            p_logits = _logits_below_highest(
                P, P_BIAS, P_HIGHEST, row, column, vocabulary, p_readable, p_stride, p_scale, p_softcap, p_inverse,
                P_HAS_BIAS, P_HAS_SOFTCAP,
            )  # fmt: skip
            log_p = p_logits - tl.load(P_LOG_TOTAL + row)
            log_q = q_logits - tl.load(Q_LOG_TOTAL + row)
            kl += tl.sum(_times(tl.exp(log_p), log_p - log_q), 0)
            tempered_q = q_logits * inverse_temperature - tl.load(Q_TEMPERED_TOTAL + row)
            tempered_p = p_logits * inverse_temperature - tl.load(P_TEMPERED_TOTAL + row)
            values, q_times_grad = _terms(tempered_q, tempered_p, beta, KIND)
            divergence += tl.sum(values, 0)
            mean_grad += tl.sum(q_times_grad, 0)
            q_highest = tl.maximum(q_highest, tl.max(q_logits, 0))
            highest = tl.max(p_logits, 0)
            q_there = tl.max(tl.where(p_logits == highest, q_logits, -float("inf")), 0)
            q_at_highest = tl.where(highest > p_highest, q_there, q_at_highest)
            p_highest = tl.maximum(p_highest, highest)
        if KIND == 0:
            mean_grad = -1.0  # the sum of - p
        tl.store(NUMBERS + row, divergence)
        tl.store(NUMBERS + rows + row, mean_grad)
        tl.store(NUMBERS + 2 * rows + row, kl)
        tl.store(NUMBERS + 3 * rows + row, tl.where(q_at_highest == q_highest, 1.0, 0.0))

    @triton.jit(do_not_specialize_on_alignment=NUMBERS_OF_ROWS)
    def _divergence_gradient_kernel(
        Q, Q_BIAS, Q_HIGHEST, Q_LOG_TOTAL, Q_TEMPERED_TOTAL, q_readable, q_stride, q_scale, q_softcap, q_inverse,
        P, P_BIAS, P_HIGHEST, P_LOG_TOTAL, P_TEMPERED_TOTAL, p_readable, p_stride, p_scale, p_softcap, p_inverse,
        inverse_temperature, beta, MEAN_GRAD, TOKEN, GRAD_AT_LABEL, OUT, vocabulary, writable, out_stride,
        soft_weight, hard_weight,
        KIND: tl.constexpr, Q_HAS_BIAS: tl.constexpr, Q_HAS_SOFTCAP: tl.constexpr, P_HAS_BIAS: tl.constexpr,
        P_HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A program reads one block of both; the result may replace the student's."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        q_logits = _logits_below_highest(
            Q, Q_BIAS, Q_HIGHEST, row, column, vocabulary, q_readable, q_stride, q_scale, q_softcap, q_inverse,
            Q_HAS_BIAS, Q_HAS_SOFTCAP,
        )  # fmt: skip
        p_logits = _logits_below_highest(
            P, P_BIAS, P_HIGHEST, row, column, vocabulary, p_readable, p_stride, p_scale, p_softcap, p_inverse,
            P_HAS_BIAS, P_HAS_SOFTCAP,
        )  # fmt: skip
        tempered_q = q_logits * inverse_temperature - tl.load(Q_TEMPERED_TOTAL + row)
        tempered_p = p_logits * inverse_temperature - tl.load(P_TEMPERED_TOTAL + row)
        _, q_times_grad = _terms(tempered_q, tempered_p, beta, KIND)
        soft_grad = q_times_grad - tl.load(MEAN_GRAD + row) * tl.exp(tempered_q)
        hard_grad = hard_weight * tl.exp(q_logits - tl.load(Q_LOG_TOTAL + row))
        hard_grad = tl.where(column == tl.load(TOKEN + row), tl.load(GRAD_AT_LABEL + row), hard_grad)
        gradient = soft_weight * soft_grad + hard_grad
        if Q_HAS_SOFTCAP:
            is_readable = column < q_readable
            product = tl.load(Q + row * q_stride + column, mask=is_readable, other=0.0).to(tl.float32)
            before = before_softcap(product, Q_BIAS, column, is_readable, q_scale, Q_HAS_BIAS)
            gradient *= softcap_slope(before, q_softcap)
        tl.store(OUT + row * out_stride + column, gradient.to(OUT.dtype.element_ty), mask=column < writable)
