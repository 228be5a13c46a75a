"""Run losses and models on a GPU that is not there, and print what was seen as JSON. Run in a process of its own.

Operators of a FakeTensorMode know types, shapes and devices, but no numbers: tensors of two devices are an error, as on
a real GPU, and so is reading a number, for which the host would have to wait. A torch without CUDA has no guard for its
devices: the library in the first argument registers one that does nothing.
"""

import ctypes
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace

import torch
from conftest import tiny_model
from examples_of_losses import ENTRIES, documented_call, tensors_in
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from benchmarks.gpu.compiled import Case, compile_all
from benchmarks.gpu.flow import Operations
from rlhf import losses
from rlhf.data import Collator
from rlhf.models import Policy, attention, use_segments

WAITS = (DataDependentOutputException, DynamicOutputShapeException)


def on_gpu(value):
    if torch.is_tensor(value):
        return torch.empty(value.shape, dtype=value.dtype, device="cuda:0", requires_grad=value.is_floating_point())
    if isinstance(value, Mapping):
        return {key: on_gpu(item) for key, item in value.items()}
    if is_dataclass(value):
        return replace(value, **{field.name: on_gpu(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, tuple):
        items = map(on_gpu, value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def outcome(function, args, options):
    try:
        with FakeTensorMode(allow_non_fake_inputs=False):
            results = tensors_in(function(*on_gpu(args), **on_gpu(options)))
    except WAITS as error:
        return f"waits: {error}"
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ", ".join(sorted({str(result.device) for result in results}))


def outcomes_of_losses():
    found = {}
    for entry in ENTRIES:
        args, options = documented_call(entry)
        if "num_sequences" in inspect.signature(entry.function).parameters:
            options["num_sequences"] = 2  # trainers know it; without it the largest id is looked up
        found[entry.name] = outcome(entry.function, args, options)
        if entry.name in losses.PREFERENCE_LOSSES:
            mask = torch.ones(len(args[0]), dtype=torch.bool)
            found[f"{entry.name} with a mask"] = outcome(entry.function, args, options | {"mask": mask})
    one = (torch.ones(3),)
    found["a wait"] = outcome(lambda values: values[values > 0].sum(), one, {})
    found["two devices"] = outcome(lambda values: values + torch.arange(3), one, {})
    return found


ROWS = {
    "texts": [{"input_ids": [5] * length, "labels": [5] * length} for length in (9, 5, 7)],
    "pairs": [{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12]}] * 2,
}


def move_to_gpu(model):
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = on_gpu(tensor)
                    tensors[name] = torch.nn.Parameter(moved) if tensors is module._parameters else moved.detach()


def operations(rows, dtype, autocast):
    """Kernels and types of products in a forward pass, as the operators reach the device."""
    model = tiny_model().to(dtype)
    assert use_segments(model) is None
    policy = Policy(model)
    batch = Collator(layout="segments")(ROWS[rows])
    policy(batch)  # the head is verified, on the CPU
    with FakeTensorMode(allow_non_fake_inputs=False):
        move_to_gpu(model)
        batch = on_gpu(batch)
        # torch.autocast switches itself off where there is no CUDA.
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", autocast)
        with torch.no_grad(), Operations(vocabulary=330) as seen:
            logps = policy(batch).logps
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    return {
        "device": str(logps.device), "log-probs": str(logps.dtype), "attention": seen.attention, "head": seen.head,
        "layers": seen.layers,
    }  # fmt: skip


def compiled_kernels():
    """A head in half precision, and the two kernels that need most registers; the slow test has the others."""
    plain = Case(128_256, "float32", "bfloat16", "plain")
    full = Case(50_257, "float32", "bfloat16", "full", "JSD")
    return [asdict(kernel) for kernel in compile_all("H100", [plain, full])]


def main():
    # What asks a real device: how much memory is free, and whether a kernel gives the right numbers.
    torch.cuda.mem_get_info = lambda device=None: (2**36, 2**36)
    attention.is_exact = lambda *args: True
    cases = [("texts", torch.float32, True), ("pairs", torch.float32, True)]
    cases += [("texts", torch.bfloat16, False), ("texts", torch.float32, False)]
    flow = {f"{rows}, {str(dtype)[6:]}, autocast {on}": operations(rows, dtype, on) for rows, dtype, on in cases}
    print(json.dumps({"losses": outcomes_of_losses(), "flow": flow, "compiled": compiled_kernels()}))


if __name__ == "__main__":
    if not torch.backends.cuda.is_built():
        ctypes.CDLL(sys.argv[1])
    main()
