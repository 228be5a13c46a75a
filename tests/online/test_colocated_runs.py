"""On-policy training with vLLM in the process of the trainer; a module of the tests stands for vLLM."""

import sys
from pathlib import Path

import pytest
from conftest import sentences, tiny_model
from datasets import Dataset
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "rollouts"))
import fake_llm

from rlhf import GRPOConfig, GRPOTrainer
from rlhf.rollouts import ServerError


def trainer(tokenizer, folder, peft_config=None, **changes):
    args = GRPOConfig(
        str(folder), per_device_train_batch_size=8, num_generations=4, max_steps=2, learning_rate=1e-2, logging_steps=1,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", max_length=64, max_completion_length=6,
        use_vllm=True, vllm_mode="colocate", **changes,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": text} for text in sentences(1, 12)])
    return GRPOTrainer(
        tiny_model(tie_word_embeddings=True), lambda completions, **_: [float(len(set(text))) for text in completions],
        args, train_dataset=rows, eval_dataset=rows.select(range(3)), processing_class=tokenizer,
        peft_config=peft_config,
    )  # fmt: skip


@pytest.mark.parametrize("with_adapter", [False, True])
def test_it_samples_from_the_policy_and_sleeps_while_it_trains(with_adapter, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fake_llm.module())
    # A head of its own, in a model whose head is its embedding.
    adapter = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]) if with_adapter else None
    one = trainer(
        tokenizer, tmp_path, adapter, vllm_enable_sleep_mode=True, vllm_gpu_memory_utilization=0.4,
        vllm_max_model_length=64, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    engine = one.collector.sampler.engine
    llm, asleep = engine._llm, []
    wanted = dict(
        gpu_memory_utilization=0.4, max_model_len=64, enable_sleep_mode=True, dtype="float32", load_format="dummy",
        logprobs_mode="processed_logprobs",
    )  # fmt: skip
    assert {name: llm.options[name] for name in wanted} == wanted
    measure = one.measure
    one.measure = lambda *inputs: asleep.append(set(llm.asleep)) or measure(*inputs)
    one.train()
    assert asleep and all(tags == {"weights", "kv_cache"} for tags in asleep)
    log = [entry for entry in one.state.log_history if "loss" in entry]
    assert len(log) == 2 and all(abs(entry["sampler_kl"]) < 1e-5 for entry in log)
    # Its weights are gone after each sleep, so that an evaluation after the same step needs them again.
    assert llm.calls[0] == "reload_weights" and llm.calls.count("reload_weights") == 4
    one.evaluate()


def test_weights_that_it_did_not_take_are_found_by_its_log_probs(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fake_llm.module())
    monkeypatch.setattr(fake_llm.LLM, "collective_rpc", lambda self, method, kwargs: None)
    one = trainer(tokenizer, tmp_path)
    one.policy.model.lm_head.weight.data *= 30  # as sure of its tokens as a trained model
    with pytest.raises(ServerError, match=r"vLLM in this process: after the update its log-probs differ"):
        one.train()


def test_without_vllm_the_extra_is_named(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'rlhf-exact\[vllm\]', or sample on a server"):
        trainer(tokenizer, tmp_path)
