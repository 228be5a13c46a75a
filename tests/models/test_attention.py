"""A batch in segments gives what every sequence gives by itself, in every family; what cannot takes padded rows."""

import copy
import json
import re

import pytest
import torch
from conftest import ARCHITECTURES, close, tiny_model
from dense_attention import flash_varlen, found_by_transformers
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, PreTrainedModel

from rlhf.data import Batch, Collator
from rlhf.data.segments import Segments, Span
from rlhf.logprobs import Targets
from rlhf.models import Policy, attention, attention_spans, attention_varlen, choose_layout, use_segments
from rlhf.models.attention import NAME, segment_attention
from rlhf.models.attention_kernels import choose_kernel

WINDOW = 4  # shorter than most sequences below
MIXED = ["sliding_attention", "full_attention"]
FAMILIES = {name: (name, {}) for name in ARCHITECTURES if name != "gemma2"} | {
    "mistral, windows": ("llama", dict(model_type="mistral", sliding_window=WINDOW)),
    "phi3, windows": ("llama", dict(model_type="phi3", sliding_window=WINDOW)),
    "qwen2, some windows": ("qwen2", dict(use_sliding_window=True, sliding_window=WINDOW, layer_types=MIXED)),
    # Scores that are soft-capped, strongly enough to show; sinks of each head.
    "gemma2, some windows": (
        "gemma2",
        dict(head_dim=16, attn_logit_softcapping=0.5, sliding_window=WINDOW, layer_types=MIXED),
    ),
    "gpt_oss, some windows": (
        "llama",
        dict(model_type="gpt_oss", num_local_experts=4, head_dim=16, sliding_window=WINDOW, layer_types=MIXED),
    ),
    "gemma3, some windows": (
        "qwen3",
        dict(model_type="gemma3_text", sliding_window=WINDOW, layer_types=MIXED, query_pre_attn_scalar=8),
    ),
}

EAGER_FAMILIES = ["gemma2, some windows", "gpt_oss, some windows"]  # whose scores SDPA does not know


def ids(seed, length):
    return torch.randint(1, 330, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# Prompts, each with its completions.
CASES = {
    "rows packed": [(ids(1, 5), [ids(2, 6)]), (ids(3, 2), [ids(4, 9)]), (ids(5, 1), [ids(6, 1)])],
    "pairs": [(ids(1, 6), [ids(2, 7), ids(3, 4)]), (ids(4, 3), [ids(5, 1), ids(6, 8)])],
    "groups": [(ids(1, 7), [ids(2, 5), ids(3, 1), ids(4, 6), ids(5, 3)]), (ids(6, 2), [ids(7, n) for n in (2, 9, 4)])],
    "an empty prompt": [
        ([], [ids(1, 6), ids(2, 5)]),
        (ids(3, 4), [ids(4, 3), ids(5, 2)]),
        ([], [ids(6, 1), ids(7, 7)]),
    ],
    "a prompt of one token": [(ids(1, 1), [ids(2, 6), ids(3, 1)]), (ids(4, 1), [ids(5, 2), ids(6, 5)])],
    "an empty answer": [(ids(1, 3), [ids(2, 6), []]), (ids(3, 2), [[], ids(4, 5)])],
    "a batch of one row": [(ids(1, 3), [ids(2, 8)])],
    "a batch of one pair": [(ids(1, 5), [ids(2, 2), ids(3, 6)])],
}


def collated(groups, layout="segments"):
    """The collator's batch of what it knows: single rows, or pairs."""
    if len(groups[0][1]) == 1:
        rows = [{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, (c,) in groups]
    else:
        rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, (c, r) in groups]
    return Collator(layout=layout)(rows)


def laid_out(groups):
    """The same by hand, and for groups of any size: the first completion follows its prompt, the rest branch off."""
    row, positions, spans, scored, count = [], [], [], [], 0
    for prompt, completions in groups:
        root, start = len(spans), len(row)
        for completion in completions:
            branches = bool(prompt) and len(spans) > root
            own = completion if branches else prompt + completion
            after = len(row) + len(own) - len(completion)  # where the completion begins
            sources = [start + len(prompt) - 1 if branches else after - 1, *range(after, len(row) + len(own) - 1)]
            entries = zip(sources[: len(completion)], completion, [count] * len(completion), strict=True)
            scored += list(entries) if prompt else list(entries)[1:]  # nothing predicts the first token of all
            before = len(prompt) if branches else 0
            spans.append(Span(len(own), root if branches else -1, before))
            positions += range(before, before + len(own))
            row += own
            count += 1
    flat = torch.tensor([row])
    targets = Targets(*torch.tensor(scored).unbind(1), count)
    return Batch(flat, torch.ones_like(flat), torch.tensor([positions]), targets, Segments.of(tuple(spans)))


def batch_of(case):
    return laid_out(CASES[case]) if case == "groups" else collated(CASES[case])


def build(family, dtype=torch.float32):
    name, changes = FAMILIES[family]
    return tiny_model(name, **changes).to(dtype)


@pytest.fixture(scope="module", params=FAMILIES)
def both(request):
    """A model as it is, and the same one ready for segments."""
    own, model = build(request.param), build(request.param)
    assert use_segments(model) is None and own.config._attn_implementation in ("sdpa", "eager")
    return own, model, copy.deepcopy(own.state_dict())


def apart(model, groups):
    """Hidden states and log-probs of the scored tokens: each sequence alone, dense logits, transformers' attention."""
    found = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: found.append(output[0]))
    hidden, logps = [], []
    for prompt, completions in groups:
        for completion in completions:
            row, first = torch.tensor([prompt + completion]), max(len(prompt), 1)
            dense = model(row).logits[0, first - 1 : -1].log_softmax(-1)
            logps.append(dense.gather(1, row[0, first:, None])[:, 0])
            hidden.append(found.pop()[0, first - 1 : -1])
    hook.remove()
    return torch.cat(hidden), torch.cat(logps)


