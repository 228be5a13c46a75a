"""Noise of the training forward, and samplers that must not read padding."""

import json

import pytest
import torch
from conftest import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf import SFTConfig, SFTTrainer
from rlhf.data import Collator
from rlhf.models import Policy, add_embedding_noise, disable_dropout
from rlhf.models.randomness import configured_dropout
from rlhf.rollouts import LocalEngine, Sampling

SMALL = dict(
    vocab_size=330, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=0,
)  # fmt: skip


def model_of(kind, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **changes}))


NOISY = {
    "opt": dict(dropout=0.5, attention_dropout=0.5, ffn_dim=64, word_embed_proj_dim=32),
    "falcon": dict(hidden_dropout=0.5, attention_dropout=0.5),
    "gpt_neo": dict(
        resid_dropout=0.5, embed_dropout=0.5, attention_dropout=0.5,
        num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8,
    ),
    "gptj": dict(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "bloom": dict(hidden_dropout=0.5, attention_dropout=0.5, n_layer=2, n_head=4),
    "starcoder2": dict(residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5),
    "phimoe": dict(
        attention_dropout=0.5, router_jitter_noise=0.3, input_jitter_noise=0.3,
        num_local_experts=4, num_experts_per_tok=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOISY)
def test_two_training_passes_agree_and_the_saved_config_stays(kind):
    """hiyouga/LLaMA-Factory#10779, huggingface/trl#744: dropout that is called as a function, read off a config."""
    model = model_of(kind, **NOISY[kind]).train()
    before = model.config.to_dict()
    ids = torch.arange(5, 25)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    disable_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    with configured_dropout(model):
        assert model.config.to_dict() == before


def test_a_run_without_dropout_saves_the_dropout_of_its_config(tmp_path, tokenizer, sft_rows):
    model = model_of("gpt_neo", **NOISY["gpt_neo"])
    args = SFTConfig(
        str(tmp_path), max_steps=1, use_cpu=True, disable_dropout=True, report_to="none", disable_tqdm=True
    )
    trainer = SFTTrainer(model, args=args, train_dataset=sft_rows.select(range(8)), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["attention_dropout"] == 0.5


@pytest.mark.parametrize("layout", ["rows", "segments"])
def test_embedding_noise_follows_each_sequence(layout):
    """huggingface/transformers#34659: the bound is alpha / sqrt(L d) of a token's own sequence, in every layout."""
    model = tiny_model()
    policy = Policy(model)
    add_embedding_noise(policy, 5.0)
    embeddings, seen = model.get_input_embeddings(), []
    embeddings.register_forward_hook(
        lambda module, ids, out: seen.append((out - torch.nn.functional.embedding(ids[0], module.weight)).detach())
    )
    lengths = [40, 10]
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in lengths]
    if layout == "segments":
        from rlhf.models import use_segments

        use_segments(model)
    batch = Collator(layout=layout)(rows)
    policy.train()
    policy(batch)
    found = seen[-1]
    noise = found[0] if layout == "segments" else torch.cat([found[0], found[1, :10]])
    for part, length in zip(noise.split(lengths), lengths, strict=True):
        bound = 5.0 / (length * 32) ** 0.5
        assert 0.9 * bound < part.abs().max() <= bound
    with torch.no_grad():  # as a reference is asked
        policy(batch)
    assert not seen[-1].any()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("minimax", dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2, block_size=8,
                         layer_types=["linear_attention", "full_attention"])),
        ("mamba", dict(state_size=8, num_key_value_heads=None)),
        ("gemma2", dict(head_dim=8)),
    ],
)  # fmt: skip
def test_the_fallback_sampler_gives_the_models_log_probs(kind, changes, tokenizer):
    """huggingface/transformers#46773: recurrent layers read padding on the left."""
    model = model_of(kind, **changes).eval()
    prompts = [[5, 6, 7], list(range(10, 21)), [8, 9, 4]]
    groups = LocalEngine(model, tokenizer).generate(prompts, 2, Sampling(max_tokens=6), 0)
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + completion.ids]), use_cache=False).logits.float()
            want = logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            got = torch.tensor(completion.logps)
            torch.testing.assert_close(got, want[torch.arange(len(got)), completion.ids], rtol=1e-4, atol=1e-4)
