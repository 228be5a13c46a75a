"""Float32 products of matrices on a CPU, by the faster of the two libraries that torch brings.

``torch.mm`` asks MKL, which keeps its AVX-512 kernels to the processors of one maker; oneDNN looks at what a processor
can do, and where the two differ its products take half the time.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 2**19  # multiplications: below, starting oneDNN costs more than it saves


@cache
def onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 of another maker than MKL's: read, not timed, so that runs repeat."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    about = Path("/proc/cpuinfo")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not about.exists():
        return False
    x, weight = torch.ones(64, 128), torch.ones(128, 128)
    return "GenuineIntel" not in about.read_text() and torch.equal(_onednn(x, weight), F.linear(x, weight))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` without a gradient: x [..., k], weight [n, k], bias [n]."""
    return _onednn(_dense(x), _dense(weight), bias) if takes(x, weight) else F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` without a gradient: [m, k] and [k, n]; ``out`` is memory that may be used for it."""
    return _onednn(_dense(a), _dense(b.T)) if takes(a, b.T) else torch.mm(a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in place: [m, n], [m, k] and [k, n]."""
    if not takes(a, b.T):
        total.addmm_(a, b)
        return
    rows = max(2**22 // b.size(1), 1)  # 16 MiB at a time: in the cache, and no second matrix of that size
    for start in range(0, a.size(0), rows):
        part = slice(start, start + rows)
        total[part] += _onednn(_dense(a[part]), _dense(b.T))


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes ``x W^T``."""
    float32 = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return float32 and x.numel() * weight.size(0) >= SMALL and onednn_is_faster()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """As it is where rows or columns follow one another in memory, else a copy (an expanded gradient, say)."""
    columns = matrix.dim() == 2 and matrix.stride(0) == 1 and matrix.stride(1) >= matrix.size(0)
    return matrix if columns else matrix.contiguous()
