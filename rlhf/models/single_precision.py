"""Trials of a model in float32, whatever the precision of its weights.

A trial compares two ways through a model that must give the same numbers. In half precision a real checkpoint does not
tell right from wrong: its layers have attention and activations so sharp that a rounding in the first one changes the
logits of the last by a tenth, or by all of their size.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

logger = logging.getLogger(__name__)

HALF_TYPES = (torch.bfloat16, torch.float16)
TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-2  # of the largest number

Result = TypeVar("Result")


def run_trial(model: nn.Module, trial: Callable[[], Result]) -> Result:
    """Run a trial in float32: half-precision weights are widened one operator at a time, autocast and TF32 are off.

    Where that fails (an operator that knows half precision alone, too little memory), the trial runs as the model is.

    Args:
        model: a transformers model, or PEFT around one. Its weights do not change.
        trial: calls the model.
    Returns:
        What ``trial`` returns.
    """
    try:
        with _in_single_precision(model):
            return trial()
    except Exception as error:
        if not _half_tensors(model):
            raise
        logger.debug("%s: no trial in float32 (%s: %s)", type(model).__name__, type(error).__name__, error)
    return trial()


def tolerance_of(model: nn.Module, numbers: Tensor) -> float:
    """How far the numbers of two ways may be apart, relative to the largest.

    Args:
        model: that gave them.
        numbers: results of a trial.
    Returns:
        The tolerance of half precision where a product is rounded to it, as in most quantised layers.
    """
    is_half = numbers.dtype in HALF_TYPES or getattr(model, "is_quantized", False)
    return HALF_TOLERANCE if is_half else TOLERANCE


def _half_tensors(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in HALF_TYPES]


@contextmanager
def _in_single_precision(model: nn.Module) -> Iterator[None]:
    device = next(model.parameters()).device
    half_tensors = _half_tensors(model)
    # Layers of bitsandbytes multiply in this type.
    layers: list[Any] = [layer for layer in model.modules() if getattr(layer, "compute_dtype", None) in HALF_TYPES]
    compute_types = [layer.compute_dtype for layer in layers]
    for layer in layers:
        layer.compute_dtype = torch.float32
    try:
        with torch.autocast(device.type, enabled=False), _without_tf32():
            if half_tensors:
                with _WideWeights(half_tensors):
                    yield
            else:
                yield
    finally:
        for layer, compute_type in zip(layers, compute_types, strict=True):
            layer.compute_dtype = compute_type


@contextmanager
def _without_tf32() -> Iterator[None]:
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before


class _WideWeights(TorchFunctionMode):
    """Operators get float32 copies of a model's half-precision weights, so that activations are float32 too.

    Args:
        half_tensors: the model's weights and buffers.
    """

    def __init__(self, half_tensors: list[Tensor]) -> None:
        super().__init__()
        self.half_ids = {id(tensor) for tensor in half_tensors}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.dtype.__get__:  # type: ignore[attr-defined]
            # Models convert activations to the type of a weight.
            return self._widen(args[0]).dtype
        if getattr(func, "__name__", "") == "__get__":
            attribute = func(*args)  # shape, device, …: no copy is needed
            # But a weight's T or data is a view of half precision.
            return attribute.float() if isinstance(attribute, Tensor) and self._is_narrow(args[0]) else attribute
        return func(*tree_map(self._widen, args), **tree_map(self._widen, kwargs))

    def _is_narrow(self, value: Any) -> bool:
        # FSDP gathers a layer into new parameters.
        return id(value) in self.half_ids or (isinstance(value, nn.Parameter) and value.dtype in HALF_TYPES)

    def _widen(self, value: Any) -> Any:
        return value.float() if self._is_narrow(value) else value
