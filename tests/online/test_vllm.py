"""A real vLLM: what the fake server of the other tests only claims. `pytest -m vllm tests/online/test_vllm.py`.

It needs the command `vllm`, or its path in VLLM_COMMAND, and takes about two minutes on two CPU cores.
docs/runs/vllm/README.md has the installation and the figures of a run.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest
import torch
from conftest import sentences
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf import GRPOConfig, GRPOTrainer
from rlhf.rollouts import Sampling, ServerEngine, ServerError
from rlhf.rollouts.policy_weights import adapter_weights, merged_weights
from rlhf.rollouts.replicas import ReplicatedEngine
from rlhf.rollouts.server_weights import VersionFolders

COMMAND = os.environ.get("VLLM_COMMAND", "vllm")
PROMPTS = [[5, 6, 7, 300, 20], [9], [40, 50, 60, 70, 80]]
# Both compute in float32; the largest difference that was measured is 3.8e-6 for a single token.
CLOSE = 1e-5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(shutil.which(COMMAND) is None, reason="vLLM is not installed"),
]


def small_model(seed):
    """vLLM's CPU kernels need heads of at least 32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=330, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.08, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip


@contextlib.contextmanager
def serving(tokenizer, folder, *options, **settings):
    """The address of a server that begins with the weights of seed 0."""
    small_model(0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    usual = (
        "--served-model-name tiny --dtype float32 --logprobs-mode processed_logprobs --max-model-len 256 "
        f"--max-num-seqs 16 --enforce-eager --port {port}"
    )
    settings |= dict(VLLM_SERVER_DEV_MODE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            [COMMAND, "serve", str(folder / "model"), *usual.split(), *options],
            env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    yield f"http://127.0.0.1:{port}"
    # It has processes of its own.
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    with serving(tokenizer, tmp_path_factory.mktemp("vllm")) as address:
        yield address


@pytest.fixture(scope="module")
def adapter_server(tokenizer, tmp_path_factory):
    options = ("--enable-lora", "--max-lora-rank", "8", "--weight-transfer-config", '{"backend": "nccl"}')
    folder = tmp_path_factory.mktemp("vllm-lora")
    with serving(tokenizer, folder, *options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True") as address:
        yield address


@pytest.fixture
def engine(server, tmp_path):
    one = ServerEngine(server, "tiny", weights_dir=tmp_path / "weights", sleeps=True, startup_timeout=300)
    yield one
    one.close()


def largest_difference(engine, model, sampling, seed=1):
    """Of the server's log-probs and the model's, over all tokens of six completions."""
    largest = 0.0
    for prompt, completions in zip(PROMPTS, engine.generate(PROMPTS, 2, sampling, seed), strict=True):
        for one in completions:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + one.ids])).logits[0, len(prompt) - 1 : -1]
            want = (logits / sampling.temperature).log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
            largest = max(largest, float((want - torch.tensor(one.logps)).abs().max()))
    return largest


def record(name, value):
    print(f"{name}: {value:.2g}")  # for docs/runs/vllm; shown by `pytest -s`


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_ids_and_log_probs(engine, temperature):
    model = small_model(0)
    engine.update_weights(model.state_dict().items(), 1)
    largest = largest_difference(engine, model, Sampling(max_tokens=12, temperature=temperature))
    record(f"largest difference at temperature {temperature}", largest)
    assert largest < CLOSE


def test_seeds(engine):
    sampling = Sampling(max_tokens=8)
    first, again, other = (engine.generate(PROMPTS, 2, sampling, seed) for seed in (3, 3, 4))
    ids = [[[one.ids for one in group] for group in groups] for groups in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]


def test_prompt_log_probs(engine):
    model = small_model(0)
    engine.update_weights(model.state_dict().items(), 1)
    (positions,) = engine.read([PROMPTS[0]], 4)
    with torch.no_grad():
        logps = model(torch.tensor([PROMPTS[0]])).logits[0].log_softmax(-1)
    assert [len(position) for position in positions] == [0, *([len(positions[1])] * 4)]
    largest = 0.0
    for row, token, position in zip(logps, PROMPTS[0][1:], positions[1:], strict=False):
        assert token in position and set(row.topk(4).indices.tolist()) <= set(position)
        largest = max(largest, *(abs(float(row[v]) - logp) for v, logp in position.items()))
    record("largest difference of prompt log-probs", largest)
    assert largest < CLOSE


def test_updates(engine):
    for version in (1, 2, 3):
        model = small_model(version)
        engine.update_weights(model.state_dict().items(), version)
        largest = largest_difference(engine, model, Sampling(max_tokens=12))
        record(f"largest difference after update {version}", largest)
        assert largest < CLOSE


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(engine, name):
    model = small_model(4)
    weights = {key: value for key, value in model.state_dict().items() if key != name}
    with pytest.raises(ServerError, match=rf"did not load 1 of its 15 tensors from .*{name}"):
        engine.update_weights(weights.items(), 1)
    engine.update_weights(model.state_dict().items(), 2)
    assert largest_difference(engine, model, Sampling(max_tokens=12)) < CLOSE


