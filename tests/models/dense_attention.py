"""Attention over spans with a mask of T x T in float64, and stand-ins for functions that need a GPU."""

import itertools

import torch
from transformers import modeling_flash_attention_utils

from rlhf.data.segments import Span
from rlhf.models.attention_spans import ScoreOptions


def visible(spans, window=None):
    """Which row sees which, one row at a time: bool [T, T]."""
    starts = [0, *itertools.accumulate(span.length for span in spans)]
    seen = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
    for start, (length, parent, prefix) in zip(starts, spans, strict=False):
        keys = [*range(starts[parent], starts[parent] + prefix), *range(start, start + length)]
        for position in range(prefix, prefix + length):
            first = 0 if window is None else max(0, position - window + 1)
            seen[start + position - prefix, keys[first : position + 1]] = True
    return seen


def dense(query, key, value, spans, options):
    """Attention with a mask of T x T, in float64."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(query.size(1) // tensor.size(1), 1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (query.size(3) ** -0.5 if options.scaling is None else options.scaling)
    if options.softcap is not None:
        scores = options.softcap * (scores / options.softcap).tanh()
    scores = scores.masked_fill(~visible(spans, options.window).to(scores.device), -torch.inf)
    if options.sinks is not None:
        sinks = options.sinks.to(scores)[None, :, None, None].expand(1, -1, scores.size(2), 1)
        scores = torch.cat((scores, sinks), -1)
    return (scores.softmax(-1)[..., : key.size(2)] @ value).transpose(1, 2)


def variable_length(query, key, value, starts_q, starts_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
    """torch's ``varlen_attn`` as its documentation has it, one query at a time."""
    output = torch.zeros_like(query)
    ends_q, ends_k = starts_q[1:].tolist(), starts_k[1:].tolist()
    spans = list(zip(starts_q.tolist(), ends_q, starts_k.tolist(), ends_k, strict=False))
    assert longest_q == max(b - a for a, b, _, _ in spans) and longest_k == max(d - c for _, _, c, d in spans)
    assert ends_q[-1] == len(query) and ends_k[-1] == len(key)
    shared = query.size(1) // key.size(1) if enable_gqa else 1
    for a, b, c, d in spans:
        for q in range(a, b):
            last = d - (b - q)  # aligned at the bottom right
            first = c if window_size[0] < 0 else max(c, last - window_size[0])
            for head in range(query.size(1)):
                k, v = key[first : last + 1, head // shared], value[first : last + 1, head // shared]
                output[q, head] = (k @ query[q, head] * (scale or query.size(2) ** -0.5)).softmax(0) @ v
    return output


def flash_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, s_aux=None,
):  # fmt: skip
    """flash-attention's function as its documentation has it, with the sinks of version 3."""
    assert causal and not dropout_p and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    outputs = []
    for index, (start, end) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
        first, last = cu_seqlens_k[index : index + 2].tolist()
        window = None if window_size[0] < 0 else window_size[0] + 1
        # A prefix is a part of the keys, seen by all queries: the same as a span behind a span.
        spans = (Span(last - first - (end - start)), Span(end - start, 0, last - first - (end - start)))
        query = torch.cat((q.new_zeros(spans[0].length, *q.shape[1:]), q[start:end]))
        rows = [tensor.transpose(0, 1)[None] for tensor in (query, k[first:last], v[first:last])]
        options = ScoreOptions(softmax_scale, window, 0.0, softcap or None, s_aux)
        outputs.append(dense(*rows, spans, options)[0, spans[0].length :])
    return torch.cat(outputs)


def found_by_transformers(attend):
    """What transformers would return for an installed package with this function."""
    arguments = modeling_flash_attention_utils._lazy_define_process_function(attend)
    return (None, attend, None, None, None), (arguments, dict)
