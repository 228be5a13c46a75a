"""The LM head as data: everything between the last hidden state and the log-softmax."""

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf.kernels.autocast import dtype_under_autocast

logger = logging.getLogger(__name__)


# Compared by identity: a comparison of tensors has no single truth value.
@dataclass(frozen=True, eq=False)
class Head:
    """``logits = cap(scale * (hidden @ weight.T + bias)) / temperature``, ``cap(z) = softcap * tanh(z / softcap)``.

    Args:
        weight: [V, H].
        bias: [V].
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


def head_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The type in which hidden states are multiplied with the head.

    The log-prob core multiplies with autocast off, because autocast would round log-probs. So float32 weights under
    ``bf16=True`` would be multiplied in float32, many times slower. A CPU emulates half precision: the type stays.

    Args:
        dtype: of the hidden states.
        device: their device type.
    Returns:
        On a GPU, what autocast would take; elsewhere the same type.
    """
    is_cast = device == "cuda" and dtype == torch.float32
    return dtype_under_autocast(dtype, device) if is_cast else dtype


def as_autocast_casts(rows: Tensor) -> Tensor:
    """The hidden states in the type of :func:`head_dtype`.

    Args:
        rows: [N, H].
    Returns:
        [N, H].
    """
    return rows.to(head_dtype(rows.dtype, rows.device.type))


@dataclass(frozen=True)
class HeadSettings:
    """The part of a head that a model's config describes; the weights are read anew in each forward pass.

    Args:
        scale: as in :class:`Head`.
        softcap: as in :class:`Head`.
        vocab_size: number of tokens, where the weight has rows beyond them; None where it has none.
    """

    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None


# Names in the configs of transformers' models.
SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere · Falcon-H1 · Muse
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def head_settings(config: Any) -> HeadSettings:
    """Read scale, soft-cap and padded vocabulary off a transformers config, under the names that models use.

    Args:
        config: of a model; its text part is read.
    Returns:
        The settings. :func:`verified_settings` checks them against the model itself.
    """
    config = config.get_text_config()
    scale = 1.0
    for name in SCALES:
        # A config may have the name and no value.
        scale *= getattr(config, name, None) or 1.0
    scaling = getattr(config, "logits_scaling", None)
    if scaling:
        # Granite divides by it, HyperCLOVA X multiplies.
        multiplies = config.model_type.startswith("hyperclovax")
        scale = scale * scaling if multiplies else scale / scaling
    softcaps = [getattr(config, name, None) for name in SOFTCAPS]
    softcap = next((value for value in softcaps if value is not None), None)
    return HeadSettings(scale, softcap, getattr(config, "unpadded_vocab_size", None))


def read_head(model: nn.Module, settings: HeadSettings, temperature: float = 1.0) -> Head:
    """The head of a Hugging Face causal LM (PEFT's ``modules_to_save`` and FSDP2's shards included).

    Args:
        model: the transformers model.
        settings: of its config.
        temperature: divides the logits.
    Returns:
        The head, on the tokens without padding.
    Raises:
        ValueError: the head is sharded, it is trained, and no forward pass of FSDP2 is under way.
    """
    layer = model.get_output_embeddings()  # type: ignore[operator]
    is_divided = hasattr(layer.weight, "full_tensor") and not _is_tensor_parallel(layer.weight)
    if is_divided and layer.weight.requires_grad and torch.is_grad_enabled():
        # FSDP2 may shard the head as a unit of its own, which it gathers when the layer is called: here it is not.
        # Gathered by FSDP2, because the gradient of `full_tensor` is not summed over the processes.
        if not hasattr(layer, "unshard"):
            raise ValueError(
                "the head is sharded, and its gradient would be a part: read it within the sharded forward"
            )
        layer.unshard()
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if hasattr(weight, "full_tensor"):
        # Gathered once in a forward pass, not once for each chunk, and freed after it; in the precision in which FSDP2
        # gathers it for training, so that a reference's log-probs are those of the policy.
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        weight = weight.to(dtype).full_tensor()
        bias = None if bias is None else bias.to(dtype).full_tensor()
    head = Head(weight, bias, settings.scale, settings.softcap, temperature)
    # The model's own forward drops the logits of padding rows as well.
    return head if settings.vocab_size is None else head.first(settings.vocab_size)


