"""``torch.compile`` for the layers of a transformers model, one by one.

A whole model is one large graph that changes with everything around it: hooks of autograd, spans of a batch, the
head's chunks. A layer's graph has none of these. All layers of a class share their compiled code.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.models.attention import reads_segments
from rlhf.models.randomness import draws_random_numbers

logger = logging.getLogger(__name__)

MAX_VERSIONS = 16  # of one layer's code: with and without gradient, in each kind of layer that shares the code
# Relative differences of gradients. A wrong gradient, as one compiler has given, differs by a half.
TOLERANCE, TOLERANCE_HALF = 1e-3, 0.1


def compile_layers(model: nn.Module, backend: str, mode: str | None) -> None:
    """Compile the layers of a model for batches of any length.

    The attention over segments is left out of the graphs, because it depends on the spans of each batch. Layers are
    not compiled while text is generated. Calling this twice does no harm.

    Args:
        model: a transformers model, or PEFT around one. Its layers are changed in place; their names stay.
        backend: of ``torch.compile``.
        mode: of ``torch.compile``.
    Raises:
        ValueError: the model has no layers of transformers' usual kind, or ``device_map`` has hooks on them.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"--torch_compile: {type(model).__name__} has no layers that are known; leave it out")
    if any(hasattr(layer, "_hf_hook") for layer in layers):
        raise ValueError("--torch_compile: the layers of this model have hooks of `device_map`; leave one of both out")
    config = model.config
    if reads_segments(config):
        _keep_out_of_graphs(config._attn_implementation)  # type: ignore[union-attr]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VERSIONS)
    forwards: dict[type, Callable[..., Any]] = {}
    for layer in layers:
        layer_class = type(layer)
        if layer_class not in forwards:
            # The function inside transformers' own wrapper, which checkpoints it. In 5.16, `__call__` does.
            wrapped = getattr(layer_class.forward, "__wrapped__", None)
            forward = wrapped or layer_class.forward
            compiled = _compiled(forward, backend, mode)
            forwards[layer_class] = _layer_forward(forward, compiled, checkpoints=wrapped is not None)
        layer.forward = MethodType(forwards[layer_class], layer)


@cache
def _compiled(forward: Callable[..., Any], backend: str, mode: str | None) -> Callable[..., Any]:
    # Every size may change: the first batch must not fix the number of tokens.
    return torch.compile(forward, backend=backend, mode=mode, dynamic=True)


@cache
def _keep_out_of_graphs(name: str) -> None:
    """Let an attention function of transformers run uncompiled between two graphs."""
    ALL_ATTENTION_FUNCTIONS.register(name, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[name]))


def _layer_forward(
    forward: Callable[..., Any], compiled: Callable[..., Any], *, checkpoints: bool
) -> Callable[..., Any]:
    """The forward of a layer, compiled where it can be; the first gradient is compared with the uncompiled one."""
    is_right: bool | None = None  # None until a gradient was compared

    def compiled_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_right
        generates = kwargs.get("past_key_values") is not None  # a cache grows at each step
        if is_right is None and self.training and torch.is_grad_enabled() and not generates:
            is_right = _gradients_agree(forward, compiled, self, args, kwargs)
        if is_right is False or generates:
            return type(self).forward(self, *args, **kwargs)
        if checkpoints and self.gradient_checkpointing and self.training:
            # Around the compiled code and not inside it, so that the attention may stay out of the graph.
            return self._gradient_checkpointing_func(partial(compiled, self, **kwargs), *args)
        return compiled(self, *args, **kwargs)

    return compiled_forward


def _gradients_agree(
    forward: Callable[..., Any], compiled: Callable[..., Any], layer: nn.Module, args: Any, kwargs: Any
) -> bool:
    """Compare the compiled gradient of one layer with the uncompiled one; warns where they differ."""
    if draws_random_numbers(layer):
        return True  # the two would draw others
    hidden, *other_args = args
    weights = [weight for weight in layer.parameters() if weight.requires_grad]

    def gradient(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        inputs = hidden.detach().requires_grad_()
        output = function(layer, inputs, *other_args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        # The gradient of half the output's square: it needs no random numbers.
        return torch.autograd.grad(output, [inputs, *weights], output.detach(), materialize_grads=True)

    # Hooks of its own: a checkpoint around the layer would count what is saved here, and miss it when it recomputes.
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        squares = [
            torch.stack([(got.float() - want.float()).square().sum(), want.float().square().sum()])
            for got, want in zip(gradient(compiled), gradient(forward), strict=True)
        ]
    difference, size = torch.stack(squares).sum(0).sqrt().tolist()
    is_half = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype in (torch.float16, torch.bfloat16)
    if difference <= (TOLERANCE_HALF if is_half else TOLERANCE) * size:
        return True
    logger.warning(
        "--torch_compile: a compiled %s has another gradient (relative difference %.2g), so it is not compiled",
        type(layer).__name__, difference / max(size, 1e-30),
    )  # fmt: skip
    return False
