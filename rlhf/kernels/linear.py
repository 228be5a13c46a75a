"""Linear layers: products by the faster library, and PEFT's LoRA in fewer passes over memory.

Under LoRA the low-rank product is added inside the frozen one's output, forward and backward.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLayer
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rlhf.kernels.matmul import linear, onednn_is_faster, product, takes


class Linear(Function):
    """``x W^T + bias``: x [..., in], W [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = grad.flatten(0, -2)
        dx = product(dy, weight).view_as(x) if ctx.needs_input_grad[0] else None
        d_weight = product(dy.T, x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return dx, d_weight, dy.sum(0) if ctx.needs_input_grad[2] else None


class LoraLinear(Function):
    r"""``x W^T + bias + scale (x A^T) B^T`` with a frozen W [out, in]; A [r, in], B [out, r].

    Source: arXiv 2106.09685.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = linear(x.flatten(0, -2), a)
        y = linear(x, weight, bias)
        y.view(-1, y.size(-1)).addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        dy = grad.flatten(0, -2)
        d_low = product(dy, b).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = product(dy, weight).addmm_(d_low, a).view_as(x)
        d_a = product(d_low.T, x.flatten(0, -2)) if ctx.needs_input_grad[3] else None
        d_b = product(dy.T, low).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        return dx, None, None, d_a, d_b, None


def speed_up_linear(model: nn.Module) -> None:
    """Let the linear layers of ``model`` and the plain LoRA layers around them compute so; the figures stay the same.

    Only layers of exactly torch's and PEFT's own classes: not quantised, sharded or otherwise special ones.
    """
    forwards: dict[type, Callable[..., Tensor]] = {LoraLayer: _lora}
    if onednn_is_faster():
        forwards[nn.Linear] = _linear
    for module in model.modules():
        if type(module) in forwards and not any(p.is_meta or hasattr(p, "ds_id") for p in module.parameters()):
            module.forward = MethodType(forwards[type(module)], module)


def _linear(self: Any, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not takes(x, self.weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, self.weight, self.bias)
    return Linear.apply(x, self.weight, self.bias)


def _lora(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = self.active_adapters
    if args or kwargs or len(names) != 1 or not _is_plain(self, names[0], x):
        return LoraLayer.forward(self, x, *args, **kwargs)
    base, a, b = self.base_layer, self.lora_A[names[0]], self.lora_B[names[0]]
    return LoraLinear.apply(x, base.weight, base.bias, a.weight, b.weight, self.scaling[names[0]])


def _is_plain(layer: Any, name: str, x: Tensor) -> bool:
    """Whether one adapter acts, and its layer is what the formula says: no dropout, variant, cast, shard or hook."""
    if layer.disable_adapters or layer.merged or name not in layer.lora_A or name in layer.lora_variant:
        return False
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    parts = (base, layer.lora_A[name], layer.lora_B[name])
    if any(type(part) is not nn.Linear or part._forward_hooks or part._forward_pre_hooks for part in parts):
        return False
    return (
        not any(p.requires_grad for p in base.parameters())
        and all(part.weight.dtype == x.dtype for part in parts)
        and parts[1].bias is None
        and parts[2].bias is None
        and not (layer.training and getattr(dropout, "p", 0.0) > 0)
        and not torch.is_autocast_enabled(x.device.type)
    )
