"""What is installed, and the two ceilings of the device: products of matrices and copies."""

import importlib.metadata
import inspect

import torch

from benchmarks.gpu.measuring import Results, Setup, product_tflops, time_and_memory

TITLE = "Environment and ceilings"
PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "peft", "trl", "bitsandbytes", "liger_kernel")


def measure(setup: Setup) -> Results:
    results = Results(setup)

    def add(what: str, value: object) -> None:
        results.rows.append({"what": what, "value": value})

    add("device", torch.cuda.get_device_name() if setup.on_gpu else "CPU")
    for package in PACKAGES:
        add(package, _version(package))
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    add("variable-length attention takes", " ".join(parameters))
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        add(f"product of matrices in {name}, TFLOP/s", round(product_tflops(setup, dtype), 3))
    add("copy, read and written, TB/s", round(_copy_rate(setup), 3))
    return results


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _copy_rate(setup: Setup) -> float:
    source = torch.zeros(2**22 if setup.tiny else 2**30, dtype=torch.bfloat16, device=setup.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_and_memory(setup, lambda: target.copy_(source))["ms"] / 1e9
