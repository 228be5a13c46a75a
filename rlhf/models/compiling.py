"""``torch.compile`` for the layers of a transformers model, one by one.

A whole model is one large graph that changes with everything around it: hooks of autograd, spans of a batch, the
head's chunks. A layer's graph has none of these. All layers of a class share their compiled code.
"""

from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.models.attention import reads_segments

MAX_VERSIONS = 16  # of one layer's code: with and without gradient, in each kind of layer that shares the code


def compile_layers(model: nn.Module, backend: str, mode: str | None) -> None:
    """Compile the layers of a model for batches of any length.

    The attention over segments is left out of the graphs, because it depends on the spans of each batch. Layers are
    not compiled while text is generated. Calling this twice does no harm.

    Args:
        model: a transformers model, or PEFT around one. Its layers are changed in place; their names stay.
        backend: of ``torch.compile``.
        mode: of ``torch.compile``.
    Raises:
        ValueError: the model has no layers of transformers' usual kind.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"--torch_compile: {type(model).__name__} has no layers that are known; leave it out")
    config = model.config
    if reads_segments(config):
        _keep_out_of_graphs(config._attn_implementation)  # type: ignore[union-attr]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VERSIONS)
    for layer in layers:
        # The function inside transformers' own wrapper, which checkpoints it.
        forward = type(layer).forward.__wrapped__  # type: ignore[attr-defined]
        layer.forward = MethodType(_layer_forward(forward, backend, mode), layer)


@cache
def _layer_forward(forward: Callable[..., Any], backend: str, mode: str | None) -> Callable[..., Any]:
    """The forward of a layer that is compiled where it can be."""
    # Every size may change: the first batch must not fix the number of tokens.
    compiled = torch.compile(forward, backend=backend, mode=mode, dynamic=True)

    def compiled_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            # Generation: a cache grows at each step.
            return type(self).forward(self, *args, **kwargs)
        if self.gradient_checkpointing and self.training:
            # Around the compiled code and not inside it, so that the attention may stay out of the graph.
            return self._gradient_checkpointing_func(partial(compiled, self, **kwargs), *args)
        return compiled(self, *args, **kwargs)

    return compiled_forward


@cache
def _keep_out_of_graphs(name: str) -> None:
    """Let an attention function of transformers run uncompiled between two graphs."""
    ALL_ATTENTION_FUNCTIONS.register(name, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[name]))
