"""Compile FlexAttention for an H100 that is not here, and print the kernels as JSON.

Run in a process of its own. torch's compiler writes Triton kernels for tensors of a FakeTensorMode, and Triton compiles
them to machine code. What they ask of a card is answered from the table of an H100; nothing is launched.
"""

import ctypes
import json
import os
import sys
import tempfile
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._inductor.config
import triton
from fake_gpu import on_gpu
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.fx_passes import fuse_attention, joint_graph, post_grad
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.driver import driver

from benchmarks.gpu.compiled import CARDS, NoDevice
from rlhf.data.segments import Segments, Span
from rlhf.models.attention_flex import attend_by_flex
from rlhf.models.attention_spans import ScoreOptions

H100 = SimpleNamespace(
    gcnArchName="",
    name="H100", multi_processor_count=132, major=9, minor=0, regs_per_multiprocessor=2**16, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 * 2**30,
    shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=227 * 2**10, L2_cache_size=50 * 2**20,
)  # fmt: skip


class Compiled(Exception):
    """The graph is compiled; it cannot be run."""


def stop(*args, **options):
    raise Compiled


def answer(*results):
    """A function that returns the same whatever it is asked."""
    return lambda *args, **options: results[0] if results else None


class Driver(NoDevice):
    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    utils = SimpleNamespace(
        get_device_properties=answer({
            "max_shared_mem": H100.shared_memory_per_block_optin, "multiprocessor_count": 132,
            "max_num_regs": 2**16, "warpSize": 32,
        }),
    )  # fmt: skip


def pretend():
    """Answer what torch and its compiler ask of a card."""
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "get_device_properties": H100, "get_device_capability": (9, 0), "_exchange_device": 0,
        "_maybe_exchange_device": 0, "_lazy_init": None, "synchronize": None, "set_device": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
    }  # fmt: skip
    # A function for each name: the compiler tells them apart.
    for name, result in answers.items():
        setattr(torch.cuda, name, answer(result))
    torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice = answer(0), answer(0)
    for owner in (CudaInterface, CudaInterface.Worker):
        owner.get_device_properties, owner.current_device = staticmethod(answer(H100)), staticmethod(answer(0))
    CudaInterface.is_available = staticmethod(answer(True))
    CudaInterface.get_compute_capability = staticmethod(answer(90))
    CudaInterface.is_triton_capable = CudaInterface.raise_if_triton_unavailable = staticmethod(answer(True))
    scheduler.has_triton = answer(True)
    driver.set_active(Driver(CARDS["H100"], 0))
    triton_helpers.set_driver_to_gpu = answer()
    # A launcher would load the machine code onto the card.
    triton_heuristics.CachingAutotuner._make_launchers = answer()
    # Patterns of attention are found by examples on the card; they change no kernel of ours.
    fuse_attention._sfdp_init = joint_graph.lazy_init = post_grad.lazy_init = answer()
    CompiledFxGraph.__call__ = stop
    settings = torch._inductor.config
    settings.compile_threads, settings.fx_graph_cache, settings.pattern_matcher = 1, False, False
    settings.joint_graph_constant_folding = False


def kernels_of(function):
    """The kernels that a call compiles: name, shared memory, and whether it uses the units for matrices."""
    found = []
    own = triton.compile

    def counted(*args, **options):
        kernel = own(*args, **options)
        has_wgmma = "wgmma.mma_async" in kernel.asm["ptx"]
        found.append({"name": kernel.metadata.name, "shared": kernel.metadata.shared, "wgmma": has_wgmma})
        return kernel

    torch.compiler.reset()
    # Without a gradient: autograd asks torch's own library for a card, which one for CPUs cannot have.
    with patch.object(triton, "compile", counted), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            function()
        except Compiled:
            return found
    raise AssertionError("nothing was compiled")


SPANS = (Span(261), Span(129, 0, 256), Span(40, 0, 3), Span(128), Span(9, 3, 1))
SINKS = torch.zeros(8)
OPTIONS = {
    "plain": ScoreOptions(),
    "soft-cap": ScoreOptions(softcap=30.0),
    "sinks": ScoreOptions(sinks=SINKS),
}


def flex(options):
    own_segments = Segments.of(SPANS)

    def call():
        segments = on_gpu(own_segments)
        query, key, value = (
            torch.empty(1, heads, 567, 64, dtype=torch.bfloat16, device="cuda:0") for heads in (8, 2, 2)
        )
        sinks = None if options.sinks is None else on_gpu(options.sinks)
        attend_by_flex(query, key, value, segments, options._replace(sinks=sinks))

    return call


def main():
    pretend()
    folder = tempfile.TemporaryDirectory()
    # What an earlier run has left there would not be compiled.
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder.name, "TRITON_CACHE_DIR": folder.name}
    cases = {name: flex(options) for name, options in OPTIONS.items()}
    print(json.dumps({name: kernels_of(function) for name, function in cases.items()}))


if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])
    main()
