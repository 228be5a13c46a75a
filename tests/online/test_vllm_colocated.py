"""A real vLLM in the process of the tests: the contract of engines, exactness, sleep, and steps of GRPO.

It needs an environment with vLLM and this package: `python -m pytest -m vllm tests/online/test_vllm_colocated.py`.
docs/runs/vllm/README.md has the installation and the figures of a run.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import sentences
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "rollouts"))
import test_engines
from test_engines import (  # noqa: F401  # run here with the engine below
    test_a_chat_prompt,
    test_a_part_of_a_request_is_answered_as_in_the_whole,
    test_an_update_changes_the_output_and_the_version,
    test_bad_requests,
    test_finish_reasons_and_lengths,
    test_log_probs_are_those_of_the_trainers_forward,
    test_shape_and_version,
    test_stop_strings,
    test_the_seed_decides,
)

from rlhf import GRPOConfig, GRPOTrainer
from rlhf.rollouts.colocated import ColocatedEngine, ColocatedOptions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def small_model(name="llama", seed=0, **changes):
    """vLLM's CPU kernels need heads of at least 32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=330, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.08, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    ).eval()  # fmt: skip


class Behind:
    """What the contract's tests look at: the policy, and the tokens that end a completion."""

    def __init__(self, engine, model, tokenizer):
        self.engine, self.model, self.tokenizer = engine, model, tokenizer

    @property
    def end_ids(self):
        return self.engine.end_ids

    @end_ids.setter
    def end_ids(self, ids):
        self.engine.end_ids = ids


@pytest.fixture(scope="module")
def vllm_engine(tokenizer):
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    # The default `use_vllm` of a run starts an engine alike; it is made once here, because the start takes a minute.
    options = ColocatedOptions(dtype=torch.float32, max_length=256, sleeps=torch.cuda.is_available())
    one = ColocatedEngine(small_model().config, tokenizer, [0], options)
    yield one
    one.close()


@pytest.fixture
def engine(vllm_engine, tokenizer, monkeypatch):
    monkeypatch.setattr(test_engines, "tiny_model", small_model)
    model = small_model()
    vllm_engine.end_ids = [0]
    vllm_engine.wake()
    vllm_engine.update_weights(model.state_dict().items(), 0)
    vllm_engine.behind = Behind(vllm_engine, model, tokenizer)
    return vllm_engine


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM cannot sleep on a CPU")
def test_sleep_takes_the_weights(engine):
    sampling = test_engines.Sampling(max_tokens=6, temperature=0)
    expected = engine.generate(test_engines.PROMPTS, 1, sampling, 0)
    engine.sleep()
    assert not engine.has_weights
    with pytest.raises(RuntimeError, match="has no weights of the policy"):
        engine.generate(test_engines.PROMPTS, 1, sampling, 0)
    engine.wake()
    engine.update_weights(engine.behind.model.state_dict().items(), 0)
    assert engine.generate(test_engines.PROMPTS, 1, sampling, 0) == expected


@pytest.mark.parametrize("with_adapter", [False, True])
def test_three_steps_of_grpo(with_adapter, engine, tokenizer, tmp_path):
    args = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_steps=3, learning_rate=1e-3,
        logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", max_length=64,
        max_completion_length=12, bf16=False, use_vllm=True, vllm_mode="colocate",
    )  # fmt: skip
    trainer = GRPOTrainer(
        small_model(seed=5),
        lambda completions, **_: [float(sum(letter in "aeiou" for letter in text)) for text in completions],
        args,
        train_dataset=Dataset.from_list([{"prompt": text} for text in sentences(1, 12)]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if with_adapter else None,
        engine=engine,
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "sampler_kl" in entry]
    for entry in steps:
        print(f"sampler_kl of step {entry['step']}: {entry['sampler_kl']:.2g}")
    assert len(steps) == 3 and all(abs(entry["sampler_kl"]) < 1e-5 for entry in steps)
    assert all(entry["grad_norm"] > 0 for entry in steps)


def test_log_probs_after_each_update(engine):
    largest = 0.0
    for seed in (1, 2, 3):
        model = small_model(seed=seed)
        engine.update_weights(model.state_dict().items(), seed)
        for prompt, group in zip(
            test_engines.PROMPTS,
            engine.generate(test_engines.PROMPTS, 2, test_engines.Sampling(max_tokens=12), 1),
            strict=True,
        ):
            for one in group:
                with torch.no_grad():
                    expected = test_engines.trainer_logps(model, prompt, one.ids, 1.0)
                largest = max(largest, float((expected - torch.tensor(one.logps)).abs().max()))
    print(f"largest difference after updates: {largest:.2g}")
    assert largest < 1e-5
