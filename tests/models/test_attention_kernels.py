"""Each attention kernel against dense attention in float64 with an explicit mask, and which one is chosen when."""

import importlib
import itertools
from functools import partial

import pytest
import torch
from conftest import close

from rlhf.data.segments import Segments, Span
from rlhf.models import attention_flex, attention_varlen
from rlhf.models.attention_flex import BLOCK, attend_by_flex, block_mask
from rlhf.models.attention_kernels import AttentionCall, choose_kernel
from rlhf.models.attention_spans import ScoreOptions, attend_by_span
from rlhf.models.attention_varlen import attend_by_flash, attend_by_varlen

HEADS, KV_HEADS = 4, 2
SPANS = {
    "packed": (Span(5), Span(1), Span(8)),
    # Behind a prompt of several tokens, an empty answer, and a prompt of a single token.
    "shared": (Span(7), Span(4, 0, 3), Span(1, 0, 3), Span(0, 0, 7), Span(6), Span(2, 4, 6), Span(9, 4, 1)),
}
# Rows that fill no whole block, some blocks that are seen in full, and a branch over several blocks.
LONG_SPANS = {
    "packed": (Span(BLOCK + 3), Span(1), Span(3 * BLOCK), Span(17)),
    "shared": (Span(2 * BLOCK + 5), Span(BLOCK + 1, 0, 2 * BLOCK), Span(40, 0, 3), Span(BLOCK), Span(9, 3, 1)),
}
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
OPTIONS = {
    "plain": ScoreOptions(),
    "scaled": ScoreOptions(scaling=0.3),
    "a window": ScoreOptions(window=3),
    "a window of one": ScoreOptions(window=1),
    "soft-capped": ScoreOptions(softcap=0.7),
    "sinks": ScoreOptions(sinks=SINKS),
    "all": ScoreOptions(scaling=0.3, window=3, softcap=0.7, sinks=SINKS),
}
PLAIN = {name: options for name, options in OPTIONS.items() if options.softcap is None and options.sinks is None}


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


