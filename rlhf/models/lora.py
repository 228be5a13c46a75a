"""PEFT's LoRA layers with fewer passes over memory: the low-rank product is added inside the frozen one's output."""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLayer
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class LoraLinear(Function):
    r"""``x W^T + bias + scale (x A^T) B^T`` with a frozen W [out, in]; A [r, in], B [out, r]. Source: arXiv 2106.09685."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = x.flatten(0, -2) @ a.T
        y = F.linear(x, weight, bias)
        y.view(-1, y.size(-1)).addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        dy = grad.flatten(0, -2)
        d_low = (dy @ b).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(d_low, a).view_as(x)
        d_a = d_low.T @ x.flatten(0, -2) if ctx.needs_input_grad[3] else None
        d_b = (dy.T @ low).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        return dx, None, None, d_a, d_b, None


def fuse_lora(model: nn.Module) -> None:
    """Let the plain LoRA layers of a PEFT model compute through :class:`LoraLinear`; the figures stay the same."""
    for module in model.modules():
        if type(module) is LoraLayer:
            module.forward = MethodType(_forward, module)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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
