"""Linear layers: products by the faster library, and PEFT's LoRA in fewer passes over memory.

The low-rank product of LoRA is added inside the output of the frozen layer, forward and backward.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rlhf.kernels.autocast import without_autocast
from rlhf.kernels.matmul import linear, onednn_is_faster, product, use_onednn


class Linear(Function):
    """``inputs W^T + bias``: inputs [..., in], W [out, in], bias [out]. As torch's own, by the faster library."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        grad_rows = grad_output.flatten(0, -2)
        grad_inputs = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_inputs = product(grad_rows, weight).view_as(inputs)
        if ctx.needs_input_grad[1]:
            grad_weight = product(grad_rows.T, inputs.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0)
        return grad_inputs, grad_weight, grad_bias


class LoraLinear(Function):
    r"""``inputs W^T + bias + scale (inputs A^T) B^T`` with a frozen W [out, in]; A [r, in], B [out, r].

    Source: arXiv 2106.09685.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        low_rank = linear(inputs.flatten(0, -2), lora_a)  # [tokens, r]
        output = linear(inputs, weight, bias)
        # In place: a second matrix of the output's size would cost another pass over memory.
        output.view(-1, output.size(-1)).addmm_(low_rank, lora_b.T, alpha=scale)
        ctx.save_for_backward(inputs, low_rank, weight, lora_a, lora_b)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs, low_rank, weight, lora_a, lora_b = ctx.saved_tensors
        grad_rows = grad_output.flatten(0, -2)
        grad_low_rank = product(grad_rows, lora_b).mul_(ctx.scale)
        grad_inputs = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_inputs = product(grad_rows, weight).addmm_(grad_low_rank, lora_a).view_as(inputs)
        if ctx.needs_input_grad[3]:
            grad_a = product(grad_low_rank.T, inputs.flatten(0, -2))
        if ctx.needs_input_grad[4]:
            grad_b = product(grad_rows.T, low_rank).mul_(ctx.scale)
        # The frozen weight, its bias and the scale get no gradient.
        return grad_inputs, None, None, grad_a, grad_b, None


def speed_up_linear(model: nn.Module) -> None:
    """Replace the forward of linear layers, and of plain LoRA layers around them; results are the same up to rounding.

    Only layers of exactly torch's and PEFT's own classes are replaced: a quantised, sharded or otherwise special layer
    may compute something else.

    Args:
        model: its modules are changed in place.
    """
    # Here, because the head's log-probs need this room's products, and no PEFT.
    from peft.tuners.lora import Linear as LoraLayer

    forwards: dict[type, Callable[..., Tensor]] = {LoraLayer: _lora_forward}
    if onednn_is_faster():
        forwards[nn.Linear] = _linear_forward
    for module in model.modules():
        forward = forwards.get(type(module))
        if forward is not None and has_own_forward(module) and weights_are_here(module):
            module.forward = MethodType(forward, module)


def restore_lora(model: nn.Module) -> None:
    """Give LoRA layers the forward of PEFT again, which changes no result in place.

    Args:
        model: its modules are changed in place.
    """
    for module in model.modules():
        if getattr(module.forward, "__func__", None) is _lora_forward:
            del module.forward


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module runs the forward of its class; accelerate's ``device_map`` and hub kernels replace it."""
    return "forward" not in vars(module)


def weights_are_here(module: nn.Module) -> bool:
    """Whether this process holds the weights: not on the meta device, and not sharded by ZeRO-3 (``ds_id``)."""
    return not any(weight.is_meta or hasattr(weight, "ds_id") for weight in module.parameters())


def _linear_forward(self: Any, inputs: Tensor) -> Tensor:
    # Where oneDNN does not compute, torch's own layer is as fast; the compiler and autocast know only that one.
    if torch.compiler.is_compiling() or not use_onednn(inputs, self.weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(inputs, self.weight, self.bias)
    return Linear.apply(inputs, self.weight, self.bias)


def _lora_forward(self: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapters = self.active_adapters
    # The compiler fuses the passes over memory of PEFT's own forward.
    is_replaceable = not (torch.compiler.is_compiling() or args or kwargs) and len(adapters) == 1
    if not is_replaceable or not _is_plain_lora(self, adapters[0], inputs):
        return type(self).forward(self, inputs, *args, **kwargs)
    (adapter,) = adapters
    base_layer = self.base_layer
    lora_a, lora_b = self.lora_A[adapter], self.lora_B[adapter]
    return LoraLinear.apply(
        inputs, base_layer.weight, base_layer.bias, lora_a.weight, lora_b.weight, self.scaling[adapter]
    )


def _is_plain_lora(layer: Any, adapter: str, inputs: Tensor) -> bool:
    """Whether the layer computes just the formula of :class:`LoraLinear`, so that PEFT's own forward is not needed."""
    if layer.disable_adapters or layer.merged:
        return False
    if adapter not in layer.lora_A or adapter in layer.lora_variant:  # a variant, such as DoRA, has another formula
        return False
    base_layer, lora_a, lora_b = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    for sublayer in (base_layer, lora_a, lora_b):
        # A hook would not be called, as no part is called here. accelerate has hooks of its own.
        if type(sublayer) is not nn.Linear or sublayer._forward_hooks or sublayer._forward_pre_hooks:
            return False
        if hasattr(sublayer, "_hf_hook"):
            return False
        if sublayer.weight.dtype != inputs.dtype:
            return False
    if any(weight.requires_grad for weight in base_layer.parameters()):
        return False
    if lora_a.bias is not None or lora_b.bias is not None:
        return False
    has_dropout = layer.training and getattr(layer.lora_dropout[adapter], "p", 0.0) > 0
    return not has_dropout and not torch.is_autocast_enabled(inputs.device.type)