def together(model, batch):
    found = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: found.append(output[0]))
    logps = Policy(model)(batch).logps
    hook.remove()
    return found[-1].flatten(0, 1)[batch.targets.source], logps


def loss_of(logps):
    """Neither linear nor alike for two tokens, so that nothing can be swapped unseen."""
    return (torch.linspace(-1, 2, len(logps), dtype=logps.dtype) * (logps / 5) ** 2).mean()


def step(model, start, read):
    """Hidden states, log-probs, loss, gradients and new weights of one step from ``start``."""
    model.load_state_dict(start)
    model.zero_grad()
    hidden, logps = read(model)
    loss = loss_of(logps)
    loss.backward()
    found = {"hidden": hidden, "logps": logps, "loss": loss}
    found |= {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters()}
    # Adam divides by the gradient's size; eps lies above the rounding of those that are zero (biases of keys).
    torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3).step()
    return {name: t.detach().clone() for name, t in {**found, **dict(model.named_parameters())}.items()}


def agree(got, want):
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name])


@pytest.mark.parametrize("case", CASES)
def test_segments_are_the_sequences_apart(both, case):
    own, model, start = both
    want = step(own, start, lambda m: apart(m, CASES[case]))
    agree(step(model, start, lambda m: together(m, batch_of(case))), want)
    moved = [name for name in start if name in want and not torch.equal(start[name], want[name])]
    assert len(moved) > len(start) // 2


@pytest.mark.parametrize("case", [case for case in CASES if case != "groups"])
def test_the_collator_lays_out_as_by_hand(case):
    got, want = collated(CASES[case]), laid_out(CASES[case])
    assert got.segments.spans == want.segments.spans
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    for name in ("source", "token", "sequence"):
        assert torch.equal(getattr(got.targets, name), getattr(want.targets, name))
    assert got.targets.num_sequences == want.targets.num_sequences


def ready(family):
    model = build(family)
    assert use_segments(model) is None
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "mistral, windows", *EAGER_FAMILIES])
def test_neighbours_never_see_each_other(family):
    """What a neighbour, or the other answer, says does not change a bit; what the prompt says does."""
    policy = Policy(ready(family))
    groups = CASES["pairs"]

    def logps(*changed):
        a, b = copy.deepcopy(groups)
        for group, part, place in changed:
            where = (a, b)[group][0] if part is None else (a, b)[group][1][part]
            where[place] = where[place] % 300 + 1
        batch = collated([a, b])
        with torch.no_grad():
            found = policy(batch).logps
        return [found[batch.targets.sequence == s] for s in range(4)]

    before = logps()
    for changes, alike in (
        ([(0, None, 0), (0, 0, 2), (0, 1, 0)], {2, 3}),  # all of the first pair: the second stays
        ([(1, None, 1), (1, 1, 3)], {0, 1}),
        ([(0, 0, 0)], {1, 2, 3}),  # chosen: rejected stays
        ([(1, 1, 2)], {0, 1, 2}),
    ):
        after = logps(*changes)
        assert {s for s in range(4) if torch.equal(before[s], after[s])} == alike


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3, some windows", *EAGER_FAMILIES])
def test_gradients_under_checkpointing(family):
    batch, model = batch_of("pairs"), ready(family)
    start = copy.deepcopy(model.state_dict())
    want = step(model, start, lambda m: together(m, batch))
    model.train().activation_checkpointing_enable()
    calls = []  # those that learn: a policy tries its model without gradient first
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    agree(step(model, start, lambda m: together(m, batch_of("pairs"))), want)
    assert sum(calls) == 2  # computed again, so it was on


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral, windows", "gemma3, some windows", *EAGER_FAMILIES])
def test_generation_and_padded_rows_stay_as_they_were(family):
    own, model = build(family), ready(family)
    prompts = [ids(1, 9), ids(2, 3)]
    width = max(map(len, prompts))
    rows = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=329, pad_token_id=0)
    assert torch.equal(model.generate(rows, **options), own.generate(rows, **options))
    padded = collated(CASES["pairs"], "rows")
    with torch.no_grad():
        assert torch.equal(Policy(model)(padded).logps, Policy(own)(padded).logps)


