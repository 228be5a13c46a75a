"""Trials of models in half precision: a real checkpoint's attention is sharp, and roundings grow from layer to layer.

SmolLM2-135M in bf16: its logits with eager attention and with SDPA differ by 25 where the largest is 33.
"""

import pytest
import torch
from conftest import tiny_model

from rlhf.models import attention_spans, use_segments
from rlhf.models.positions import finds_own_positions, reads_padding, sees_ahead
from rlhf.models.single_precision import run_trial, tolerance_of
from rlhf.rollouts import LocalEngine, Sampling

IDS = torch.tensor([[5, 3, 4, 6, 2, 7, 9, 11]])


def sharp_model(dtype: torch.dtype):
    """Roundings to half precision change its logits by a fifth of their size, those of SmolLM2 by all of it."""
    model = tiny_model("llama", num_hidden_layers=4).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight *= 5
    return model.to(dtype)


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


def relative_difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_roundings_do_not_look_like_faults(dtype, autocast, tokenizer):
    exact, rounded = sharp_model(torch.float32), sharp_model(torch.bfloat16)
    assert relative_difference(logits(rounded), logits(exact)) > 0.1  # no tolerance allows that
    model = sharp_model(dtype)
    engine = LocalEngine(model, tokenizer, autocast=autocast)
    engine.generate([[5, 6, 7]], 1, Sampling(max_tokens=2), 0)
    assert engine._fallback_reason is None
    assert engine._generate_cache_is_exact(torch.device("cpu"))
    assert use_segments(model) is None
    assert not sees_ahead(model) and not reads_padding(model) and not finds_own_positions(model)
    assert all(weight.dtype == dtype for weight in model.parameters())


def test_a_small_fault_shows_in_half_precision(monkeypatch):
    """Keys that are 1 % too large: the tolerance of half precision hid this."""
    by_span = attention_spans._by_span
    monkeypatch.setattr(attention_spans, "_by_span", lambda rows, segments: by_span(rows * 1.01, segments))
    reason = use_segments(tiny_model("llama").bfloat16())
    assert reason.startswith("its hidden states differ from those of padded rows")


def test_a_trial_runs_in_float32_and_leaves_no_trace():
    model = sharp_model(torch.bfloat16)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = run_trial(model, lambda: logits(model))
            assert torch.is_autocast_enabled("cpu")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    # bf16 weights are numbers of float32 too, so nothing but the products is rounded differently.
    assert relative_difference(found, logits(sharp_model(torch.bfloat16).float())) < 1e-5
    assert logits(model).equal(logits(sharp_model(torch.bfloat16)))


def test_without_float32_the_trial_runs_as_the_model_is():
    """Some operators of experts know half precision alone, and memory may be too small for a copy of a weight."""
    model = sharp_model(torch.bfloat16)

    def trial():
        hidden = model.get_input_embeddings()(IDS)
        if hidden.dtype != torch.bfloat16:
            raise RuntimeError("expected bfloat16")
        return hidden

    found = run_trial(model, trial)
    assert found.dtype == torch.bfloat16 and tolerance_of(model, found) == 5e-2
    with pytest.raises(RuntimeError, match="expected bfloat16"):
        run_trial(model.float(), trial)
