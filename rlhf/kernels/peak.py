"""The speed of the largest products of matrices that a device does: what a training step is compared with."""

import time

import torch

from rlhf.kernels.matmul import product

SIZE_ON_GPU, SIZE_ON_CPU = 8192, 1024
RUNS = 5


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Time a product of two square matrices, 8192 wide on a GPU and 1024 on a CPU.

    Args:
        device: where.
        dtype: of the matrices.
    Returns:
        FLOPs in a second, of the fastest of a few runs.
    """
    size = SIZE_ON_CPU if device.type == "cpu" else SIZE_ON_GPU
    # A generator of its own: the run's random numbers stay as they are. Zeros would be multiplied at less power.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(RUNS + 1):  # the first one chooses a kernel
        _wait(device)
        start = time.perf_counter()
        product(left, right)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