def inputs(spans, size=8, dtype=torch.float64, device="cpu", seed=0):
    total = sum(span.length for span in spans)
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, heads, total, size) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def with_gradients(attend, tensors):
    """The output, and the gradients of a weighted sum of it."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    output = attend(*tensors)
    # Small whole numbers, exact in any precision, and unlike for two entries side by side.
    weights = (torch.arange(output.numel(), device=output.device) % 7 - 3).view(output.shape).to(output)
    return [output, *torch.autograd.grad((output * weights).sum(), tensors)]


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


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("spans", SPANS)
def test_spans_one_by_one(spans, options):
    tensors = inputs(SPANS[spans])
    segments = Segments.of(SPANS[spans])
    want = with_gradients(lambda *qkv: dense(*qkv, SPANS[spans], OPTIONS[options]), tensors)
    for explicit in (True, False) if options in PLAIN else (True,):
        got = with_gradients(lambda *qkv: attend_by_span(*qkv, segments, OPTIONS[options], explicit=explicit), tensors)  # noqa: B023
        for tensor, expected in zip(got, want, strict=True):
            close(tensor, expected, torch.float64)


def test_sinks_learn():
    segments, (query, key, value) = Segments.of(SPANS["shared"]), inputs(SPANS["shared"])
    ours, theirs = (SINKS.clone().requires_grad_() for _ in range(2))
    got = attend_by_span(query, key, value, segments, ScoreOptions(sinks=ours), explicit=True)
    want = dense(query, key, value, SPANS["shared"], ScoreOptions(sinks=theirs))
    (got**2).sum().backward()
    (want**2).sum().backward()
    close(ours.grad, theirs.grad, torch.float64)


@pytest.mark.parametrize("options", PLAIN)
@pytest.mark.parametrize("spans", SPANS)
def test_variable_length_attention_is_told_the_same(spans, options, monkeypatch):
    monkeypatch.setattr(attention_varlen, "varlen_attn", variable_length)
    tensors, segments = inputs(SPANS[spans]), Segments.of(SPANS[spans])
    got = attend_by_varlen(*tensors, segments, OPTIONS[options])
    close(got, dense(*tensors, SPANS[spans], OPTIONS[options]), torch.float64)


def flash(monkeypatch):
    """What transformers would find for an installed flash-attention."""
    from transformers import modeling_flash_attention_utils as utils

    arguments = utils._lazy_define_process_function(flash_varlen)
    found = (None, flash_varlen, None, None, None), (arguments, dict)
    monkeypatch.setattr(attention_varlen, "lazy_import_flash_attention", lambda implementation: found)
    return attention_varlen.load_flash_attention("flash_attention_3")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("spans", SPANS)
def test_flash_attention_is_told_the_same(spans, options, monkeypatch):
    tensors, segments = inputs(SPANS[spans]), Segments.of(SPANS[spans])
    got = attend_by_flash(flash(monkeypatch), *tensors, segments, OPTIONS[options])
    close(got, dense(*tensors, SPANS[spans], OPTIONS[options]), torch.float64)


@pytest.mark.parametrize("options", ["plain", "a window", "all"])
@pytest.mark.parametrize("spans", SPANS)
def test_flex_attention_is_told_the_same(spans, options, monkeypatch):
    # Not compiled: the unfused form, which reads the mask of each entry and not the table of blocks.
    monkeypatch.setattr(attention_flex, "_compiled", lambda: attention_flex.flex_attention)
    unfused = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    monkeypatch.setattr(importlib.import_module("torch.nn.attention.flex_attention"), unfused, True)
    tensors, segments = inputs(SPANS[spans]), Segments.of(SPANS[spans])
    got = attend_by_flex(*tensors, segments, OPTIONS[options])
    close(got, dense(*tensors, SPANS[spans], OPTIONS[options]), torch.float32)


@pytest.mark.parametrize("window", [None, 1, 3, BLOCK - 1, BLOCK + 2])
@pytest.mark.parametrize("spans", LONG_SPANS)
def test_blocks_hold_what_is_seen(spans, window):
    """Blocks seen in part or in full are listed as such, by queries and, for the backward pass, by keys."""
    total = sum(span.length for span in LONG_SPANS[spans])
    mask = block_mask(Segments.of(LONG_SPANS[spans]), total, window)
    padded = mask.shape[-1]
    assert padded % BLOCK == 0 and 0 <= padded - total < BLOCK
    seen = torch.eye(padded, dtype=torch.bool)  # a row of padding sees itself
    seen[:total, :total] = visible(LONG_SPANS[spans], window)
    rows = torch.arange(padded)
    assert torch.equal(mask.mask_mod(0, 0, rows[:, None], rows[None]), seen)
    cells = [rows.split(BLOCK, dim=1) for rows in seen.split(BLOCK)]
    some = torch.tensor([[bool(cell.any()) for cell in row] for row in cells])
    every = torch.tensor([[bool(cell.all()) for cell in row] for row in cells])

    def listed(counts, order):
        table = torch.zeros_like(some)
        for row, count in enumerate(counts[0, 0].tolist()):
            table[row, order[0, 0, row, :count].long()] = True
        return table

    for side in ("kv", "q"):  # for each block of queries, and for each block of keys
        partial = listed(getattr(mask, f"{side}_num_blocks"), getattr(mask, f"{side}_indices"))
        full = listed(getattr(mask, f"full_{side}_num_blocks"), getattr(mask, f"full_{side}_indices"))
        if side == "q":
            partial, full = partial.T, full.T
        assert torch.equal(partial | full, some) and not (partial & full).any()
        assert not (full & ~every).any()
    # The blocks that make the difference in speed: seen by all queries, not at the row's end.
    assert window is not None or int(mask.full_kv_num_blocks.sum()) > 0


def call(dtype=torch.bfloat16, device="cuda", size=64, **changes):
    return AttentionCall(**{"device": device, "dtype": dtype, "head_size": size, "value_size": size, **changes})


FLASH_2 = frozenset({"dropout_p", "window_size", "softcap"})
FLASH_3 = frozenset({"window_size", "softcap", "s_aux"})
FLASH_4 = frozenset({"window_size", "softcap", "learnable_sink"})
CHOICES = {
    "half on a GPU": (call(), None, "varlen"),
    "float16 too": (call(torch.float16), None, "varlen"),
    "float32 on a GPU": (call(torch.float32), None, "sdpa"),
    "a CPU": (call(device="cpu"), None, "sdpa"),
    "a window": (call(has_window=True), None, "varlen"),
    "the largest head": (call(size=256), None, "varlen"),
    "no multiple of 8": (call(size=100), None, "flex"),
    "values of another size": (call(value_size=32), None, "flex"),
    "too large": (call(size=512), None, "sdpa"),
    "too small": (call(size=4), None, "sdpa"),
    "dropout": (call(has_dropout=True), None, "sdpa"),
    "a softcap": (call(has_softcap=True), None, "flex"),
    "sinks": (call(has_sinks=True), None, "flex"),
    "a softcap and dropout": (call(has_softcap=True, has_dropout=True), None, "explicit"),
    "sinks in float32": (call(torch.float32, has_sinks=True), None, "explicit"),
    "a softcap on a CPU": (call(device="cpu", has_softcap=True), None, "explicit"),
    "flash": (call(), FLASH_2, "flash"),
    "flash, dropout": (call(has_dropout=True), FLASH_2, "flash"),
    "flash 3 has no dropout": (call(has_dropout=True), FLASH_3, "sdpa"),
    "flash, a softcap": (call(has_softcap=True), FLASH_2, "flash"),
    "flash 2 has no sinks": (call(has_sinks=True), FLASH_2, "flex"),
    "flash 3, sinks": (call(has_sinks=True), FLASH_3, "flash"),
    "flash 4, sinks": (call(has_sinks=True), FLASH_4, "flash"),
    "flash, float32": (call(torch.float32), FLASH_2, "sdpa"),
    "a flash without windows": (call(has_window=True), frozenset(), "varlen"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_fastest_exact_kernel_is_chosen(case):
    asked, flash_options, kernel = CHOICES[case]
    assert choose_kernel(asked, flash_options) == kernel


# On a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
BY_SPAN = {explicit: partial(attend_by_span, explicit=explicit) for explicit in (True, False)}
ON_GPU = {
    "varlen": (attend_by_varlen, PLAIN, (64, 128), (torch.bfloat16, torch.float16)),
    "flex": (attend_by_flex, OPTIONS, (64,), (torch.bfloat16,)),
    "flex, no multiple of 8": (attend_by_flex, {"a window": OPTIONS["a window"]}, (100,), (torch.float16,)),
    "explicit": (BY_SPAN[True], {"all": OPTIONS["all"]}, (64,), (torch.bfloat16,)),
    "sdpa": (BY_SPAN[False], PLAIN, (64,), (torch.bfloat16,)),
}


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kernel", ON_GPU)
def test_on_a_gpu(kernel):
    torch.compiler.reset()  # a process keeps eight variants of a compiled function
    attend, all_options, sizes, dtypes = ON_GPU[kernel]
    for spans in (*SPANS.values(), *LONG_SPANS.values()):
        segments = Segments.of(spans).to("cuda")
        for (name, options), size, dtype in itertools.product(all_options.items(), sizes, dtypes):
            tensors = inputs(spans, size, dtype, "cuda")
            if options.sinks is not None:
                options = options._replace(sinks=SINKS.to("cuda"))
            got = with_gradients(lambda *qkv: attend(*qkv, segments, options), tensors)  # noqa: B023
            want = with_gradients(lambda *qkv: dense(*qkv, spans, options), [t.double() for t in tensors])  # noqa: B023
            for tensor, exact in zip(got, want, strict=True):
                # A window of one token leaves queries and keys without gradient: there the error is absolute.
                size_of_exact = exact.norm() if exact.norm() > 1e-6 else exact.numel() ** 0.5
                error = (tensor.double() - exact).norm() / size_of_exact
                assert error < {torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype], (name, size, dtype, float(error))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_no_layer_waits_for_the_device(kernel):
    spans = LONG_SPANS["shared"]
    attend, *_ = ON_GPU[kernel]
    tensors = inputs(spans, 64, torch.bfloat16, "cuda")
    attend(*tensors, Segments.of(spans).to("cuda"), ScoreOptions(window=70))  # compiles
    segments = Segments.of(spans)
    torch.cuda.set_sync_debug_mode("error")
    try:
        # A pageable copy would wait, and so would any value that the host reads.
        attend(*tensors, segments.pin_memory().to("cuda", non_blocking=True), ScoreOptions(window=70))
    finally:
        torch.cuda.set_sync_debug_mode("default")
