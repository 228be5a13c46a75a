"""The LM head as data: everything between the last hidden state and the log-softmax."""

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Head:
    """``logits = cap(scale * (hidden @ weight.T + bias)) / temperature``, ``cap(z) = softcap * tanh(z / softcap)``.

    Args:
        weight: [V, H]. bias: [V].
        scale: factor on the logits (Cohere, Granite, Falcon-H1, …).
        softcap: bound on the absolute logits (Gemma and relatives); None for none.
        temperature: that tokens were sampled at.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """The plain formula, [..., H] to [..., V], for checks; ``score`` never builds this."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        capped = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return capped / self.temperature

    def first(self, size: int) -> "Head":
        """The same head on the first ``size`` tokens alone."""
        if size >= self.weight.size(0):
            return self
        return replace(self, weight=self.weight[:size], bias=None if self.bias is None else self.bias[:size])


class Predictions(NamedTuple):
    """A model's predictions of the scored tokens before the softmax.

    Args:
        rows: [N, H], the last hidden states; without a head, logits [N, V].
        head: the head that they enter.
    """

    rows: Tensor
    head: Head | None = None

    @property
    def vocabulary(self) -> int:
        """Number of tokens that are told apart."""
        return self.rows.size(1) if self.head is None else self.head.weight.size(0)

    def first(self, size: int) -> "Predictions":
        """The same predictions among the first ``size`` tokens alone."""
        return Predictions(self.rows[:, :size]) if self.head is None else self._replace(head=self.head.first(size))

    def logits(self, dtype: torch.dtype) -> Tensor:
        """All logits, [N, V]."""
        rows, head = self.rows.to(dtype), self.head
        if head is None:
            return rows
        bias = None if head.bias is None else head.bias.to(dtype)
        return replace(head, weight=head.weight.to(dtype), bias=bias).logits(rows)


@dataclass(frozen=True)
class HeadSettings:
    """What a model's config says about its head; the weights are read anew at each forward."""

    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None


def head_settings(config: Any) -> HeadSettings:
    """Read scale, soft-cap and padded vocabulary off a transformers config, under the names that models use."""
    config = config.get_text_config()

    def first(*names: str) -> float | None:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere · Falcon-H1 · Muse
        scale *= first(name) or 1.0
    if divisor := first("logits_scaling"):  # Granite divides by it, HyperCLOVA X multiplies
        scale = scale * divisor if config.model_type.startswith("hyperclovax") else scale / divisor
    softcap = first("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return HeadSettings(scale, softcap, getattr(config, "unpadded_vocab_size", None))


def read_head(model: nn.Module, settings: HeadSettings, temperature: float = 1.0) -> Head:
    """The head of a Hugging Face causal LM (PEFT's ``modules_to_save`` and FSDP2's shards included)."""
    layer = model.get_output_embeddings()  # type: ignore[operator]
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if hasattr(weight, "full_tensor"):  # FSDP2: gather once a call, not once a chunk
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    head = Head(weight, bias, settings.scale, settings.softcap, temperature)
    return head if settings.vocab_size is None else head.first(settings.vocab_size)


_verified: WeakKeyDictionary[nn.Module, HeadSettings | Literal[False]] = WeakKeyDictionary()


def verified_settings(model: nn.Module) -> HeadSettings | None:
    """The model's head settings, checked once against the model's own logits; None where it must run its own head.

    The check runs one forward of at most 16 tokens. A model that fails it, or whose head cannot be read as one matrix
    (an adapter on the head, weights that ZeRO-3 has sharded), is reported once by a warning.
    """
    if model not in _verified:
        settings, problem = _verify(model)
        if problem:
            logger.warning("%s: %s; using the model's own head (exact, slower)", type(model).__name__, problem)
        _verified[model] = settings if settings is not None and not problem else False
    return _verified[model] or None


def backbone_of(model: nn.Module) -> nn.Module:
    return model.base_model  # type: ignore[return-value]


def _verify(model: nn.Module) -> tuple[HeadSettings | None, str | None]:
    layer = model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(layer, "weight", None)
    if layer is None or weight is None or backbone_of(model) is model:
        return None, "no output embedding to read the head from"
    if hasattr(layer, "base_layer"):  # `.weight` would be the frozen matrix, without the adapter
        return None, "an adapter sits on the head"
    if hasattr(weight, "ds_id") or weight.is_meta or weight.dim() != 2 or not weight.is_floating_point():
        return None, "the head's weights are not in memory as one matrix"
    settings = head_settings(model.config)
    found: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found["hidden"] = output[0]

    # One forward gives both sides of the comparison, so dropout cannot make them differ.
    handle = backbone_of(model).register_forward_hook(keep)
    try:
        ids = torch.arange(1, 17, device=weight.device)[None] % weight.size(0)
        with torch.no_grad():
            own = model(input_ids=ids, use_cache=False).logits.float()
            if "hidden" not in found:  # it runs a part of its backbone (BART, OPT)
                found["hidden"] = backbone_of(model)(input_ids=ids, use_cache=False)[0]
            head = read_head(model, settings)
            bias = None if head.bias is None else head.bias.float()
            ours = Head(head.weight.float(), bias, head.scale, head.softcap).logits(found["hidden"].float())
    finally:
        handle.remove()
    if own.isnan().any():
        raise ValueError(f"{type(model).__name__}: its logits are NaN; the weights are broken, or its dtype too narrow")
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2  # bf16 logits keep 8 bits
    if own.shape != ours.shape:
        return None, f"logits have shape {tuple(own.shape)}, the head gives {tuple(ours.shape)}"
    if not torch.allclose(own, ours, rtol=0, atol=tolerance * float(own.abs().max())):
        return None, f"the head's formula misses the model's logits by {float((own - ours).abs().max()):.2g}"
    return settings, None