def test_sleep_and_wake(engine, server, caplog):
    engine.sleep()
    other = ServerEngine(server, "tiny")
    assert "is asleep: waking it" in caplog.text
    assert other.generate(PROMPTS, 1, Sampling(max_tokens=2), 0)
    other.close()
    engine.wake()


def grpo(server, tokenizer, folder, peft_config=None, model=None, **changes):
    args = GRPOConfig(
        str(folder), per_device_train_batch_size=8, num_generations=4, max_steps=3, learning_rate=1e-3, logging_steps=1,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", max_length=64, max_completion_length=12,
        rollout_server_url=server, rollout_server_model="tiny", rollout_weights_dir=str(folder / "weights"), **changes,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": text} for text in sentences(1, 12)])
    return GRPOTrainer(
        model or small_model(5),
        lambda completions, **_: [float(sum(letter in "aeiou" for letter in text)) for text in completions],
        args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip


def test_three_steps_of_grpo(server, engine, tokenizer, tmp_path, caplog):
    trainer = grpo(server, tokenizer, tmp_path, rollout_server_sleep=True)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "sampler_kl" in entry]
    for entry in steps:
        record(f"sampler_kl of step {entry['step']}", entry["sampler_kl"])
    assert len(steps) == 3 and all(abs(entry["sampler_kl"]) < 1e-5 for entry in steps)
    assert all(entry["grad_norm"] > 0 for entry in steps)
    assert not engine._calls.request("GET", "/is_sleeping").json()["is_sleeping"]
    assert "goes on serving the trained weights under the name 'tiny'" in caplog.text


def test_a_missing_matrix_is_found_by_log_probs(server, tokenizer, tmp_path):
    """The CPU kernels keep packed copies of matrices, so their checksums tell nothing."""
    name = "model.layers.0.mlp.down_proj.weight"
    trainer = grpo(server, tokenizer, tmp_path)
    engine = trainer.collector.sampler.engine
    update = engine.update_weights
    engine.update_weights = lambda weights, version: update([pair for pair in weights if pair[0] != name], version)
    trainer.policy.model.load_state_dict(small_model(6).state_dict())
    with pytest.raises(ServerError, match="after the update its log-probs differ") as raised:
        trainer.train()
    print(str(raised.value)[:160])


def test_an_adapter_alone(adapter_server, tokenizer, tmp_path, caplog):
    """Its log-probs are those of the trainer, and of the same adapter merged into the weights."""
    caplog.set_level("INFO")
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj", "gate_proj"])
    trainer = grpo(adapter_server, tokenizer, tmp_path, config, small_model(0))
    engine = trainer.collector.sampler.engine
    assert engine.max_adapter_rank == 8
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "sampler_kl" in entry]
    for entry in steps:
        record(f"sampler_kl of step {entry['step']} with an adapter alone", entry["sampler_kl"])
    assert len(steps) == 3 and all(abs(entry["sampler_kl"]) < 1e-5 for entry in steps)
    (folder,) = (tmp_path / "weights").iterdir()
    assert (folder / "adapter_model.safetensors").exists()

    policy = trainer.policy.model
    start = time.perf_counter()
    engine.update_adapter(adapter_weights(policy, policy.state_dict()), 10)
    record("seconds of an update with an adapter alone", time.perf_counter() - start)
    merged = small_model(0)
    merged.load_state_dict(merged_weights(policy, policy.state_dict()))
    alone = largest_difference(engine, merged, Sampling(max_tokens=12))
    record("largest difference with an adapter alone", alone)
    start = time.perf_counter()
    engine.update_weights(merged.state_dict().items(), 11)
    record("seconds of an update with merged weights", time.perf_counter() - start)
    assert "takes weights by nccl, and the policy is on no GPU: they go through a folder" in caplog.text
    whole = largest_difference(engine, merged, Sampling(max_tokens=12))
    record("largest difference with merged weights", whole)
    assert max(alone, whole) < CLOSE


def test_two_servers(server, adapter_server, tmp_path):
    folders = VersionFolders(tmp_path)
    engines = [ServerEngine(url, "tiny", weights_dir=folders, startup_timeout=300) for url in (server, adapter_server)]
    both = ReplicatedEngine(engines)
    model = small_model(8)
    both.update_weights(model.state_dict().items(), 1)
    assert len(list(tmp_path.iterdir())) == 1
    sampling = Sampling(max_tokens=12)
    expected, answered = (one.generate(PROMPTS, 2, sampling, 1) for one in (engines[0], both))
    ids = [[[one.ids for one in group] for group in groups] for groups in (expected, answered)]
    assert ids[0] == ids[1]
    largest = largest_difference(both, model, sampling)
    record("largest difference with two servers", largest)
    assert largest < CLOSE
    both.close()
