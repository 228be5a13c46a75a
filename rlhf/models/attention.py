"""Attention over segments: many sequences in one row without padding, and prompts that several answers share."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from rlhf.data.segments import Segments
from rlhf.kernels.autocast import dtype_under_autocast
from rlhf.models.attention_flex import attend_by_flex
from rlhf.models.attention_kernels import HALF, AttentionCall, choose_kernel
from rlhf.models.attention_spans import ScoreOptions, attend_by_span
from rlhf.models.attention_trials import is_exact
from rlhf.models.attention_varlen import FlashAttention, attend_by_varlen, load_flash_attention

NAME = "rlhf_segments"  # in place of "sdpa"
EAGER_NAME = "rlhf_segments_eager"  # in place of "eager", for models whose scores SDPA does not know
UNKNOWN_PARTS = ("position_bias",)  # ALiBi and relative positions


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer, in place of ``"sdpa"``.

    Attention is quadratic in one span, never in the row; a branch's queries see the keys of its prompt and its own.
    :func:`rlhf.models.attention_kernels.choose_kernel` chooses how it is computed.

    Args:
        module: the layer.
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, D'].
        attention_mask: empty with segments.
        dropout: of the attention probabilities.
        scaling: of the scores; 1 / sqrt(D) by default.
        sliding_window: a token sees this many, itself included, counted in positions of its own sequence.
        segments: the spans; without them (generation, padded rows), transformers' own SDPA answers.
        kwargs: what else a layer passes: a ``softcap``, sinks as ``s_aux``.
    Returns:
        [1, T, heads, D'], and no attention probabilities.
    Raises:
        NotImplementedError: the layer has a part that segments do not know, such as a position bias.
    """
    options = dict(dropout=dropout, scaling=scaling, sliding_window=sliding_window, **kwargs)
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return attend(query, key, value, attention_mask, segments, **options), None


def eager_segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`segment_attention`, in place of ``"eager"``.

    Args:
        module: the layer.
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, D'].
        attention_mask: empty with segments.
        segments: the spans; without them, the function that the model's own file defines answers.
        kwargs: what else a layer passes.
    Returns:
        [1, T, heads, D'], and the attention probabilities where there are no segments.
    """
    if segments is None:
        # Models without SDPA define how their scores become probabilities in their own file.
        own_attention = sys.modules[type(module).__module__].eager_attention_forward
        return own_attention(module, query, key, value, attention_mask, **kwargs)
    return attend(query, key, value, attention_mask, segments, **kwargs), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    flash: FlashAttention | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention over segments, by the kernel that fits.

    Args:
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, D'].
        attention_mask: must be empty: the segments say what is seen.
        segments: the spans.
        dropout: of the attention probabilities.
        scaling: of the scores; 1 / sqrt(D) by default.
        sliding_window: a token sees this many, itself included.
        softcap: of the scores.
        s_aux: [heads], sinks, as transformers calls them.
        flash: the flash-attention function that the user chose.
        kwargs: what else a layer passes.
    Returns:
        [1, T, heads, D'].
    Raises:
        NotImplementedError: a mask, or a part of a layer that segments do not know.
    """
    for name in UNKNOWN_PARTS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"segments know no {name}")
    if attention_mask is not None and attention_mask.numel():
        raise NotImplementedError("segments know no mask that the model makes")
    if segments.windows_seen is not None:
        segments.windows_seen.add(sliding_window)
    device = query.device.type
    # Rotary embeddings in float32 give a float32 query and key beside a half-precision value. Cast as autocast casts
    # what enters torch's own attention.
    query, key, value = (tensor.to(dtype_under_autocast(tensor.dtype, device)) for tensor in (query, key, value))
    if segments.gather is not None:
        key, value = _gathered(key, value, segments.gather)
    call = AttentionCall(
        device,
        query.dtype,
        head_size=query.size(-1),
        value_size=value.size(-1),
        has_window=sliding_window is not None,
        has_dropout=dropout > 0,
        has_softcap=softcap is not None,
        has_sinks=s_aux is not None,
        is_part=segments.gather is not None,
    )
    options = ScoreOptions(scaling, sliding_window, dropout, softcap, s_aux)
    kernel = choose_kernel(call, None if flash is None else flash.options)
    kernels = {"flash": flash and flash.attend_spans, "varlen": attend_by_varlen, "flex": attend_by_flex}
    in_one_call = kernels.get(kernel)
    if in_one_call is not None and is_exact(kernel, in_one_call, call, query, key):
        return in_one_call(query, key, value, segments, options)
    return attend_by_span(query, key, value, segments, options, explicit=call.needs_explicit_scores)


