"""Each attention kernel against dense attention in float64 with an explicit mask, and which one is chosen when."""

import importlib
import itertools
from functools import partial

import pytest
import torch
from conftest import close
from dense_attention import dense, flash_varlen, found_by_transformers, variable_length, visible

from rlhf.data.segments import Segments, Span
from rlhf.models import attention, attention_flex, attention_varlen
from rlhf.models.attention import attend
from rlhf.models.attention_flex import BLOCK, attend_by_flex, block_mask
from rlhf.models.attention_kernels import AttentionCall, choose_kernel
from rlhf.models.attention_spans import ScoreOptions, attend_by_span
from rlhf.models.attention_varlen import attend_by_varlen

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


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("spans", SPANS)
def test_flash_attention_is_told_the_same(spans, options, monkeypatch):
    monkeypatch.setattr(attention_varlen, "lazy_import_flash_attention", lambda _: found_by_transformers(flash_varlen))
    tensors, segments = inputs(SPANS[spans]), Segments.of(SPANS[spans])
    flash = attention_varlen.load_flash_attention("flash_attention_3")
    got = flash.attend_spans(*tensors, segments, OPTIONS[options])
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


@pytest.mark.slow
def test_a_soft_cap_is_compiled():
    """By torch's compiler for a CPU: a number that a score function reads must be no input of the graph."""
    tensors = [tensor.float() for tensor in inputs(LONG_SPANS["shared"], 64)]
    for softcap in (0.7, 5.0):
        options = ScoreOptions(softcap=softcap)
        with torch.no_grad():
            got = attend_by_flex(*tensors, Segments.of(LONG_SPANS["shared"]), options)
        close(got, dense(*tensors, LONG_SPANS["shared"], options), torch.float32)


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


# What a device computes wrongly is not used


def broken(*arguments):
    raise RuntimeError("no valid triton configs\nmore")


def wrong_gradient(query, key, value, segments, options):
    output = attend_by_span(query, key, value, segments, options, explicit=False)
    return output + 0.1 * (key - key.detach()).transpose(1, 2).repeat_interleave(2, 2)


def right(query, key, value, segments, options):
    return attend_by_span(query, key, value, segments, options, explicit=True)


TRIALS = {
    "an error": (broken, "attention by varlen is not used here: RuntimeError: no valid triton configs (exact, slower)"),
    "a wrong gradient": (wrong_gradient, "it is off by "),
    "exact": (right, None),
}


@pytest.mark.parametrize("case", TRIALS)
def test_a_kernel_is_tried_before_it_is_used(case, monkeypatch, caplog):
    kernel, warning = TRIALS[case]
    calls = []

    def counted(*arguments):
        calls.append(1)
        return kernel(*arguments)

    monkeypatch.setattr(attention, "attend_by_varlen", counted)
    monkeypatch.setattr(attention, "choose_kernel", lambda call, flash: "varlen")
    segments, state = Segments.of(SPANS["shared"]), torch.get_rng_state()
    tensors = [tensor.bfloat16() for tensor in inputs(SPANS["shared"])]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # which the trial is free of
        outputs = [attend(*tensors, None, segments, sliding_window=3) for _ in range(3)]
    for output in outputs:
        close(output, dense(*tensors, SPANS["shared"], OPTIONS["a window"]), torch.bfloat16)
    assert torch.equal(state, torch.get_rng_state())
    if warning is None:
        assert len(calls) == 1 + 3 and not caplog.text
    else:
        assert len(calls) == 1 and caplog.text.count(warning) == 1


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
