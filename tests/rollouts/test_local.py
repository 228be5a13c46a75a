"""The engine in this process: token for token what transformers generates, and the distribution it should be."""

import itertools
import logging

import pytest
import torch
from conftest import ARCHITECTURES, ROWS_ONLY, close, tiny_model
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf.rollouts import LocalEngine, Sampling
from rlhf.rollouts.decoding import DecodingState
from rlhf.rollouts.sampling import FIRST_CANDIDATES, draw, uniforms

PROMPTS = [[5, 6, 7], [9], [40, 50, 60, 70, 80, 90, 100, 110, 120], [9, 9]]


def generate(model, prompt, **options):
    """transformers' own, one prompt at a time."""
    ids = torch.tensor([prompt])
    output = model.eval().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *ROWS_ONLY])
def test_greedy_is_transformers_generate(name, n, tokenizer):
    model = tiny_model(name)
    engine = LocalEngine(model, tokenizer)
    groups = engine.generate(PROMPTS, n, Sampling(temperature=0, max_tokens=16), 0)
    assert bool(engine._fallback_reason) == (name in ROWS_ONLY)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        want = generate(model, prompt, max_new_tokens=16)
        assert [one.ids for one in group] == [want] * n


WINDOWED = {
    "mixtral": {},
    "qwen2": dict(use_sliding_window=True, max_window_layers=1),
    # Soft-capped scores, and sinks.
    "gemma2": dict(attn_logit_softcapping=0.5),
    "gpt_oss": dict(model_type="gpt_oss", num_local_experts=4, head_dim=8),
}


@pytest.mark.parametrize("window", [1, 2, 4, 7])
@pytest.mark.parametrize("name", WINDOWED)
def test_greedy_with_a_sliding_window(name, window, tokenizer):
    model = tiny_model(name if name in ARCHITECTURES else "llama", sliding_window=window, **WINDOWED[name])
    engine = LocalEngine(model, tokenizer)
    groups = engine.generate(PROMPTS, 2, Sampling(temperature=0, max_tokens=12), 0)
    assert not engine._fallback_reason
    for prompt, group in zip(PROMPTS, groups, strict=True):
        ids = list(prompt)
        for _ in group[0].ids:  # no cache at all
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert [one.ids for one in group] == [ids[len(prompt) :]] * 2


@pytest.mark.parametrize("name", ["llama", "stablelm"])
def test_rows_that_end_are_dropped_and_the_others_do_not_notice(name, tokenizer):
    model = tiny_model(name)
    engine = LocalEngine(model, tokenizer)
    sampling = Sampling(max_tokens=24, temperature=1.5)
    whole = engine.generate(PROMPTS, 4, sampling, 0)
    ends = [one.ids[k] for group in whole for one, k in zip(group, (2, 5, 9, 13), strict=True)]
    engine.end_ids = ends = ends[::2]
    for group, cut in zip(whole, engine.generate(PROMPTS, 4, sampling, 0), strict=True):
        for one, short in zip(group, cut, strict=True):
            at = next((k + 1 for k, i in enumerate(one.ids) if i in ends), None)
            assert short.ids == one.ids[:at]
            assert short.finish_reason == ("length" if at is None else "stop")
            close(short.logps, one.logps[:at])


def test_the_company_of_a_prompt_does_not_matter(tokenizer):
    engine = LocalEngine(tiny_model(), tokenizer)
    sampling = Sampling(max_tokens=20)
    whole = engine.generate(PROMPTS, 3, sampling, 5)
    for count, n in itertools.product((1, 2), (1, 2)):
        part = engine.generate(PROMPTS[:count], n, sampling, 5)
        assert [[one.ids for one in g] for g in part] == [[one.ids for one in g[:n]] for g in whole[:count]]
    shorter = engine.generate(PROMPTS, 3, Sampling(max_tokens=7), 5)
    assert [one.ids for one in shorter[2]] == [one.ids[:7] for one in whole[2]]


def test_the_fallback_draws_the_same_completions(tokenizer):
    engine = LocalEngine(tiny_model(), tokenizer)
    sampling = Sampling(max_tokens=15, temperature=1.3, top_k=50, top_p=0.9, min_tokens=4)
    ours = engine.generate(PROMPTS, 3, sampling, 2)
    engine._fallback_reason = "asked for"
    theirs = engine.generate(PROMPTS, 3, sampling, 2)
    assert [[one.ids for one in g] for g in ours] == [[one.ids for one in g] for g in theirs]
    close([x for g in ours for one in g for x in one.logps], [x for g in theirs for one in g for x in one.logps])


def test_the_fallback_ignores_the_models_own_generation_config(tokenizer):
    model = tiny_model("stablelm")
    sampling = Sampling(max_tokens=8, temperature=0)
    want = LocalEngine(model, tokenizer).generate(PROMPTS, 1, sampling, 0)
    usual = model.generation_config
    usual.update(repetition_penalty=9.0, do_sample=True, temperature=5.0, max_new_tokens=2)
    assert LocalEngine(model, tokenizer).generate(PROMPTS, 1, sampling, 0) == want
    assert model.generation_config is usual


