"""Attention over segments: many sequences in one row without padding, and prompts that several answers share."""

import logging
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.data.batch import Batch, Layout, Segments
from rlhf.data.collate import Collator
from rlhf.kernels.recompute import mark_recomputable
from rlhf.models.positions import inputs_of

logger = logging.getLogger(__name__)

NAME = "rlhf_segments"


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
    """The attention function that transformers calls in each layer.

    Attention is quadratic in one span, never in the row; a branch's queries see the keys of its prompt and its own.
    A GPU in half precision takes torch's variable-length attention, everything else SDPA for each span.

    Args:
        query: [1, heads, T, D]. key, value: [1, kv_heads, T, D].
        sliding_window: a token sees this many, itself included, counted in positions of its own sequence.
        segments: the spans; without them (generation, padded rows), transformers' own SDPA answers.
    Returns:
        [1, T, heads, D]
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    for name in ("s_aux", "softcap", "position_bias"):  # sinks, soft-capping, ALiBi and relatives
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"segments know no {name}")
    if attention_mask is not None and attention_mask.numel():
        raise NotImplementedError("segments know no mask that the model makes")
    segments.attention_cache.setdefault("windows", set()).add(sliding_window)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout and query.size(-1) <= 256:
        return _varlen(query, key, value, segments, scaling, sliding_window), None
    lengths = [span.length for span in segments.spans]
    # One split and one concatenation: slices of the row would each be a gradient of the row's size.
    queries, keys, values = (t.split(lengths, dim=2) for t in (query, key, value))
    outputs = []
    for index, (length, parent, prefix) in enumerate(segments.spans):
        k, v = keys[index], values[index]
        if prefix:
            k = torch.cat((keys[parent][:, :, :prefix], k), dim=2)
            v = torch.cat((values[parent][:, :, :prefix], v), dim=2)
        mask = None
        if prefix or (sliding_window is not None and length > sliding_window):
            mask = _mask(segments, length, prefix, sliding_window, query)
        output = F.scaled_dot_product_attention(
            queries[index],
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.size(1) != key.size(1),
        )
        outputs.append(output.transpose(1, 2))
    if len(outputs) == 1:
        return outputs[0], None
    kept = [output.detach() for output in outputs]
    return mark_recomputable(torch.cat(outputs, dim=1), lambda: torch.cat(kept, dim=1)), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:  # fmt: skip
    """All spans in one call of torch's variable-length attention, each with the keys of ``[prefix, span]``."""
    name = ("varlen", query.device)
    if name not in segments.attention_cache:
        segments.attention_cache[name] = _plan(segments, query.device)
    index, starts_q, starts_k, longest_q, longest_k = segments.attention_cache[name]
    # Bottom-right alignment: the last query of a span sees all its keys.
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).index_select(0, index),
        value[0].transpose(0, 1).index_select(0, index),
        starts_q,
        starts_k,
        longest_q,
        longest_k,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.size(1) != key.size(1),
    )
    return output.unsqueeze(0)  # type: ignore[union-attr]


