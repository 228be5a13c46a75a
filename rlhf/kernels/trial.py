"""Whether the kernels of a GPU work on this device: each is run once on small matrices, and compared with float64.

Triton compiles for the card, the driver and the C compiler that it finds. Where a kernel cannot be built, or computes
something else, one warning says so, and torch's own operators are used.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from rlhf.kernels.token_divergences import compare_tokens, side, write_divergence_gradient
from rlhf.kernels.token_scores import LogitTransform, empty_rows, has_triton, score_tokens, write_gradient

logger = logging.getLogger(__name__)

# More columns than a block has, and no multiple of the alignment; the softmax of few tokens is not flat.
ROWS, HIDDEN, COLUMNS = 3, 64, 4133
# Relative to the norm: half precision keeps 8 bits, float32 23.
TOLERANCES = {torch.bfloat16: 2**-7, torch.float32: 1e-5}


@cache
def kernels_work(device: torch.device) -> bool:
    """Whether log-probs and gradients by kernels, and the products they read and write, are right on a device.

    Args:
        device: a GPU; a CPU under Triton's interpreter.
    Returns:
        False for torch's own operators.
    """
    return _passes(_differences_of_scores, device, "log-probs")


@cache
def divergence_kernels_work(device: torch.device) -> bool:
    """As :func:`kernels_work`, for a student that is compared with its teacher.

    Args:
        device: as in :func:`kernels_work`.
    Returns:
        False for torch's own operators.
    """
    return _passes(_differences_of_divergences, device, "divergences from a teacher")


def _passes(differences: Callable[[torch.device], list[Tensor]], device: torch.device, what: str) -> bool:
    if not has_triton():
        return False
    try:
        # The trial is no part of the run around it: neither its precision nor its graph.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            largest = float(torch.stack(differences(device)).max())
    except (
        Exception
    ) as error:  # compilers, drivers and versions of Triton fail in many ways; the run needs none of them
        reason = f"{type(error).__name__}: {error}"
        logger.warning("kernels for %s cannot run on %s, so they take longer (%s)", what, device, reason)
        return False
    if largest <= 1:  # False for nan
        return True
    logger.warning("kernels for %s are wrong on %s; torch computes them, which takes longer", what, device)
    return False


def _difference(result: Tensor, expected: Tensor) -> Tensor:
    """The norm of the difference, over what is allowed."""
    error = (result.double() - expected).norm()
    return error / (TOLERANCES[result.dtype] * expected.norm())


def _matrices(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # A generator of its own: the run's random numbers stay as they are.
    generator = torch.Generator().manual_seed(0)
    half = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows = torch.randn(ROWS, HIDDEN, generator=generator).to(device, half)
    weight = (torch.randn(COLUMNS, HIDDEN, generator=generator) / 4).to(device, half)
    bias = torch.randn(COLUMNS, generator=generator).to(device)
    token = torch.tensor([0, COLUMNS - 1, 4096], device=device)
    return rows, weight, bias, token


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """The logits as the head computes them, in memory whose rows are padded."""
    out = empty_rows(len(rows), len(weight), torch.float32, rows.device)
    if rows.dtype == torch.float32:
        return torch.mm(rows, weight.T, out=out)
    return torch.mm(rows, weight.T, out_dtype=torch.float32, out=out)


def _logits(product: Tensor, transform: LogitTransform) -> Tensor:
    logits = transform.scale * product
    if transform.bias is not None:
        logits = logits + transform.bias
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits / transform.temperature


def _transforms(bias: Tensor) -> tuple[LogitTransform, LogitTransform]:
    return LogitTransform(), LogitTransform(bias, 0.7, 5.0, 0.8)


def _differences_of_scores(device: torch.device) -> list[Tensor]:
    rows, weight, bias, token = _matrices(device)
    found = []
    for transform in _transforms(bias):
        has_entropy = transform.bias is not None
        exact_product = (rows.double() @ weight.double().T).requires_grad_()
        with torch.enable_grad():
            log_probs = _logits(exact_product, transform).log_softmax(1)
            logps = log_probs.gather(1, token[:, None]).squeeze(1)
            entropy = -(log_probs.exp() * log_probs).sum(1)
            loss = (logps + 0.5 * entropy).sum() if has_entropy else logps.sum()
        (exact_gradient,) = torch.autograd.grad(loss, exact_product)
        exact_gradient *= transform.temperature / transform.scale
        product = _product(rows, weight)
        scores = score_tokens(product, token, transform, entropy=has_entropy)
        found.append(_difference(scores.logps, logps))
        if scores.entropy is not None:
            found.append(_difference(scores.entropy, entropy))
        gradient = empty_rows(ROWS, COLUMNS, rows.dtype, device)
        ones = torch.ones_like(scores.logps)
        write_gradient(product, token, transform, scores, ones, 0.5 * ones if has_entropy else None, gradient)
        found.append(_difference(gradient, exact_gradient))
        found += _differences_of_products(gradient, rows, weight)
    return found


def _differences_of_products(gradient: Tensor, rows: Tensor, weight: Tensor) -> list[Tensor]:
    """The products that read the gradient, one of them added to float32 memory."""
    exact = gradient.double().T @ rows.double()
    if rows.dtype == torch.float32:
        total = torch.addmm(torch.zeros_like(exact, dtype=torch.float32), gradient.T, rows)
    else:
        total = torch.mm(gradient.T, rows, out_dtype=torch.float32)
        torch.addmm(total, gradient.T, rows, out_dtype=torch.float32, out=total)
        exact = 2 * exact
    of_rows = gradient @ weight
    return [_difference(total, exact), _difference(of_rows, gradient.double() @ weight.double())]


def _differences_of_divergences(device: torch.device) -> list[Tensor]:
    rows, weight, bias, token = _matrices(device)
    plain, capped = _transforms(bias)
    found = []
    for beta, transform in ((0.0, plain), (1.0, plain), (0.4, capped)):
        temperature, soft_weight, hard_weight = 1.5, 0.6, 0.3
        exact_product = (rows.double() @ weight.double().T).requires_grad_()
        teacher_product = exact_product.detach().roll(1, 0)
        with torch.enable_grad():
            logits, teacher_logits = _logits(exact_product, transform), _logits(teacher_product, plain)
            tempered = [(numbers / temperature).log_softmax(1) for numbers in (logits, teacher_logits)]
            divergence = _divergence(tempered[0], tempered[1], beta)
            logps = logits.log_softmax(1).gather(1, token[:, None]).squeeze(1)
            loss = (temperature * soft_weight * divergence - hard_weight * logps).sum()
        (exact_gradient,) = torch.autograd.grad(loss, exact_product)
        exact_gradient *= transform.temperature / transform.scale
        student = side(_product(rows, weight), transform, token, temperature)
        teacher = side(_product(rows.roll(1, 0), weight), plain, token, temperature)
        numbers = compare_tokens(student, teacher, beta, temperature)
        gradient = empty_rows(ROWS, COLUMNS, rows.dtype, device)
        weights = beta, temperature, soft_weight, hard_weight
        write_divergence_gradient(student, teacher, token, numbers, *weights, out=gradient)
        kl = _divergence(logits.log_softmax(1), teacher_logits.log_softmax(1), 0.0)
        pairs = (numbers.divergence, divergence), (numbers.kl, kl), (gradient, exact_gradient)
        found += [_difference(result, expected) for result, expected in pairs]
    return found


def _divergence(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(1)

    if beta in (0, 1):
        return kl(log_q, log_p) if beta else kl(log_p, log_q)
    log_mixture = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_mixture) + (1 - beta) * kl(log_q, log_mixture)
