"""Keep fewer activations: what a cheap function gave is made again in the backward pass, from inputs kept anyway.

A layer of a Llama-like model keeps about 20 floats for each hidden one until the backward pass; half of them are norms
and gated activations of the other half. Making those again costs a pass over memory and no product of matrices.
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

logger = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """What stands for a tensor in the autograd graph: how to make it, and its shape there."""

    make: Callable[[], Tensor]
    shape: torch.Size


def can_be_remade(tensor: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Mark ``tensor``, so that :func:`fewer_activations` keeps ``make`` in its place.

    Args:
        make: gives its values again, from tensors that the graph keeps anyway.
    """
    tensor._remake = make  # type: ignore[attr-defined]
    return tensor


watchers: list[Callable[[Tensor], None]] = []  # told of each tensor that is kept; autograd asks the innermost hook only


@contextmanager
def fewer_activations() -> Iterator[None]:
    """In here, autograd keeps none of the tensors that can be made again."""

    def pack(tensor: Tensor) -> Tensor | Recipe:
        whole = tensor if tensor._base is None else tensor._base
        make = getattr(whole, "_remake", None)
        same = tensor.numel() == whole.numel() and tensor.is_contiguous() and whole.is_contiguous()
        if make is not None and same:
            return Recipe(make, tensor.shape)
        for watcher in watchers:
            watcher(tensor)
        return tensor

    def unpack(kept: Tensor | Recipe) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.make().view(kept.shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class SwiGLU(Function):
    """``silu(gate) * up``; keeps only its inputs. Source: arXiv 2002.05202."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return d_gate, F.silu(gate).mul_(grad)


class RMSNorm(Function):
    """``weight * x / rms(x)`` along the last dimension; keeps its inputs and 1 / rms. Source: arXiv 1910.07467."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1))
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        return (x * scale).mul_(weight), scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, d_normed = x * scale, grad * weight
        d_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = (d_normed * normed).mean(-1, keepdim=True)
        return d_normed.sub_(normed.mul_(mean)).mul_(scale), d_weight, None


def _mlp(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    kept_gate, kept_up = gate.detach(), up.detach()
    gated = can_be_remade(SwiGLU.apply(gate, up), lambda: F.silu(kept_gate).mul_(kept_up))
    return self.down_proj(gated)


def _norm(self: Any, x: Tensor) -> Tensor:
    if x.dtype != self.weight.dtype:  # mixed precision: with the model's own casts
        return type(self).forward(self, x)
    normed, scale = RMSNorm.apply(x, self.weight, self.variance_epsilon)
    kept, weight = x.detach(), self.weight.detach()
    return can_be_remade(normed, lambda: (kept * scale).mul_(weight))


def slim(model: nn.Module) -> None:
    """Let the norms and gated MLPs of ``model`` keep less; the figures stay the same.

    A module is taken by its name and parts, and one of each class is checked against its own forward first.
    """
    fits: dict[tuple[type, str], bool] = {}
    for module in model.modules():
        forward = _norm if _is_rms_norm(module) else _mlp if _is_swiglu(module) else None
        if forward is None or any(p.is_meta or hasattr(p, "ds_id") for p in module.parameters()):
            continue
        if not any(p.is_floating_point() for p in module.parameters()):
            continue  # quantised: there is no dtype to check it in
        kind = (type(module), forward.__name__)
        if kind not in fits:
            fits[kind] = _agrees(module, forward)
            if not fits[kind]:
                logger.warning("%s computes something else than its parts say; left as it is", kind[0].__name__)
        if fits[kind]:
            module.forward = MethodType(forward, module)


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return named and isinstance(weight, nn.Parameter) and weight.dim() == 1


def _is_swiglu(module: nn.Module) -> bool:
    parts = {name for name, _ in module.named_children()}
    return parts == {"gate_proj", "up_proj", "down_proj", "act_fn"} and isinstance(
        module.act_fn, (nn.SiLU, SiLUActivation)
    )


@torch.no_grad()
def _agrees(module: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> bool:
    first: Tensor = next(p for p in module.parameters() if p.is_floating_point())
    width = first.size(0) if forward is _norm else int(module.gate_proj.in_features)  # type: ignore[arg-type,union-attr]
    generator = torch.Generator().manual_seed(0)  # the run's random numbers stay as they are
    x = torch.randn(3, width, generator=generator).to(first)
    training = module.training
    module.eval()
    try:
        want, got = module(x), forward(module, x)
    finally:
        module.train(training)
    tolerance = 1e-5 if want.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