def test_a_checkpoint_does_not_name_our_attention(tmp_path):
    ready("llama").save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_an_adapter_does_not_hide_the_model():
    model = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", r=2))
    assert choose_layout(model, "auto") == "segments" and model.config._attn_implementation == NAME
    Policy(model)(batch_of("pairs"))


# What cannot take segments

_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
_LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_group=1)
UNFIT = {
    "bloom": (dict(n_layer=2, n_head=4), "its attention cannot be replaced"),  # ALiBi
    "falcon": (dict(alibi=True), "its attention cannot be replaced"),
    "rwkv": ({}, "its attention cannot be replaced"),
    "mamba": (dict(state_size=8), "it has layers of linear_attention"),
    "jamba": (dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8), "it has layers of linear_attention"),
    "lfm2": (dict(layer_types=["conv", "full_attention"]), "it has layers of conv"),
    "llama4_text": (dict(num_local_experts=2, intermediate_size_mlp=64), "it has layers of chunked_attention"),
    "deepseek_v32": (dict(n_routed_experts=4, num_key_value_heads=4, **_LATENT), "it has layers of indexed_attention"),
    # Found out by the run: a mask that the model makes of its values; windows that only the mask knows.
    "doge": ({}, "it fails on them"),
    "phimoe": (dict(num_local_experts=4, sliding_window=64), "its sliding window is in its mask alone"),
    "qwen2_moe": (
        dict(use_sliding_window=True, sliding_window=64, **_MOE),
        "its sliding window is in its mask alone",
    ),
}


@pytest.mark.parametrize("family", UNFIT)
def test_what_cannot_take_segments_says_why_and_takes_rows(family, caplog):
    changes, reason = UNFIT[family]
    model = tiny_model("llama", model_type=family, **changes)
    before = model.config._attn_implementation
    assert use_segments(model).startswith(reason)
    caplog.clear()
    assert choose_layout(model, "auto") == "rows"
    assert [r.levelname for r in caplog.records if "padded rows, because" in r.message] == ["WARNING"]
    assert f"{type(model).__name__}: padded rows, because {reason}" in caplog.text
    with pytest.raises(ValueError, match=rf"^--layout segments: .*{reason}.*; use --layout rows$"):
        choose_layout(model, "segments")
    assert model.config._attn_implementation == before
    caplog.clear()
    assert choose_layout(model, "rows") == "rows" and not caplog.records


def everything(segments, length, prefix, window, like):
    return torch.zeros(length, prefix + length, dtype=like.dtype)


def nothing(*args):
    raise RuntimeError("out of order\nsecond line")


SURPRISES = {
    "a mask that shows the future": (everything, r"its hidden states differ from those of padded rows by \d"),
    "an error": (nothing, r"it fails on them \(RuntimeError: out of order\)"),
}


@pytest.mark.parametrize("surprise", SURPRISES)
def test_a_surprising_attention_falls_back_to_rows(surprise, monkeypatch, caplog):
    wrong, reason = SURPRISES[surprise]
    monkeypatch.setattr(attention_spans, "_mask", wrong)
    model, own = build("llama").train(), build("llama")
    assert choose_layout(model, "auto") == "rows"
    warned = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 1 and re.search(reason, warned[0].message)
    assert model.config._attn_implementation == "sdpa" and model.training
    assert torch.equal(*(Policy(m)(collated(CASES["pairs"], "rows")).logps for m in (model, own)))
    with pytest.raises(ValueError, match=reason):
        choose_layout(model, "segments")


def test_a_pass_without_gradient_leaves_nothing_that_a_gradient_cannot_use():
    model, batch = ready("llama"), batch_of("pairs")
    with torch.inference_mode():
        want = Policy(model)(batch).logps
    got = Policy(model)(batch).logps
    got.sum().backward()
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["position_bias"])
def test_what_segments_do_not_know_is_never_left_out(name):
    x = torch.zeros(1, 1, 3, 8)
    with pytest.raises(NotImplementedError, match=f"segments know no {name}"):
        segment_attention(torch.nn.Identity(), x, x, x, None, segments=Segments.of((Span(3),)), **{name: torch.ones(1)})