def transformers_logits(logits, sampling):
    """What transformers' processors make of logits [V]."""
    processors = LogitsProcessorList()
    if sampling.temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors(torch.zeros(1, 1, dtype=torch.int64), logits[None])[0]


OPTIONS = [
    dict(),
    dict(temperature=0.5),
    dict(temperature=3.0),
    dict(top_k=7),
    dict(top_p=0.6),
    dict(temperature=2.0, top_k=20, top_p=0.8),
    dict(top_k=1),
    dict(top_p=1e-6),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_first_tokens_follow_the_softmax(options, tokenizer):
    model = tiny_model()
    sampling = Sampling(max_tokens=1, **options)
    group = LocalEngine(model, tokenizer).generate([PROMPTS[0]], 4000, sampling, 0)[0]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    p = transformers_logits(logits, sampling).double().softmax(-1)
    counts = torch.bincount(torch.tensor([one.ids[0] for one in group]), minlength=len(p))
    assert not counts[p == 0].any()
    close([one.logps[0] for one in group], p.log()[[one.ids[0] for one in group]])
    often = p * len(group) >= 5  # the rest in one class
    seen, want = (torch.cat((t[often], t[~often].sum(0, keepdim=True))) for t in (counts.double(), p * len(group)))
    if want[-1] == 0:
        seen, want = seen[:-1], want[:-1]
    assert len(want) == 1 or chisquare(seen, want / want.sum() * seen.sum()).pvalue > 1e-3


@pytest.mark.parametrize("vocab", [1, 5, 255, 256, 257, 5000])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_draw_is_the_inverse_of_the_cumulative_sum(options, vocab):
    """``u`` picks the token in whose share of [0, 1) it lies: in order of ids, or of falling probability if cut."""
    sampling = Sampling(max_tokens=1, **options)
    g = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(64, vocab, generator=g)
    u = torch.rand(64, generator=g, dtype=torch.float64)
    u[:2] = torch.tensor([0.0, 1 - 2**-53])
    token, logp = draw(logits, u, sampling)
    for row in range(64):
        p = transformers_logits(logits[row], sampling).double().softmax(-1)
        order = p.argsort(descending=True) if sampling.truncates else torch.arange(vocab)
        ends = p[order].cumsum(0)
        at = int((order == token[row]).nonzero())
        assert ends[at] - p[token[row]] - 1e-6 <= u[row] * ends[-1] <= ends[at] + 1e-6
        assert p[token[row]] > 0
        close(logp[row], p[token[row]].log())


def test_top_p_sorts_all_where_the_first_do_not_reach_it():
    logits = torch.randn(4, 4 * FIRST_CANDIDATES, generator=torch.Generator().manual_seed(0)) / 100
    token, _ = draw(logits, torch.full((4,), 0.999999, dtype=torch.float64), Sampling(top_p=0.9))
    ranks = (logits > logits.gather(1, token[:, None])).sum(1)
    assert bool((ranks > 3 * FIRST_CANDIDATES).all())


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.full((1000, 700), -torch.inf)
    logits[:, [3, 300, 699]] = 0.0
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    token, logp = draw(logits, u, Sampling(), banned=torch.tensor([300]))
    assert set(token.tolist()) == {3, 699}
    close(logp, torch.full((1000,), 0.5).log())


def test_min_tokens_is_transformers(tokenizer):
    model = tiny_model()
    engine = LocalEngine(model, tokenizer)
    greedy = engine.generate([[5, 6]], 1, Sampling(temperature=0, max_tokens=10), 0)[0][0].ids
    engine.end_ids = [greedy[2]]
    for count in (0, 2, 3, 5):
        processor = MinNewTokensLengthLogitsProcessor(2, count, torch.tensor([greedy[2]]), device="cpu")
        want = generate(
            model, [5, 6], max_new_tokens=10, eos_token_id=greedy[2], pad_token_id=0,
            logits_processor=LogitsProcessorList([processor]),
        )  # fmt: skip
        got = engine.generate([[5, 6]], 1, Sampling(temperature=0, max_tokens=10, min_tokens=count), 0)[0][0]
        assert got.ids == want


@pytest.mark.parametrize("count", range(12))
def test_stop_strings_count_from_min_tokens_on(count, tokenizer):
    ids = tokenizer("the cat the dog says the é the end")["input_ids"][:12]
    sampling = Sampling(temperature=0, max_tokens=12, min_tokens=count, stop=("never", "the"))
    state = DecodingState([0], 1, sampling, 0, [0], tokenizer, torch.device("cpu"))
    for token in ids:
        state.draw_next(torch.nn.functional.one_hot(torch.tensor([token]), 330) * 9.0, torch.tensor([0]))
    said = [tokenizer.decode(ids[:k]).count("the") for k in range(13)]
    ends = [k for k in range(count + 1, 13) if said[k] > said[k - 1]]
    ((one,),) = state.completions(0)
    assert (one.ids, one.finish_reason) == ((ids[: ends[0]], "stop") if ends else (ids, "length"))


def test_uniforms_differ_by_seed_prompt_and_sample():
    keys = list(itertools.product(range(3), repeat=3))
    drawn = torch.stack([torch.from_numpy(uniforms(*key, 4)) for key in keys])
    assert len(drawn.flatten().unique()) == len(keys) * 4
    close(uniforms(1, 2, 0, 3), uniforms(1, 2, 0, 9)[:3])


@pytest.mark.parametrize("name", ["llama", "stablelm"])
def test_the_model_comes_back_as_it_was(name, tokenizer):
    model = tiny_model(name).train()
    model.get_input_embeddings().eval()
    attention, cache = model.config._attn_implementation, model.config.use_cache
    with torch.autocast("cpu", torch.bfloat16):  # whose cache of weights must not keep inference tensors
        engine = LocalEngine(model, tokenizer, autocast=torch.bfloat16)
        engine.generate(PROMPTS, 2, Sampling(max_tokens=3), 0)
        model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert model.training and not model.get_input_embeddings().training
    assert (model.config._attn_implementation, model.config.use_cache) == (attention, cache)
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))


