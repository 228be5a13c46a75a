"""Every loss of the catalogue gives on a GPU what it gives on a CPU. The inputs are its documented example."""

import pytest
import torch
from examples_of_losses import ENTRIES, documented_call, tensors_in

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def moved(value, device, dtype):
    """The same value with its tensors on ``device``; floating ones are leaves of type ``dtype``."""
    if torch.is_tensor(value):
        copy = value.detach().to(device, dtype if value.is_floating_point() else None)
        return copy.requires_grad_(value.is_floating_point())
    if isinstance(value, dict):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    return type(value)(moved(item, device, dtype) for item in value) if isinstance(value, tuple) else value


def value_and_gradients(entry, device, dtype):
    args, options = (moved(part, device, dtype) for part in documented_call(entry))
    results = tensors_in(entry.function(*args, **options))
    assert results
    inputs = [tensor for tensor in tensors_in((args, options)) if tensor.requires_grad]
    differentiable = [result for result in results if result.requires_grad]
    gradients = []
    if differentiable:
        total = sum(result.double().nan_to_num().sum() for result in differentiable)
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    return results, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_loss_on_a_gpu_is_the_cpus(entry, gpu):
    for dtype, tolerance in TOLERANCES.items():
        results, gradients = value_and_gradients(entry, gpu, dtype)
        wanted_results, wanted_gradients = value_and_gradients(entry, "cpu", dtype)
        assert len(gradients) == len(wanted_gradients) and len(results) == len(wanted_results)
        for got, want in zip([*results, *gradients], [*wanted_results, *wanted_gradients], strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got.cpu(), want, rtol=tolerance, atol=tolerance, equal_nan=True)
