"""A trial of an attention kernel on the device where it is to run: exact, or not used."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.data.segments import Segments, Span
from rlhf.models.attention_kernels import AttentionCall, Kernel
from rlhf.models.attention_spans import ScoreOptions, attend_by_span

logger = logging.getLogger(__name__)

# Behind a prompt of several tokens, a branch that sees a part of it, one of a single token, and a span by itself.
TRIAL_SPANS = (Span(150), Span(70, 0, 100), Span(1, 0, 150), Span(35))
TRIAL_WINDOW = 48
TRIAL_SOFTCAP = 2.0
TOLERANCE = 3e-2  # of a norm, relative: half precision is off by 0.5 % here
Attend = Callable[[Tensor, Tensor, Tensor, Segments, ScoreOptions], Tensor]

_exact: dict[Any, bool] = {}


def is_exact(kernel: Kernel, attend: Attend, call: AttentionCall, query: Tensor, key: Tensor) -> bool:
    """Whether a kernel gives what attention span by span gives, forward and backward; tried once.

    A kernel that fails or differs is reported by a warning. Versions of torch, of drivers and of GPUs differ, and a
    wrong gradient would not show in a loss.

    Args:
        kernel: which one.
        attend: computes it.
        call: what the layer asks for.
        query: of the layer, for its number of heads and its device.
        key: of the layer.
    Returns:
        Whether to use it.
    """
    heads, kv_heads = query.size(1), key.size(1)
    asked = (kernel, attend, call, heads, kv_heads, query.device)
    if asked not in _exact:
        # In a thread of its own, autocast, checkpointing and hooks of the step that is under way do not apply.
        with ThreadPoolExecutor(1) as thread:
            problem = thread.submit(_problem, attend, call, heads, kv_heads, query.device).result()
        _exact[asked] = problem is None
        if problem is not None:
            logger.warning("attention by %s is not used here: %s (exact, slower)", kernel, problem)
    return _exact[asked]


def _problem(attend: Attend, call: AttentionCall, heads: int, kv_heads: int, device: torch.device) -> str | None:
    """Why a kernel cannot be used; None if it agrees with attention span by span."""
    # A generator of its own: the random numbers of the run stay as they are.
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = call.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    num_rows = sum(span.length for span in TRIAL_SPANS)
    inputs = [
        random(1, heads, num_rows, call.head_size),
        random(1, kv_heads, num_rows, call.head_size),
        random(1, kv_heads, num_rows, call.value_size),
    ]
    options = ScoreOptions(
        window=TRIAL_WINDOW if call.has_window else None,
        softcap=TRIAL_SOFTCAP if call.has_softcap else None,
        sinks=random(heads, dtype=torch.float32) if call.has_sinks else None,
    )
    output_gradient = random(1, num_rows, heads, call.value_size)
    segments = Segments.of(TRIAL_SPANS).to(device)

    def results(function: Attend, dtype: torch.dtype) -> list[Tensor]:
        query, key, value = (tensor.to(dtype).detach().requires_grad_() for tensor in inputs)
        output = function(query, key, value, segments, options)
        gradients = torch.autograd.grad(output, (query, key, value), output_gradient.to(dtype))
        return [output.detach(), *gradients]

    try:
        got = results(attend, call.dtype)
    except Exception as error:  # whatever a compiler or a kernel raises, another one is the answer
        message = str(error).splitlines()[0] if str(error) else ""
        return f"{type(error).__name__}: {message}"
    # Float32 has no rounding that would matter here.
    pairs = zip(got, results(partial(attend_by_span, explicit=True), torch.float32), strict=True)
    errors = [float((tensor.float() - expected).norm() / expected.norm()) for tensor, expected in pairs]
    # Not `max`, which may pass over NaN.
    is_close = all(error <= TOLERANCE for error in errors)
    return None if is_close else f"it is off by {', '.join(f'{error:.2g}' for error in errors)} of attention by span"