def test_dropout_is_off(tokenizer):
    model = tiny_model("gpt2", resid_pdrop=0.9).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    engine = LocalEngine(model, tokenizer)
    one, two = (engine.generate(PROMPTS, 1, Sampling(max_tokens=8), 0) for _ in range(2))
    assert one == two


def test_an_adapter_counts(tokenizer):
    model = tiny_model()
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    sampling = Sampling(temperature=0, max_tokens=8)
    plain = LocalEngine(model, tokenizer).generate(PROMPTS, 2, sampling, 0)
    adapted = get_peft_model(model, config)
    engine = LocalEngine(adapted, tokenizer)
    groups = engine.generate(PROMPTS, 2, sampling, 0)
    assert not engine._fallback_reason and groups != plain
    assert [g[0].ids for g in groups] == [generate(adapted, prompt, max_new_tokens=8) for prompt in PROMPTS]
    with adapted.disable_adapter():
        assert [g[0].ids for g in engine.generate(PROMPTS, 2, sampling, 0)] == [g[0].ids for g in plain]


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_half_precision(kind, tokenizer):
    model = tiny_model().eval()
    model = model.bfloat16() if kind == "weights" else model
    engine = LocalEngine(model, tokenizer, autocast=torch.bfloat16 if kind == "autocast" else None)
    groups = engine.generate(PROMPTS, 2, Sampling(max_tokens=8), 0)
    assert not engine._fallback_reason
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for one in group:
                logits = model(torch.tensor([prompt + one.ids])).logits[0, len(prompt) - 1 : -1].float()
                want = logits.log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None]).squeeze(1)
                assert float((torch.tensor(one.logps) - want).abs().max()) < 0.1  # logits of ~5 have a step of 0.03


def test_many_prompts_are_read_in_parts(monkeypatch, tokenizer):
    engine = LocalEngine(tiny_model(), tokenizer)
    sampling = Sampling(max_tokens=6)
    want = engine.generate(PROMPTS, 2, sampling, 0)
    monkeypatch.setattr("rlhf.rollouts.local.PREFILL_TOKENS", 4)
    assert [[o.ids for o in g] for g in engine.generate(PROMPTS, 2, sampling, 0)] == [[o.ids for o in g] for g in want]


def test_a_model_that_does_not_fit_says_so_once(caplog, tokenizer):
    engine = LocalEngine(tiny_model("stablelm"), tokenizer)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            engine.generate(PROMPTS, 1, Sampling(max_tokens=2), 0)
    assert caplog.text.count("sampling by model.generate") == 1


def test_errors(tokenizer):
    model = tiny_model()
    engine = LocalEngine(model, tokenizer)
    with pytest.raises(ValueError, match=r"prompt 1 has 120 tokens.*context of 128"):
        engine.generate([[1], [1] * 120], 1, Sampling(max_tokens=9), 0)
    with pytest.raises(ValueError, match="prompt 0 has ids outside"):
        engine.generate([[1, 330]], 1, Sampling(max_tokens=9), 0)
    with pytest.raises(ValueError, match="did you mean"):
        engine.update_weights([("lm_head.weigth", torch.zeros(1))], 1)
    with pytest.raises(ValueError, match=r"the engine.s is"):
        engine.update_weights([("lm_head.weight", torch.zeros(1))], 1)
    assert engine.version == 0
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(FloatingPointError, match="prompt 0 are not finite"):
        engine.generate(PROMPTS, 1, Sampling(max_tokens=2), 0)
