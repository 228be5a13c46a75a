"""Matrix products: how many a step takes, how fast this machine does them, and what share of that was reached."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from rlhf.kernels.matmul import product

_aten = torch.ops.aten
# Torch's formulas, and what they lack: the head adds up its weight's gradient in place; attention on a CPU.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.addmm_: flop_registry[_aten.addmm],
    torch.ops.mkldnn._linear_pointwise: lambda x, *args, out_val, **kwargs: 2 * x.shape[-1] * out_val.numel(),
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *args, **kwargs: (
        sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
    ),
}


class FlopCounter(TorchDispatchMode):
    """Operations of the matrix products and attention within, inside autograd functions and backward passes too.

    A product of [m, k] and [k, n] is 2 m k n; attention counts whole squares, though a causal one skips half.
    (Not ``FlopCounterMode``: it takes composite operations apart, which moves the last bit of a result.)
    """

    supports_higher_order_operators = True  # flex attention is one
    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = _FORMULAS.get(getattr(func, "overloadpacket", func))
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def product_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations in a second of the fastest square product of ``dtype``; spends ``seconds`` on each of three sizes.

    The random numbers are its own, so that a run does not depend on whether it was measured.
    """
    sizes = (512, 1024, 2048) if device.type == "cpu" else (2048, 4096, 8192)
    generator = torch.Generator(device).manual_seed(0)
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            product(a, b)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def figures(
    seconds: dict[str, float], steps: int, tokens: int, flops: float, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What ``profile.json`` holds, for the mean step.

    Args:
        seconds: in each phase, of all steps. tokens: of all steps, as the transformer reads them: padding included,
            a shared prompt once. flops: of all steps.
    """
    total = sum(seconds.values())
    peak = product_peak(device, dtype)
    return {
        "steps": steps,
        "step_seconds": total / steps,
        "seconds": {phase: spent / steps for phase, spent in seconds.items()},
        "tokens": tokens / steps,
        "tokens_per_second": tokens / total,
        "flops": flops / steps,
        "flops_per_second": flops / total,
        "peak_flops_per_second": peak,
        "share_of_peak": flops / total / peak,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
    }


def table(found: dict[str, Any]) -> str:
    """The same figures as lines of text."""
    step = found["step_seconds"]
    rows = [*((phase, spent) for phase, spent in found["seconds"].items() if spent), ("step", step)]
    lines = [f"profile of the mean of {found['steps']} steps, {found['tokens']:.0f} tokens each:"]
    lines += [f"  {phase:<14}{1000 * spent:>10.1f} ms{100 * spent / step:>7.1f} %" for phase, spent in rows]
    peak = f"{found['peak_flops_per_second'] / 1e12:.3g} TFLOP/s ({found['dtype']} products on {found['device']})"
    lines.append(f"  {found['tokens_per_second']:.0f} tokens/s, {found['flops_per_second'] / 1e12:.3g} TFLOP/s")
    lines.append(f"  {100 * found['share_of_peak']:.1f} % of this machine's {peak}")
    return "\n".join(lines)
