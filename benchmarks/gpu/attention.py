"""Attention of segments: exact against padded rows in float64, and the time of one layer."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.measuring import Results, Row, Setup, llama, random_rows, relative_error, time_and_memory

TITLE = "Attention of one layer, forward and backward"
TITLE_OF_ACCURACY = "Segments against padded rows in float64"
TEXTS = [70, 3, 129, 64]
PAIRS = [(40, 30, 20), (1, 1, 2), (130, 60, 7)]


def measure_accuracy(setup: Setup) -> Results:
    results = Results(setup)
    makers: dict[str, Callable[[], Any]] = {
        "Llama": lambda: llama(setup),
        "Llama, heads of 72": lambda: llama(setup, hidden_size=576),
        "Mistral, window of 16": lambda: _mistral(setup),
        "Gemma 2, capped scores": lambda: _gemma(setup),
    }
    if setup.tiny:
        makers = dict(itertools.islice(makers.items(), 1))
    for (family, make), (rows, lengths) in itertools.product(makers.items(), (("texts", TEXTS), ("pairs", PAIRS))):
        for weights, autocast in ((torch.bfloat16, False), (torch.float32, True)):
            labels = {"model": family, "rows": rows, "weights": str(weights).removeprefix("torch.")}
            results.measure(labels, _errors, setup, make, lengths, weights, autocast)
    return results


def _mistral(setup: Setup) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=1000, sliding_window=16,
    )  # fmt: skip
    with torch.device(setup.device):
        return MistralForCausalLM(config)


def _gemma(setup: Setup) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        head_dim=32, vocab_size=1000, query_pre_attn_scalar=32, attn_logit_softcapping=5.0,
    )  # fmt: skip
    with torch.device(setup.device):
        return Gemma2ForCausalLM(config)


def _errors(setup: Setup, make: Callable[[], Any], lengths: Any, weights: torch.dtype, autocast: bool) -> Row:
    from rlhf.data import Collator
    from rlhf.models import Policy, use_segments

    model = make().to(weights)
    exact_model = copy.deepcopy(model).double()
    rows = random_rows(lengths, 1000)
    wanted = Policy(exact_model)(Collator()(rows).to(setup.device)).logps
    wanted.sum().backward()
    reason = use_segments(model)
    batch = Collator(layout="rows" if reason else "segments")(rows).to(setup.device)
    policy = Policy(model)
    with torch.autocast(setup.device.type, torch.bfloat16, enabled=autocast):
        logps = policy(batch).logps
    logps.sum().backward()
    pairs = zip(model.named_parameters(), exact_model.parameters(), strict=True)
    errors = [
        relative_error(parameter.grad, exact.grad)
        for (name, parameter), exact in pairs
        if "q_proj" in name or "k_proj" in name
    ]
    return {
        "layout": reason or "segments",
        "log-probs": float((logps.double() - wanted).detach().abs().max()),
        "gradients of queries and keys": max(errors),
    }


def measure(setup: Setup) -> Results:
    """Our attention as a layer calls it, in the layouts of the table in docs/benchmarks.md."""
    from rlhf.data.segments import Segments, Span

    results = Results(setup)
    total = 512 if setup.tiny else 16_384
    third = total // 48
    layouts = {f"{count} spans of {total // count}": (Span(total // count),) * count for count in (8, 64, 256)}
    # The first branch of a pair comes with its prompt; the second sees the prompt of the first.
    pairs = [span for pair in range(16) for span in (Span(2 * third), Span(third, 2 * pair, third))]
    layouts[f"16 pairs, prompt and answers of {third}"] = tuple(pairs)
    for (name, spans), dtype in itertools.product(layouts.items(), (torch.bfloat16, torch.float32)):
        labels = {"layout": name, "queries and keys": str(dtype).removeprefix("torch.")}
        results.measure(labels, _timed, setup, Segments.of(spans).to(setup.device), dtype)
    return results


def _timed(setup: Setup, segments: Any, dtype: torch.dtype) -> Row:
    from rlhf.models.attention import segment_attention

    heads, key_heads, size = (4, 2, 32) if setup.tiny else (32, 8, 128)
    total = sum(span.length for span in segments.spans)
    query, key, value = (
        torch.randn(1, count, total, size, device=setup.device, dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    )
    # Under autocast rotary embeddings give float32 queries and keys beside bfloat16 values.
    query, key = (tensor.detach().to(dtype).requires_grad_() for tensor in (query, key))
    layer = nn.Identity()
    layer.is_causal = True  # type: ignore[assignment]

    def run() -> None:
        query.grad = key.grad = value.grad = None
        with torch.autocast(setup.device.type, torch.bfloat16):
            output, _ = segment_attention(layer, query, key, value, None, segments=segments)
        output.sum().backward()

    products = sum(4 * span.length * (span.prefix + span.length / 2) for span in segments.spans) * heads * size
    figures = time_and_memory(setup, run)
    return {**figures, "TFLOP/s": 3.5 * products / figures["ms"] / 1e9}