def _is_tensor_parallel(weight: Any) -> bool:
    """Whether a weight is divided by tensor parallelism: all its processes have the same batch and the same loss.

    So each of them has the whole gradient of ``full_tensor``, of which its part is the one it keeps.
    """
    return weight.device_mesh.mesh_dim_names == ("tp",)


# False for a model that failed the check. Weak: a model is not kept alive by having been checked.
_verified: WeakKeyDictionary[nn.Module, HeadSettings | Literal[False]] = WeakKeyDictionary()
OWN_HEAD = "%s: %s; using the model's own head (exact, slower)"
ADAPTER_ON_HEAD = "an adapter sits on the head"


def verified_settings(model: nn.Module) -> HeadSettings | None:
    """The model's head settings, checked once against the model's own logits; None where it must run its own head.

    The check runs one forward of at most 16 tokens. A model that fails it, or whose head cannot be read as one matrix
    (an adapter on the head, weights that ZeRO-3 has sharded), is reported once by a warning.

    Args:
        model: the transformers model.
    Returns:
        The settings, or None.
    Raises:
        ValueError: the model's logits are NaN.
    """
    if model not in _verified:
        settings = head_settings(model.config)
        problem = _unreadable_reason(model) or _mismatch(model, settings)
        if problem:
            logger.warning(OWN_HEAD, type(model).__name__, problem)
        _verified[model] = False if problem else settings
    elif _verified[model] and _has_adapter(model.get_output_embeddings()):  # type: ignore[operator]
        # Put there after the check: PEFT changes a model in place.
        logger.warning(OWN_HEAD, type(model).__name__, ADAPTER_ON_HEAD)
        _verified[model] = False
    return _verified[model] or None


def backbone_of(model: nn.Module) -> nn.Module:
    """A causal LM without its head."""
    return model.base_model  # type: ignore[return-value]


def _unreadable_reason(model: nn.Module) -> str | None:
    """Why the head cannot be read as one matrix; None where it can."""
    layer = model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(layer, "weight", None)
    if layer is None or weight is None or backbone_of(model) is model:
        return "no output embedding to read the head from"
    if _has_adapter(layer):
        return ADAPTER_ON_HEAD
    is_sharded = hasattr(weight, "ds_id") or weight.is_meta
    # Quantised weights are packed: neither two-dimensional nor floating-point.
    if is_sharded or weight.dim() != 2 or not weight.is_floating_point():
        return "the head's weights are not in memory as one matrix"
    return None


def _has_adapter(layer: nn.Module) -> bool:
    """Whether PEFT is around the head: its ``weight`` would be the frozen matrix, without the adapter."""
    return hasattr(layer, "base_layer")


@torch.no_grad()
def _mismatch(model: nn.Module, settings: HeadSettings) -> str | None:
    """How the formula of the head differs from the model's own logits; None where it agrees with them."""
    weight = model.get_output_embeddings().weight  # type: ignore[operator]
    recorded: dict[str, Tensor] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        recorded["hidden"] = output[0]

    # One forward gives both sides of the comparison, so dropout cannot make them differ.
    recording_hook = backbone_of(model).register_forward_hook(record)
    # Any ids serve; the remainder keeps them inside a vocabulary of fewer than 17 tokens.
    probe_ids = torch.arange(1, 17, device=weight.device)[None] % weight.size(0)
    # Autocast would round the two sides differently.
    with torch.autocast(weight.device.type, enabled=False):
        try:
            model_logits = model(input_ids=probe_ids, use_cache=False).logits.float()
            if "hidden" not in recorded:
                # The model ran a part of its backbone (BART, OPT), and the hook was not called.
                recorded["hidden"] = backbone_of(model)(input_ids=probe_ids, use_cache=False)[0]
        finally:
            recording_hook.remove()
        head = read_head(model, settings)
        logits = Predictions(recorded["hidden"], head).logits(torch.float32)
    # NaN equals nothing, so the comparison below would blame the formula of the head.
    if model_logits.isnan().any():
        raise ValueError(f"{type(model).__name__}: its logits are NaN; the weights are broken, or its dtype too narrow")
    if model_logits.shape != logits.shape:
        return f"logits have shape {tuple(model_logits.shape)}, the head gives {tuple(logits.shape)}"
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2  # bf16 logits keep 8 bits
    if not torch.allclose(model_logits, logits, rtol=0, atol=tolerance * float(model_logits.abs().max())):
        difference = float((model_logits - logits).abs().max())
        return f"the head's formula misses the model's logits by {difference:.2g}"
    return None