def _gathered(key: Tensor, value: Tensor, gather: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The keys and values of all processes, in one message."""
    sizes = [key.size(-1), value.size(-1)]
    rows = torch.cat((key, value), dim=-1)[0].transpose(0, 1)  # [t, kv_heads, D + D']
    whole = gather(rows).transpose(0, 1)[None]
    whole_key, whole_value = whole.split(sizes, dim=-1)
    return whole_key, whole_value


def is_flash(implementation: str) -> bool:
    """Whether this is flash-attention: a package, or a kernel of the hub.

    Args:
        implementation: the name that transformers has for it.
    Returns:
        True for both.
    """
    return is_flash_attention_requested(requested_attention_implementation=implementation)


def register_flash(implementation: str) -> bool:
    """Let a flash-attention of transformers take segments; without them it stays as it is.

    Its name stays too, because transformers finds the kernel by it.

    Args:
        implementation: the name that transformers has for it.
    Returns:
        Whether it can take them.
    """
    if _is_ours(implementation):
        return True
    flash = load_flash_attention(implementation)
    if flash is not None:
        AttentionInterface.register(implementation, _flash_segment_attention(flash))
    return flash is not None


def _flash_segment_attention(flash: FlashAttention) -> Callable[..., tuple[Tensor, None]]:
    def flash_segment_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if segments is None:
            if _takes_sdpa(query, attention_mask, kwargs):
                mask = _sdpa_mask(module, query.size(2), key.size(2), kwargs, query.device)
                return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
            return flash_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return attend(query, key, value, attention_mask, segments, flash=flash, **kwargs), None

    flash_segment_attention.takes_segments = True  # type: ignore[attr-defined]
    return flash_segment_attention


def _takes_sdpa(query: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether SDPA must and can stand in for flash-attention, which takes half precision on a GPU alone.

    The few tokens by which a model is checked before training are in the dtype of its weights, without autocast.
    """
    is_half = dtype_under_autocast(query.dtype, query.device.type) in HALF
    changes_scores = any(options.get(name) is not None for name in ("softcap", "s_aux"))
    return not (is_half and query.is_cuda) and attention_mask is None and not changes_scores


def _sdpa_mask(
    module: nn.Module, num_queries: int, num_keys: int, options: dict[str, Any], device: torch.device
) -> Tensor | None:
    """What flash-attention sees without a mask, for SDPA: bool [queries, keys]; None where SDPA needs none either."""
    is_causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return None
    window = options.get("sliding_window") or num_keys
    if window >= num_keys and num_queries in (1, num_keys):
        return None
    # The last query is at the last key: behind keys of a cache, SDPA would begin at the first one.
    query_position = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_position = torch.arange(num_keys, device=device)
    return (key_position <= query_position) & (key_position > query_position - window)


def _is_ours(implementation: str) -> bool:
    return getattr(ALL_ATTENTION_FUNCTIONS.get(implementation), "takes_segments", False)


def reads_segments(config: Any) -> bool:
    """Whether the attention of a model takes segments; another one would ignore them.

    Args:
        config: of the model.
    Returns:
        True after :func:`rlhf.models.use_segments`.
    """
    implementation = config._attn_implementation
    return implementation in (NAME, EAGER_NAME) or (implementation is not None and _is_ours(implementation))


AttentionInterface.register(NAME, segment_attention)
AttentionInterface.register(EAGER_NAME, eager_segment_attention)
# transformers looks for a mask under the same name; padded rows still need the mask of SDPA.
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionMaskInterface.register(EAGER_NAME, eager_mask)