def _plan(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Rows of the keys in their order, cumulative lengths of queries and keys, and the longest of each."""
    starts = [0, *accumulate(span.length for span in segments.spans)]
    index, lengths_k = [], []
    for (length, parent, prefix), start in zip(segments.spans, starts, strict=False):
        if prefix:
            index.append(torch.arange(starts[parent], starts[parent] + prefix))
        index.append(torch.arange(start, start + length))
        lengths_k.append(prefix + length)
    starts_q, starts_k = (
        torch.tensor(x, dtype=torch.int32).to(device, non_blocking=True) for x in (starts, [0, *accumulate(lengths_k)])
    )
    longest_q = max(span.length for span in segments.spans)
    return torch.cat(index).to(device, non_blocking=True), starts_q, starts_k, longest_q, max(lengths_k)


def _mask(segments: Segments, length: int, prefix: int, window: int | None, like: Tensor) -> Tensor:
    """0 where a span's token sees a key of ``[prefix, span]``, else -inf."""
    key = (length, prefix, window, like.dtype, like.device)
    if key not in segments.attention_cache:
        position = torch.arange(prefix, prefix + length, device=like.device)[:, None]
        other = torch.arange(prefix + length, device=like.device)
        hidden = other > position
        if window is not None:
            hidden |= other <= position - window
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        segments.attention_cache[key] = mask.masked_fill_(hidden, -torch.inf)
    return segments.attention_cache[key]


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def choose_layout(model: nn.Module, wanted: str) -> Layout:
    """``"segments"`` where the model can (or must) take it, else ``"rows"``; says which, and why.

    Args:
        wanted: ``"auto"``, ``"segments"`` or ``"rows"``.
    Raises:
        ValueError: segments are asked for, and the model cannot take them.
    """
    if wanted == "rows":
        return "rows"
    reason = use_segments(model)
    if reason and wanted == "segments":
        raise ValueError(f"--layout segments: {type(model).__name__} cannot take it, {reason}; use --layout rows")
    if reason:
        logger.warning("%s: padded rows, because %s (exact, slower)", type(model).__name__, reason)
    return "rows" if reason else "segments"


def use_segments(model: nn.Module) -> str | None:
    """Let ``model`` read batches laid out in segments, if it can; returns the reason where it cannot.

    Its attention function becomes :func:`segment_attention`, which does what SDPA does for everything else. The
    model is then checked once: a shared prompt and packed sequences must give what separate rows give.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    whole: Any = model.config
    if whole._attn_implementation == NAME:
        return None
    if reason := unfit(model):
        return reason
    if whole.get_text_config()._attn_implementation != "sdpa":
        return f"its attention is {whole._attn_implementation}"
    training = model.training
    model.eval()
    examples = [
        {"prompt_ids": [5, 3, 4], "chosen_ids": [6, 7, 3, 2], "rejected_ids": [2, 4, 6]},
        {"prompt_ids": [2], "chosen_ids": [3, 4], "rejected_ids": [7]},
    ]
    size = whole.get_text_config().vocab_size
    examples = [{key: [i % size for i in ids] for key, ids in example.items()} for example in examples]
    try:
        want = _last_hidden(model, Collator()(examples))
        model.set_attn_implementation(NAME)  # type: ignore[operator]
        batch = Collator(layout="segments")(examples)
        assert batch.segments is not None
        got = _last_hidden(model, batch)
        tolerance = 1e-4 if want.dtype in (torch.float32, torch.float64) else 5e-2
        if not torch.allclose(got, want, rtol=0, atol=tolerance * float(want.abs().max())):
            reason = f"its hidden states differ from those of padded rows by {float((got - want).abs().max()):.2g}"
        elif _has_window(model) and not any(batch.segments.attention_cache["windows"]):  # longer than the examples
            reason = "its sliding window is in its mask alone"
    except Exception as error:  # whatever an unknown model raises, padded rows are the answer
        reason = f"it fails on them ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    finally:
        model.train(training)
    if reason:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return reason


def unfit(model: nn.Module) -> str | None:
    """Why no attention function of ours can serve ``model``, where that shows without running it."""
    whole: Any = model.config
    config = whole.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention", "attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    if any(getattr(p, "ds_id", None) is not None or p.is_meta for p in model.parameters()):
        return "its weights are not in memory"
    return None


def _has_window(model: nn.Module) -> bool:
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    kinds = getattr(config, "layer_types", None)
    return bool(getattr(config, "sliding_window", None)) and (not kinds or "sliding_attention" in kinds)


@torch.no_grad()
def _last_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """Hidden states that predict the scored tokens, [N, H]."""
    device = next(model.parameters()).device
    hidden = model.base_model(**inputs_of(model, batch.to(device)), use_cache=False)[0]  # type: ignore[operator]
    return hidden.reshape(-1, hidden.size(-1))[batch.targets.source]
