"""Float32 products of matrices on a CPU, by the faster of the two libraries that torch brings.

``torch.mm`` asks MKL, which keeps its AVX-512 kernels to the processors of one maker. oneDNN asks the processor for its
features. Where the two differ, products by oneDNN take half the time.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 2**19  # multiplications: below, starting oneDNN costs more than it saves
BLOCK_NUMBERS = 2**22  # of a sum of products: 16 MiB, which stay in the cache


@cache
def onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 of another maker than MKL's: read, not timed, so that runs repeat."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    processor_file = Path("/proc/cpuinfo")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not processor_file.exists():
        return False
    if "GenuineIntel" in processor_file.read_text():
        return False
    # The operator is none of torch's public ones: one small product shows that it still does what it did.
    inputs, weight = torch.ones(64, 128), torch.ones(128, 128)
    return torch.equal(_onednn(inputs, weight), F.linear(inputs, weight))


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``inputs @ weight.T + bias`` without a gradient.

    Args:
        inputs: [..., k].
        weight: [n, k].
        bias: [n].
    Returns:
        [..., n].
    """
    if not use_onednn(inputs, weight):
        return F.linear(inputs, weight, bias)
    return _onednn(_dense(inputs), _dense(weight), bias)


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left @ right`` without a gradient.

    Args:
        left: [m, k].
        right: [k, n].
        out: [m, n], memory that may be used for the result.
    Returns:
        [m, n].
    """
    if not use_onednn(left, right.T):
        return torch.mm(left, right, out=out)
    # The operator multiplies by a transpose, as a linear layer does; it cannot write into `out`.
    return _onednn(_dense(left), _dense(right.T))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in place.

    Args:
        total: [m, n].
        left: [m, k].
        right: [k, n].
    """
    if not use_onednn(left, right.T):
        total.addmm_(left, right)
        return
    # oneDNN cannot add to what is there. Some rows at a time need no second matrix of that size.
    rows_per_block = max(BLOCK_NUMBERS // right.size(1), 1)
    for start in range(0, left.size(0), rows_per_block):
        block = slice(start, start + rows_per_block)
        total[block] += _onednn(_dense(left[block]), _dense(right.T))


def use_onednn(inputs: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes ``inputs @ weight.T``: large float32 products on a CPU where it is faster.

    Args:
        inputs: [..., k].
        weight: [n, k].
    Returns:
        True where :func:`product` and the others ask oneDNN.
    """
    is_float32 = inputs.dtype == weight.dtype == torch.float32
    is_on_cpu = inputs.device.type == weight.device.type == "cpu"
    # Inputs [m, k] and a weight [n, k] take m k n multiplications.
    multiplications = inputs.numel() * weight.size(0)
    return is_float32 and is_on_cpu and multiplications >= SMALL and onednn_is_faster()


def _onednn(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # "none" and the two after it: no activation is fused into the product.
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows or columns follow one another in memory, else a copy.

    A gradient that was expanded, say, has strides of 0, which oneDNN does not read.
    """
    is_transposed = matrix.dim() == 2 and matrix.stride(0) == 1 and matrix.stride(1) >= matrix.size(0)
    return matrix if is_transposed else matrix.contiguous()
