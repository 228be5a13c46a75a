"""Attention of a part of a row against the keys of the whole, without processes: the keys of others are passed in."""

from dataclasses import replace

import pytest
import torch
from conftest import close
from torch import Tensor

from rlhf.data.segments import Segments, Span
from rlhf.models.attention import attend
from rlhf.models.context_parallel import rows_of_parts, segments_of_part

# A pair behind a long prompt, a text, a single token, and a pair behind a single token.
SPANS = (Span(70), Span(30, 0, 41), Span(55), Span(1), Span(17), Span(9, 4, 1))
LENGTH = sum(span.length for span in SPANS)
LAYERS = {"plain": {}, "window": dict(sliding_window=20), "softcap": dict(softcap=2.0)}


def inputs(dtype: torch.dtype, device: torch.device | str, sizes=(4, 2, 16)) -> list[Tensor]:
    heads, kv_heads, head_size = sizes
    torch.manual_seed(0)
    shapes = [(1, count, LENGTH, head_size) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def attend_by_parts(tensors: list[Tensor], size: int, **options) -> Tensor:
    """The whole row's attention, computed in parts as the processes would."""
    query, key, value = tensors
    device = query.device
    parts = rows_of_parts(LENGTH, size)
    padding = parts.numel() - LENGTH
    spans = (*SPANS, Span(padding)) if padding else SPANS
    query, key, value = (torch.nn.functional.pad(tensor, (0, 0, 0, padding)) for tensor in (query, key, value))
    whole = torch.cat((key, value), dim=-1)[0].transpose(0, 1)
    outputs = []
    for rows in parts:
        segments = replace(segments_of_part(spans, rows).to(device), gather=lambda own: whole)
        own = [tensor[:, :, rows.to(device)] for tensor in (query, key, value)]
        outputs.append(attend(*own, None, segments, **options))
    order = parts.flatten().argsort().to(device)
    return torch.cat(outputs, dim=1)[:, order[:LENGTH]]


def gradients(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    weight = torch.randn(output.shape, device=output.device, dtype=output.dtype)
    return list(torch.autograd.grad((output * weight).sum(), tensors))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_parts_attend_as_the_whole(layer, size):
    tensors = inputs(torch.float64, "cpu")
    whole = attend(*tensors, None, Segments.of(SPANS), **LAYERS[layer])
    parts = attend_by_parts(tensors, size, **LAYERS[layer])
    close(parts.detach(), whole.detach(), torch.float64)
    for got, want in zip(gradients(parts, tensors), gradients(whole, tensors), strict=True):
        close(got, want, torch.float64)


@pytest.mark.gpu
def test_parts_attend_as_the_whole_on_a_gpu(gpu):
    tensors = inputs(torch.bfloat16, gpu, (8, 2, 64))
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in tensors]
    whole = attend(*exact, None, Segments.of(SPANS))
    parts = attend_by_parts(tensors, 2)
    close(parts.detach().cpu(), whole.detach(), torch.bfloat16)
    for got, want in zip(gradients(parts, tensors), gradients_as(parts, whole, exact), strict=True):
        difference = (got.cpu().double() - want).norm() / want.norm()
        assert difference < 0.02


def gradients_as(parts: Tensor, whole: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Gradients of the exact output under the weights of the other device."""
    torch.manual_seed(1)
    weight = torch.randn(parts.shape, device=parts.device, dtype=parts.dtype)
    return list(torch.autograd.grad((whole * weight.double().cpu()).sum(), tensors))
