"""The head alone: exact against float64 in every mode, and its time beside other implementations."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.measuring import Results, Row, Setup, product_tflops, relative_error, time_and_memory
from rlhf.logprobs import Head, Targets, TokenLoss, score

TITLE = "The head: loss and gradients"
TITLE_OF_ACCURACY = "The head against float64"
Shape = tuple[int, int, int]  # tokens, hidden size, vocabulary
Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # (rows, weight, tokens) -> a sum of losses


def _targets(tokens: Tensor) -> Targets:
    count = len(tokens)
    device = tokens.device
    return Targets(torch.arange(count, device=device), tokens, torch.zeros(count, dtype=torch.int64, device=device), 1)


def _loss_of_tokens(rows: Tensor, weight: Tensor, tokens: Tensor, **options: Any) -> Tensor:
    loss = TokenLoss(lambda scores: -scores.logps)
    result = score(rows, Head(weight), _targets(tokens), objective=loss, **options).loss
    assert result is not None
    return result


def _log_probs(rows: Tensor, weight: Tensor, tokens: Tensor, **options: Any) -> Tensor:
    return -score(rows, Head(weight), _targets(tokens), **options).logps.sum()


def _in_float32(rows: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows, weight).float(), tokens, reduction="sum")


def _as_it_is(rows: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows, weight), tokens, reduction="sum")


def _trl(rows: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    module = importlib.import_module("trl.kernels.chunked_logprob")
    return -module.ChunkedLogProbFunction.apply(rows, weight, None, tokens, 1.0, 8192, None, 1.0, ())[0].sum()


def _liger(rows: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    return module.LigerFusedLinearCrossEntropyFunction.apply(rows, weight, tokens, None, None, -100, 0.0, 0.0, "sum")[0]


# (name, products of rows x weight that it needs, step, whether the head learns)
WAYS: list[tuple[str, int, Step, bool]] = [
    ("ours, a loss of tokens (SFT)", 3, _loss_of_tokens, True),
    ("ours, log-probs (DPO)", 4, _log_probs, True),
    ("ours, frozen head", 2, _log_probs, False),
    ("F.linear, .float(), F.cross_entropy", 3, _in_float32, True),
    ("F.linear, F.cross_entropy", 3, _as_it_is, True),
]
OTHERS: list[tuple[str, str, int, Step]] = [
    ("trl", "TRL's chunked log-probs", 4, _trl),
    ("liger_kernel", "Liger's fused linear cross-entropy", 3, _liger),
]


def measure(setup: Setup) -> Results:
    """Time and memory; without gradient, the pass of a reference."""
    results = Results(setup)
    tokens, hidden, vocabulary = (64, 64, 2000) if setup.tiny else (8192, 4096, 128_256)
    shape = tokens, hidden, vocabulary
    for name, products, step, learns in WAYS:
        results.measure({"way": name}, _timed, setup, shape, products, step, learns)
    results.measure({"way": "ours, log-probs without gradient"}, _timed_reference, setup, shape)
    for package, name, products, step in OTHERS:
        # Kernels of Triton run on a GPU alone.
        if setup.on_gpu and importlib.util.find_spec(package) is not None:
            results.measure({"way": name}, _timed, setup, shape, products, step, True)
    return results


def _problem(setup: Setup, shape: Shape, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    count, hidden, vocabulary = shape
    torch.manual_seed(0)
    rows = torch.randn(count, hidden, device=setup.device).to(dtype)
    weight = (torch.randn(vocabulary, hidden, device=setup.device) * scale / hidden**0.5).to(dtype)
    return rows, weight, torch.randint(vocabulary, (count,), device=setup.device)


def _timed(setup: Setup, shape: Shape, products: int, step: Step, learns: bool) -> Row:
    rows, weight, tokens = _problem(setup, shape, torch.bfloat16, 1.0)
    rows.requires_grad_()
    weight.requires_grad_(learns)

    def run() -> None:
        rows.grad = weight.grad = None
        step(rows, weight, tokens).backward()

    return _with_rate(setup, shape, products, time_and_memory(setup, run))


def _timed_reference(setup: Setup, shape: Shape) -> Row:
    inputs = _problem(setup, shape, torch.bfloat16, 1.0)
    with torch.no_grad():
        return _with_rate(setup, shape, 1, time_and_memory(setup, lambda: _log_probs(*inputs)))


def _with_rate(setup: Setup, shape: Shape, products: int, figures: Row) -> Row:
    count, hidden, vocabulary = shape
    tflops = 2 * count * hidden * vocabulary * products / figures["ms"] / 1e9
    share = tflops / product_tflops(setup, torch.bfloat16)
    return {"products": products, **figures, "TFLOP/s": tflops, "of the ceiling": share}


def measure_accuracy(setup: Setup) -> Results:
    """Log-probs and both gradients against float64."""
    results = Results(setup)
    shape = (300, 128, 3001) if setup.tiny else (1500, 1024, 50_257)
    modes = {
        "ours, a loss of tokens": _loss_of_tokens,
        "ours, log-probs computed again": lambda *inputs: _log_probs(*inputs, mode="recompute"),
        "ours, log-probs kept": lambda *inputs: _log_probs(*inputs, mode="save"),
        "F.linear, .float(), F.cross_entropy": _in_float32,
    }
    for dtype in (torch.bfloat16, torch.float32):
        for name, step in modes.items():
            labels = {"weights": str(dtype).removeprefix("torch."), "way": name}
            results.measure(labels, _errors, setup, shape, dtype, step)
    return results


def _errors(setup: Setup, shape: Shape, dtype: torch.dtype, step: Step) -> Row:
    rows, weight, tokens = _problem(setup, shape, dtype, 3.0)
    exact = [tensor.double().requires_grad_() for tensor in (rows, weight)]
    exact_loss = F.cross_entropy(F.linear(*exact), tokens, reduction="sum")
    wanted = torch.autograd.grad(exact_loss, exact)
    inputs = [tensor.requires_grad_() for tensor in (rows, weight)]
    loss = step(*inputs, tokens)
    gradients = torch.autograd.grad(loss, inputs)
    return {
        "loss of a token": abs(float(loss.detach()) - float(exact_loss.detach())) / len(tokens),
        "gradient of rows": relative_error(gradients[0], wanted[0]),
        "gradient of the weight": relative_error(gradients[1], wanted[1]),
    }
