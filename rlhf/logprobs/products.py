"""Float32 products of matrices on a CPU, by the faster of the two libraries that torch brings.

``torch.mm`` asks MKL, which keeps its AVX-512 kernels to the processors of one maker; oneDNN looks at what a processor
can do, and where the two differ its products take half the time.
"""

import time
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 2**19  # multiplications: below, starting oneDNN costs more than it saves


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's product beats torch's by a quarter here; measured once a process, in a hundredth of a second."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    x, weight = torch.ones(256, 512), torch.ones(512, 512)
    seconds = {function: [_seconds(function, x, weight) for _ in range(6)] for function in (_onednn, F.linear)}
    agree = torch.allclose(_onednn(x, weight), F.linear(x, weight), rtol=1e-5)
    return agree and 1.25 * min(seconds[_onednn]) < min(seconds[F.linear])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` without a gradient: x [..., k], weight [n, k], bias [n]."""
    return _onednn(_dense(x), _dense(weight), bias) if takes(x, weight) else F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` without a gradient: [m, k] and [k, n]; ``out`` is memory that may be used for it."""
    return _onednn(_dense(a), _dense(b.T)) if takes(a, b.T) else torch.mm(a, b, out=out)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes ``x W^T``."""
    float32 = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return float32 and x.numel() * weight.size(0) >= SMALL and onednn_is_faster()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """As it is where rows or columns follow one another in memory, else a copy (an expanded gradient, say)."""
    columns = matrix.dim() == 2 and matrix.stride() == (1, matrix.size(0))
    return matrix if columns else matrix.contiguous()


def _seconds(function: object, x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    function(x, weight)  # type: ignore[operator]
    return time.perf_counter() - start