def test_a_mask_of_the_models_own_is_never_left_out():
    x, mask = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 3)
    with pytest.raises(NotImplementedError, match="segments know no mask that the model makes"):
        segment_attention(torch.nn.Identity(), x, x, x, mask, segments=Segments.of((Span(3),)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_segments_without_their_attention_are_an_error(implementation):
    """Never a batch in which all tokens see each other."""
    model = tiny_model("llama", attn_implementation=implementation)
    batch = batch_of("rows packed")
    with pytest.raises(ValueError, match=r"not ready for them: use_segments\(model\)"):
        Policy(model)(batch)
    with pytest.raises(RuntimeError):
        model.base_model(**batch.inputs(), use_cache=False)


# Flash-attention that the user chose


def test_a_chosen_flash_attention_takes_segments(monkeypatch):
    """A stand-in for the package, which computes each span as a dense row, on a CPU that passes for a GPU."""
    name, calls = "flash_attention_2", []

    def function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
                 window_size=(-1, -1)):  # fmt: skip
        calls.append(window_size)
        return flash_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal, window_size
        ).to(q.dtype)

    own, model = build("qwen2, some windows"), build("qwen2, some windows")
    found = found_by_transformers(function)
    monkeypatch.setattr(attention_varlen, "lazy_import_flash_attention", lambda implementation: found)
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, wanted, **_: wanted)
    monkeypatch.setitem(AttentionInterface._global_mapping, name, AttentionInterface._global_mapping[name])
    model.set_attn_implementation(name)
    assert choose_layout(model, "auto") == "segments"
    assert model.config._attn_implementation == name and not calls  # tried by SDPA
    on_gpu = dict(device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(attention, "choose_kernel", lambda call, flash: choose_kernel(call._replace(**on_gpu), flash))
    start = copy.deepcopy(own.state_dict())
    want = step(own, start, lambda m: apart(m, CASES["pairs"]))
    agree(step(model, start, lambda m: together(m, batch_of("pairs"))), want)
    # Before each of two kinds of layers, the kernel is tried with a window of 48, and without one.
    assert calls == [(47, 47), (WINDOW - 1, WINDOW - 1), (-1, -1), (-1, -1)]
    # Without segments it is what it was, except that SDPA takes float32.
    ids = torch.tensor([[5, 6, 7]])
    close(model(ids).logits, own(ids).logits)
    rows = []

    def own_function(module, query, *args, **options):
        rows.append(query.size(2))
        return query.transpose(1, 2), None

    monkeypatch.setattr(attention, "flash_attention_forward", own_function)
    model(ids, attention_mask=torch.tensor([[0, 1, 1]]))
    assert rows == [3, 3]
    # Longer than the window of a layer, and behind keys of a cache.
    long = torch.arange(5, 5 + 3 * WINDOW)[None]
    close(model(long).logits, own(long).logits)
    cache = model(long[:, :7]).past_key_values
    close(model(long[:, 7:], past_key_values=cache).logits, own(long).logits[:, 7:])


def test_a_flash_attention_without_spans_is_refused(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(attention_varlen, "lazy_import_flash_attention", lambda _: ((None,) * 5, (dict, dict)))
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, wanted, **_: wanted)
    model.set_attn_implementation("flash_attention_3")
    assert use_segments(model) == "flash_attention_3 has no function for spans of different lengths"
    assert model.config._attn_implementation == "flash_attention_3"


# On a GPU

GPU_KERNELS = {
    "llama": "attend_by_varlen",
    "mistral, windows": "attend_by_varlen",
    "gemma2, some windows": "attend_by_flex",
    "gpt_oss, some windows": "attend_by_flex",
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("family", GPU_KERNELS)
def test_half_precision_on_a_gpu(family, monkeypatch):
    torch.compiler.reset()  # a process keeps eight variants of a compiled function
    calls, name = [], GPU_KERNELS[family]
    own_kernel = getattr(attention, name)
    monkeypatch.setattr(attention, name, lambda *args: calls.append(1) or own_kernel(*args))
    model, own = build(family).cuda().bfloat16(), build(family).bfloat16().float()
    assert use_segments(model) is None
    for case in CASES:
        calls.clear()
        model.zero_grad()
        own.zero_grad()
        hidden, logps = together(model, batch_of(case).to("cuda"))
        loss_of(logps).backward()
        want_hidden, want = apart(own, CASES[case])
        loss_of(want).backward()
        assert len(calls) == 2  # of two layers
        # As vectors: of single entries bfloat16 keeps nothing where large terms cancel.
        pairs = [(hidden, want_hidden), (logps, want)]
        pairs += [(p.grad, q.grad) for p, q in zip(model.parameters(), own.parameters(), strict=True)]
        for got, exact in pairs:
            got, exact = got.detach().float().cpu().flatten(), exact.detach().flatten()
            close(torch.cosine_similarity(got, exact, dim=0), 1.0, torch.bfloat16)
            close(got.norm() / exact.norm(), 1.0, torch.bfloat16)
