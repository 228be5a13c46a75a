"""The floating-point operations of a step, counted from shapes: a multiplication and an addition for each term.

Model FLOPs are those of the formula: each token once through the layers, each visible pair of tokens once through the
attention, each scored token once through the head; and twice as many in the backward pass. Hardware FLOPs also have
padding, layers that are run again, and the scores that a fused attention computes again. Embeddings, norms, activations
and the optimizer are in neither.

Source: appendix B of arXiv 2204.02311.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.data import Batch

# Names in the configs of transformers' models.
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class Flops:
    """Floating-point operations.

    Attributes:
        model: of the formula.
        hardware: of the formula, of padding, and of what is computed again.
    """

    model: int = 0
    hardware: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.model + other.model, self.hardware + other.hardware)


class Product(NamedTuple):
    """A weight that a token is multiplied with.

    Args:
        size: its numbers that one token reads.
        is_trained: whether it gets a gradient.
        is_wide: whether its output is wider than its input.
    """

    size: int
    is_trained: bool
    is_wide: bool


def batch_flops(model: Any, batch: Batch, *, with_head: bool, with_gradient: bool) -> Flops:
    """Count one pass of a batch, and its backward pass.

    Args:
        model: a transformers model, without PEFT around it. Its adapters are counted.
        batch: what it reads.
        with_head: whether the scored tokens are multiplied with the head.
        with_gradient: whether there is a backward pass. A frozen weight costs one product
            less in it.
    Returns:
        Both counts.
    """
    config = model.config.get_text_config()
    tokens, all_tokens = _tokens(batch)
    total = Flops()
    for layer in text_layers(model):
        products = list(_products(layer, config))
        per_token = sum(2 * product.size * _passes(product.is_trained, with_gradient) for product in products)
        total += Flops(tokens * per_token, all_tokens * per_token)
        attention = _attention_flops(layer, config, batch)
        total += Flops(attention * (3 if with_gradient else 1), 0)
        # A fused attention computes the scores again in its backward pass: five products instead of four.
        total += Flops(0, int(attention * (3.5 if with_gradient else 1)))
        if with_gradient and layer.gradient_checkpointing and layer.training:
            total += Flops(0, all_tokens * _recomputed(layer, products) + attention * (not _is_selective(layer)))
    if with_head:
        head = model.get_output_embeddings().weight
        head_flops = 2 * len(batch.targets) * head.numel() * _passes(head.requires_grad, with_gradient)
        total += Flops(head_flops, head_flops)
    return total


def text_layers(model: Any) -> list[Any]:
    """The layers of a model that read text; the layers of a vision tower are left out.

    Args:
        model: a transformers model.
    Returns:
        Modules of transformers' usual kind, in order.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]


def visible_pairs(length: int, prefix: int = 0, window: int | None = None) -> int:
    """The pairs of a query and a key that it sees, in one span.

    Args:
        length: tokens of the span; each sees itself and those before it.
        prefix: tokens of a shared prompt, which all of them see.
        window: a token sees this many, itself included.
    Returns:
        Their number.
    """
    if window is None:
        window = prefix + length
    inside = max(min(length, window - prefix), 0)  # queries that see everything before them
    return inside * prefix + inside * (inside + 1) // 2 + (length - inside) * window


def _passes(is_trained: bool, with_gradient: bool) -> int:
    """Products of the size of the weight: forward, gradient of the input, gradient of the weight."""
    if not with_gradient:
        return 1
    return 3 if is_trained else 2


def _tokens(batch: Batch) -> tuple[int, int]:
    """Tokens of a batch without padding, and with it."""
    all_tokens = batch.input_ids.numel()
    return (all_tokens if batch.segments is not None else int(batch.attention_mask.sum())), all_tokens


def _products(layer: nn.Module, config: Any) -> Iterator[Product]:
    """The products of one layer, in the order of its modules."""
    modules: Iterator[Any] = layer.modules()
    for module in modules:
        for weight in module.parameters(recurse=False):
            if hasattr(module, "in_features") and weight.dim() == 2:
                # Not the weight's own shape: 4-bit weights are packed.
                is_wide = module.out_features > module.in_features
                yield Product(module.in_features * module.out_features, weight.requires_grad, is_wide)
            elif weight.dim() == 2:
                yield Product(weight.numel(), weight.requires_grad, weight.size(1) > weight.size(0))
            elif weight.dim() == 3 and not isinstance(module, nn.Conv1d):
                # The weights of all experts, [experts, out, in]; a token reads some.
                share = _experts_of_a_token(config, weight.size(0)) / weight.size(0)
                yield Product(int(weight.numel() * share), weight.requires_grad, weight.size(1) > weight.size(2))


def _experts_of_a_token(config: Any, num_experts: int) -> int:
    """How many experts read a token; all of them where no name for it is known."""
    numbers = (getattr(config, name, None) for name in EXPERTS_OF_A_TOKEN)
    return next((number for number in numbers if isinstance(number, int)), num_experts)


def _attention_flops(layer: nn.Module, config: Any, batch: Batch) -> int:
    """Scores and weighted values of one layer, forward."""
    attention = next((module for module in layer.modules() if "Attention" in type(module).__name__), None)
    if attention is None:
        return 0
    # Where all layers have the same window (Mistral), it is in the config alone.
    window_of_all = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    window = getattr(attention, "sliding_window", window_of_all)
    if batch.segments is not None:
        pairs = sum(visible_pairs(span.length, span.prefix, window) for span in batch.segments.spans)
    else:
        pairs = sum(visible_pairs(length, 0, window) for length in batch.attention_mask.sum(1).tolist())
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * 2 * heads * head_size * pairs


def _recomputed(layer: Any, products: list[Product]) -> int:
    """FLOPs of a token that checkpointing adds, beside the attention."""
    if _is_selective(layer):
        return sum(2 * product.size for product in products if product.is_wide)
    # The result of the last product is not needed again, so the second run ends before it.
    return sum(2 * product.size for product in products[:-1])


def _is_selective(layer: Any) -> bool:
    return "context_fn" in getattr(layer._gradient_checkpointing_func, "keywords", {})
