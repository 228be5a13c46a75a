"""Run every loss on a GPU that is not there, and print what became of each as JSON. Run in a process of its own.

Operators of a FakeTensorMode know types, shapes and devices, but no numbers: tensors of two devices are an error, as on
a real GPU, and so is reading a number, for which the host would have to wait. A torch without CUDA has no guard for its
devices: the library in the first argument registers one that does nothing.
"""

import ctypes
import inspect
import json
import sys

import torch
from examples_of_losses import ENTRIES, documented_call, tensors_in
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from rlhf import losses

WAITS = (DataDependentOutputException, DynamicOutputShapeException)


def on_gpu(value):
    if torch.is_tensor(value):
        return torch.empty(value.shape, dtype=value.dtype, device="cuda:0", requires_grad=value.is_floating_point())
    if isinstance(value, dict):
        return {key: on_gpu(item) for key, item in value.items()}
    return tuple(map(on_gpu, value)) if isinstance(value, tuple) else value


def outcome(function, args, options):
    try:
        with FakeTensorMode(allow_non_fake_inputs=False):
            results = tensors_in(function(*on_gpu(args), **on_gpu(options)))
    except WAITS as error:
        return f"waits: {error}"
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ", ".join(sorted({str(result.device) for result in results}))


def main():
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
    print(json.dumps(found))


if __name__ == "__main__":
    if not torch.backends.cuda.is_built():
        ctypes.CDLL(sys.argv[1])
    main()
