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

from rlhf.kernels.linear import has_own_forward, weights_are_here

logger = logging.getLogger(__name__)

BEYOND_LIMITS = 100.0  # MLPs that clamp do so at 7 to 16; its square is a number of float16


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
    # On the tensor itself, because the hooks below get nothing but the tensor that is saved.
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
    """``silu(gate) * up`` for two tensors of one shape; saves only these.

    Source: arXiv 2002.05202.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        # Not silu(gate), which torch would save for the product: it is recomputed from the gate.
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
    """``weight * hidden / rms(hidden)`` along the last dimension: hidden [..., h], weight [h].

    It saves its inputs and 1 / rms, one number for each row, which is returned too: whoever recomputes the output needs
    it, and it has no gradient.

    Source: arXiv 1910.07467.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        # vector_norm reads the rows once; squaring them first would write a second matrix of their size.
        # Half precision would round 1 / rms, an error that all entries of a row share.
        precise_dtype = torch.promote_types(hidden.dtype, torch.float32)
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=precise_dtype)
        mean_square = norm.square_().div_(hidden.size(-1))
        inverse_rms = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, inverse_rms)
        ctx.mark_non_differentiable(inverse_rms)
        return _times_weight(hidden, inverse_rms, weight), inverse_rms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight, inverse_rms = ctx.saved_tensors
        direction = hidden * inverse_rms
        grad_direction = (grad_output * weight).to(direction.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_output * direction).flatten(0, -2).sum(0).to(weight.dtype)
        # A step along the row itself changes its rms and not its direction, so that part of the gradient drops out.
        along_row = (grad_direction * direction).mean(-1, keepdim=True)
        across_row = grad_direction.sub_(direction.mul_(along_row))
        grad_hidden = across_row.mul_(inverse_rms).to(hidden.dtype)
        return grad_hidden, grad_weight, None


def _times_weight(hidden: Tensor, inverse_rms: Tensor, weight: Tensor) -> Tensor:
    """The normed rows, rounded to the precision of ``hidden`` before the weight, as in transformers."""
    return (hidden * inverse_rms).to(hidden.dtype).mul_(weight)


def enable_recompute(model: nn.Module) -> None:
    """Replace the forward of RMS norms and gated MLPs, so that their outputs need not be saved for the backward pass.

    A module is recognised by its name and parts. One of each class and settings is compared with its own forward first.

    Args:
        model: its modules are changed in place. It saves less only inside :func:`fewer_activations`.
    """
    agrees: dict[Any, bool] = {}
    for module in model.modules():
        if _is_rms_norm(module):
            forward = _norm_forward
        elif _is_swiglu(module):
            forward = _mlp_forward
        else:
            continue
        if not (has_own_forward(module) and weights_are_here(module)):
            continue
        # Quantised weights have no dtype in which the two could be compared.
        if not any(weight.is_floating_point() for weight in module.parameters()):
            continue
        kind = _kind(module)
        if kind not in agrees:
            agrees[kind] = _computes_the_same(module, forward)
            if not agrees[kind]:
                logger.warning(
                    "%s computes something else than its parts suggest; left as it is", type(module).__name__
                )
        if agrees[kind]:
            module.forward = MethodType(forward, module)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """The class of a module and its settings, such as the limit of a clamped MLP, which may differ by layer."""
    numbers = [(name, value) for name, value in vars(module).items() if isinstance(value, int | float | None)]
    return type(module), *numbers


def _mlp_forward(self: Any, hidden: Tensor) -> Tensor:
    # The compiler decides by itself what to recompute.
    if torch.compiler.is_compiling():
        return type(self).forward(self, hidden)
    gate, up = self.gate_proj(hidden), self.up_proj(hidden)
    # SwiGLU saves both anyway. Detached, because the graph must not hold itself.
    saved_gate, saved_up = gate.detach(), up.detach()
    gated = mark_recomputable(SwiGLU.apply(gate, up), lambda: F.silu(saved_gate).mul_(saved_up))
    return self.down_proj(gated)


def _norm_forward(self: Any, hidden: Tensor) -> Tensor:
    # In mixed precision a norm casts in its own way, which differs between models.
    # The compiler decides by itself what to recompute.
    if hidden.dtype != self.weight.dtype or torch.compiler.is_compiling():
        return type(self).forward(self, hidden)
    saved_hidden, weight = hidden.detach(), self.weight.detach()
    if has_fused_norm(hidden.device):
        normed = _fused_norm(hidden, self.weight, self.variance_epsilon)
        return mark_recomputable(normed, lambda: _fused_norm(saved_hidden, weight, self.variance_epsilon))
    normed, inverse_rms = RMSNorm.apply(hidden, self.weight, self.variance_epsilon)
    return mark_recomputable(normed, lambda: _times_weight(saved_hidden, inverse_rms, weight))


def has_fused_norm(device: torch.device) -> bool:
    """Whether torch computes a norm in one kernel: on a GPU, where :class:`RMSNorm` takes twice the time.

    Args:
        device: of the hidden states.
    Returns:
        True on a GPU.
    """
    return device.type == "cuda"


def _fused_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    # Without autocast, so that the backward pass recomputes it in the same precision.
    with torch.autocast(hidden.device.type, enabled=False):
        return F.rms_norm(hidden, weight.shape, weight, eps)


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    has_name = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return has_name and isinstance(weight, nn.Parameter) and weight.dim() == 1


def _is_swiglu(module: nn.Module) -> bool:
    part_names = {name for name, _ in module.named_children()}
    if part_names != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    return isinstance(module.act_fn, (nn.SiLU, SiLUActivation))


@torch.no_grad()
def _computes_the_same(module: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> bool:
    """Whether ``forward`` gives what the module's own forward gives, for random inputs."""
    weight: Tensor = next(weight for weight in module.parameters() if weight.is_floating_point())
    hidden_size = weight.size(0) if forward is _norm_forward else int(module.gate_proj.in_features)  # type: ignore[arg-type,union-attr]
    # A generator of its own: the run's random numbers stay as they are.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, hidden_size, generator=generator).to(weight)
    was_training = module.training
    # Dropout would make the two differ.
    module.eval()
    try:
        trials = [hidden, _large_inputs(module, hidden)] if forward is _mlp_forward else [hidden]
        return all(_agree(forward(module, inputs), module(inputs)) for inputs in trials)
    finally:
        module.train(was_training)


def _large_inputs(mlp: Any, hidden: Tensor) -> Tensor:
    """Inputs for which the gate and its factor exceed any usual limit, as some MLPs clamp them."""
    sizes = [float(projection(hidden).abs().max()) for projection in (mlp.gate_proj, mlp.up_proj)]
    return hidden * (BEYOND_LIMITS / max(min(sizes), 1e-6))


def _agree(result: Tensor, expected: Tensor) -> bool:
    # In half precision the order of the casts alone moves the last bits.
    tolerance = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    largest_output = float(expected.abs().max())
    return torch.allclose(result, expected, rtol=tolerance, atol=tolerance * largest_output)
