"""Save fewer activations: cheap outputs are recomputed in the backward pass, from inputs that are saved anyway.

A layer of a Llama-like model saves about 20 floats for each hidden one until the backward pass. Half of them are norms
and gated activations of the other half. Recomputing those costs a pass over memory and no product of matrices.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from rlhf.kernels.linear import weights_are_here

logger = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """What the autograd graph saves in place of a tensor: how to recompute it, and its shape there."""

    recompute: Callable[[], Tensor]
    shape: torch.Size


def mark_recomputable(tensor: Tensor, recompute: Callable[[], Tensor]) -> Tensor:
    """Mark a tensor, so that :func:`fewer_activations` saves ``recompute`` in its place.

    Args:
        tensor: an output in the autograd graph.
        recompute: returns its values again, from tensors that the graph saves anyway.

    Returns:
        The same tensor.
    """
    tensor._recompute = recompute  # type: ignore[attr-defined]
    return tensor


@contextmanager
def fewer_activations() -> Iterator[None]:
    """A context in which autograd saves no tensor that was marked as recomputable."""

    def pack(tensor: Tensor) -> Tensor | Recipe:
        # A view is saved where its base was marked: `view` and `flatten` lie between a norm and a linear layer.
        base = tensor if tensor._base is None else tensor._base
        recompute = getattr(base, "_recompute", None)
        if recompute is None:
            return tensor
        # A part, or other strides, could not be had from the recomputed values by a plain view.
        is_plain_view = tensor.numel() == base.numel() and tensor.is_contiguous() and base.is_contiguous()
        return Recipe(recompute, tensor.shape) if is_plain_view else tensor

    def unpack(saved: Tensor | Recipe) -> Tensor:
        return saved if isinstance(saved, Tensor) else saved.recompute().view(saved.shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class SwiGLU(Function):
    """``silu(gate) * up``; saves only its inputs. Source: arXiv 2002.05202."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad_output * up, gate)
        grad_up = F.silu(gate).mul_(grad_output)
        return grad_gate, grad_up


class RMSNorm(Function):
    """``weight * x / rms(x)`` along the last dimension; saves its inputs and 1 / rms. Source: arXiv 1910.07467."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1))
        inverse_rms = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.mark_non_differentiable(inverse_rms)
        return (x * inverse_rms).mul_(weight), inverse_rms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x * inverse_rms
        grad_normed = grad_output * weight
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_output * normed).flatten(0, -2).sum(0)
        # The rms depends on x too: the part of the gradient along x drops out.
        along_x = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = grad_normed.sub_(normed.mul_(along_x)).mul_(inverse_rms)
        return grad_x, grad_weight, None


def enable_recompute(model: nn.Module) -> None:
    """Replace the forward of RMS norms and gated MLPs, so that their outputs need not be saved for the backward pass.

    A module is recognised by its name and parts. One of each class is compared with its own forward first.

    Args:
        model: its modules are changed in place. It saves less only inside :func:`fewer_activations`.
    """
    agrees: dict[type, bool] = {}
    for module in model.modules():
        if _is_rms_norm(module):
            forward = _norm_forward
        elif _is_swiglu(module):
            forward = _mlp_forward
        else:
            continue
        if not weights_are_here(module):
            continue
        if not any(weight.is_floating_point() for weight in module.parameters()):
            continue  # quantised: there is no dtype in which to compare
        kind = type(module)
        if kind not in agrees:
            agrees[kind] = _computes_the_same(module, forward)
            if not agrees[kind]:
                logger.warning("%s computes something else than its parts suggest; left as it is", kind.__name__)
        if agrees[kind]:
            module.forward = MethodType(forward, module)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    saved_gate, saved_up = gate.detach(), up.detach()
    gated = mark_recomputable(SwiGLU.apply(gate, up), lambda: F.silu(saved_gate).mul_(saved_up))
    return self.down_proj(gated)


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    if x.dtype != self.weight.dtype:  # mixed precision: with the model's own casts
        return type(self).forward(self, x)
    normed, inverse_rms = RMSNorm.apply(x, self.weight, self.variance_epsilon)
    saved_x, weight = x.detach(), self.weight.detach()
    return mark_recomputable(normed, lambda: (saved_x * inverse_rms).mul_(weight))


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    has_name = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return has_name and isinstance(weight, nn.Parameter) and weight.dim() == 1


def _is_swiglu(module: nn.Module) -> bool:
    parts = {name for name, _ in module.named_children()}
    if parts != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    return isinstance(module.act_fn, (nn.SiLU, SiLUActivation))


@torch.no_grad()
def _computes_the_same(module: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> bool:
    """Whether ``forward`` gives what the module's own forward gives, for random inputs."""
    weight: Tensor = next(weight for weight in module.parameters() if weight.is_floating_point())
    width = weight.size(0) if forward is _norm_forward else int(module.gate_proj.in_features)  # type: ignore[arg-type,union-attr]
    generator = torch.Generator().manual_seed(0)  # the run's random numbers stay as they are
    x = torch.randn(3, width, generator=generator).to(weight)
    training = module.training
    module.eval()
    try:
        expected, result = module(x), forward(module, x)
    finally:
        module.train(training)
    tolerance = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(result, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
