"""On-policy training whose completions come from a server: who wakes, who gets which weights, and what is weighed."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import close, sentences, tiny_model
from datasets import Dataset
from family import vowels
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "rollouts"))
from fake_server import FakeServer
from fake_vllm import FakeVLLM

from rlhf import GRPOConfig, GRPOTrainer
from rlhf.cli.main import main
from rlhf.rollouts import Sampling, ServerEngine, ServerError
from rlhf.rollouts.policy_sampler import PolicySampler
from rlhf.rollouts.policy_weights import merged_weights


@pytest.fixture
def server(tokenizer):
    one = FakeServer(tiny_model(seed=1), tokenizer, weights="vllm")  # not the policy, until it is sent
    yield one
    one.shutdown()


def beginning(server, folder, model, data):
    """Of a run through the command."""
    options = dict(
        model_name_or_path=model, dataset_name=data, output_dir=folder / "run", reward_funcs="think_format",
        per_device_train_batch_size=8, max_steps=1, report_to="none", max_length=64, max_completion_length=6,
        rollout_server_url=server.url, rollout_server_model="tiny", rollout_weights_dir=folder / "weights",
    )  # fmt: skip
    return main(["grpo", "--use_cpu", *(f"--{key}={value}" for key, value in options.items())])


def trainer(server, tokenizer, folder, peft_config=None, model=None, **changes):
    args = GRPOConfig(
        str(folder), per_device_train_batch_size=8, num_generations=4, learning_rate=1e-2, logging_steps=1,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", max_length=64, max_completion_length=6,
        rollout_server_model="tiny", rollout_weights_dir=str(folder / "weights"),
        **{"rollout_server_url": server.url, "max_steps": 3, **changes},
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": text} for text in sentences(1, 12)])
    return GRPOTrainer(
        tiny_model() if model is None else model, vowels, args, train_dataset=rows, eval_dataset=rows.select(range(3)),
        processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip


def test_the_server_samples_from_the_policy_as_it_is(server, tokenizer, tmp_path):
    one = trainer(server, tokenizer, tmp_path, eval_on_start=True, eval_strategy="steps", eval_steps=1)
    one.train()
    log = [entry for entry in one.state.log_history if "loss" in entry]
    assert all(abs(entry["sampler_kl"]) < 1e-5 for entry in log)  # measured by the step itself: there is no other pass
    one.evaluate()  # after the last step
    state = one.policy.model.state_dict()
    for name, weight in server.model.state_dict().items():
        close(weight, state[name])
    loads = server.posts.count("/collective_rpc")
    assert loads == 5  # the weights of steps 0 to 3, once each, whoever asks; the first once more, for the proof
    assert not server.asleep and "/sleep?level=1" not in server.posts


def test_weights_that_changed_outside_of_training_are_sent(server, tokenizer, tmp_path):
    run = trainer(server, tokenizer, tmp_path, max_steps=1)
    run.train()
    # Training begins anew, again with step 0.
    before = run.policy.model.lm_head.weight.detach().clone()
    sampled_from = []
    server.sees = lambda choice: sampled_from.append(server.model.lm_head.weight.detach().clone())
    run.train()
    close(sampled_from[-1], before)
    # As by load_best_model_at_end: the step stays, and the weights are others.
    run.evaluate()
    run.policy.model.load_state_dict(tiny_model(seed=5).state_dict())
    run.evaluate()
    close(server.model.lm_head.weight.detach(), run.policy.model.lm_head.weight.detach())


def test_a_server_that_is_started_again_changes_no_number(tokenizer, tmp_path, caplog, monkeypatch):
    """As in one of several processes: it asks the original model to the end of the rollout, which it then repeats."""
    monkeypatch.setattr("rlhf.data.http_client.sleep_using_event", lambda event: lambda seconds: None)
    finals = []
    for is_started_again in (False, True):
        server = FakeVLLM(tiny_model(), tokenizer, max_lora_rank=4)
        adapter = LoraConfig(r=4, target_modules=["q_proj"])
        one = trainer(server, tokenizer, tmp_path / str(is_started_again), adapter, max_steps=2)
        sampler, draw = one.collector.sampler, one.collector.next_rollout
        sampler.engine.is_shared = True

        def begin(state, server=server, draw=draw, sampler=sampler, is_started_again=is_started_again):
            if is_started_again and state.global_step == 1 and not sampler.num_restarts:
                server.faults["/v1/completions"] = [server.start_again]
            return draw(state)

        one.collector.next_rollout = begin
        one.train()
        assert sampler.num_restarts == is_started_again and not sampler.engine.has_lost_weights
        finals.append((one.policy.model.state_dict(), one.state.log_history[1]["reward"]))
        server.shutdown()
    (expected, expected_reward), (found, reward) = finals
    assert reward == expected_reward and caplog.text.count("the rollout is sampled anew") == 1
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def test_a_server_that_sleeps_while_the_policy_trains_is_awake_afterwards(server, tokenizer, tmp_path, caplog):
    one = trainer(server, tokenizer, tmp_path, rollout_server_sleep=True)
    slept = []
    measure = one.measure
    one.measure = lambda *inputs: slept.append(server.asleep) or measure(*inputs)
    one.train()
    assert slept and all(slept) and not server.asleep
    ending = "goes on serving the trained weights under the name 'tiny'"
    assert sum(ending in record.getMessage() for record in caplog.records) == 1
    one.evaluate()
    assert not server.asleep

    def fail(*inputs):
        assert server.asleep
        raise RuntimeError("a fault of the training step")

    one.measure = fail
    with pytest.raises(RuntimeError, match="a fault of the training step"):
        one.train()
    assert not server.asleep


def test_a_server_that_did_not_take_the_weights_is_found_by_its_log_probs(tokenizer, tmp_path):
    """This one tells no checksums."""
    model, other_model = tiny_model(), tiny_model(seed=2)
    for one in (model, other_model):
        one.lm_head.weight.data *= 30  # as sure of its tokens as a trained model
    other = FakeServer(tiny_model(seed=1), tokenizer, weights="sglang")
    trainer(other, tokenizer, tmp_path, model=model).evaluate()
    other.overlooked = ("model.layers.1.mlp.down_proj.weight",)
    with pytest.raises(ServerError, match=r"log-probs differ from the policy's by [\d.]+ nats a token \(the first: -"):
        trainer(other, tokenizer, tmp_path, model=other_model).evaluate()
    other.shutdown()


def test_lora_reaches_the_server_and_leaves_the_base_as_it_was(server, tokenizer, tmp_path):
    start = {name: weight.clone() for name, weight in tiny_model().state_dict().items()}
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], modules_to_save=["lm_head"])
    one = trainer(server, tokenizer, tmp_path, adapter)
    one.train()
    one.evaluate()
    base = one.policy.model.get_base_model()
    q = base.model.layers[0].self_attn.q_proj
    assert torch.equal(q.base_layer.weight, start["model.layers.0.self_attn.q_proj.weight"])
    merged = one.policy.model.merge_and_unload().state_dict()
    served = server.model.state_dict()
    assert not torch.equal(merged["lm_head.weight"], start["lm_head.weight"])
    for name, weight in merged.items():
        close(served[name], weight)


def test_a_head_that_the_server_does_not_have_is_refused(server, tokenizer, tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    one = trainer(server, tokenizer, tmp_path, adapter, model=tiny_model(tie_word_embeddings=True))
    with pytest.raises(ValueError, match="the server has one matrix for both: leave them out of the adapter, pass"):
        one.train()


def adapter_run(server, tokenizer, folder):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    one = trainer(server, tokenizer, folder, adapter, max_steps=2)
    one.train()
    return one


def test_a_server_that_takes_adapters_gets_the_adapter_alone(tokenizer, tmp_path, caplog):
    merging = FakeServer(tiny_model(seed=1), tokenizer, weights="vllm")
    adapting = FakeVLLM(tiny_model(), tokenizer, max_lora_rank=4)
    runs = [adapter_run(server, tokenizer, tmp_path / str(server.server_port)) for server in (merging, adapting)]
    logs = [[entry for entry in one.state.log_history if "loss" in entry] for one in runs]
    assert len(logs[0]) == 2
    for merged, alone in zip(*logs, strict=True):
        assert abs(alone["sampler_kl"]) < 1e-5
        for name in ("reward", "loss", "grad_norm", "entropy"):
            close(alone[name], merged[name])
    assert {body["model"] for body in merging.bodies} == {"tiny"}
    assert {body["model"] for body in adapting.bodies} == {"rlhf-policy"}
    assert adapting.posts.count("/v1/load_lora_adapter") == 2 and "/collective_rpc" not in adapting.posts
    (folder,) = (tmp_path / str(adapting.server_port) / "weights").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert f"{merging.url} goes on serving the trained" in caplog.text and f"{adapting.url} goes on" not in caplog.text
    for server in (merging, adapting):
        server.shutdown()


def test_another_process_asks_for_the_adapter_that_the_first_one_sent(tokenizer, tmp_path):
    server = FakeVLLM(tiny_model(), tokenizer, max_lora_rank=4)
    one = trainer(server, tokenizer, tmp_path, LoraConfig(r=4, target_modules=["q_proj"]))
    first = one.collector.sampler
    accelerator = SimpleNamespace(
        is_main_process=False,
        num_processes=2,
        get_state_dict=first.accelerator.get_state_dict,
        wait_for_everyone=lambda: None,
    )
    second = PolicySampler(ServerEngine(server.url, "tiny", weights_dir=tmp_path), accelerator)
    first.sync(one.policy, one.model, 0)
    second.sync(one.policy, one.model, 0)
    second.engine.generate([[5, 6]], 1, Sampling(max_tokens=2), 0)
    assert server.bodies[-1]["model"] == "rlhf-policy" and server.posts.count("/v1/load_lora_adapter") == 1
    server.shutdown()


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(modules_to_save=["lm_head"]), "has layers that were trained whole"),
        (dict(rank_pattern={"q_proj": 8}), "has rank 8, and the server's --max-lora-rank is 4"),
    ],
)
def test_an_adapter_that_the_server_cannot_take_is_merged(options, reason, tokenizer, tmp_path, caplog):
    server = FakeVLLM(tiny_model(seed=1), tokenizer, max_lora_rank=4)
    one = trainer(server, tokenizer, tmp_path, LoraConfig(r=4, target_modules=["q_proj"], **options))
    one.evaluate()
    assert f"the server gets the whole model at each update: the adapter {reason}" in caplog.text
    assert {body["model"] for body in server.bodies} == {"tiny"}
    server.shutdown()


def test_several_servers(server, tokenizer, tmp_path):
    second = FakeServer(tiny_model(seed=2), tokenizer, weights="vllm")
    logs = []
    for urls in (server.url, [server.url, second.url]):
        one = trainer(server, tokenizer, tmp_path, rollout_server_url=urls, max_steps=1)
        one.train()
        logs.append([entry for entry in one.state.log_history if "loss" in entry])
    for alone, together in zip(*logs, strict=True):
        close(together["loss"], alone["loss"])
        assert together["reward"] == alone["reward"]
    assert second.bodies and second.posts.count("/collective_rpc") == 2
    second.shutdown()
    with pytest.raises(ValueError, match=f"rollout_server_url: {server.url} is there twice"):
        trainer(server, tokenizer, tmp_path, rollout_server_url=[server.url, server.url])


def test_what_cannot_be_merged_is_refused():
    from peft import get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="only plain LoRA"):
        merged_weights(model, model.state_dict())


def test_tokens_are_weighed_where_the_server_is_not_the_trainer(server, tokenizer, tmp_path, monkeypatch):
    one = trainer(server, tokenizer, tmp_path)
    assert one.importance_cap == 2.0
    monkeypatch.setattr(
        one.collector.sampler, "_send_weights", lambda *models: None
    )  # it goes on with weights of its own
    seen = []
    from rlhf.online import trainer as ppo

    inner = ppo.truncated_importance_weights
    monkeypatch.setattr(ppo, "truncated_importance_weights", lambda *args: seen.append(inner(*args)) or seen[-1])
    one.train()
    assert seen and all(float(w.max()) <= 2.0 for w in seen) and any(float(w.min()) < 0.9 for w in seen)
    assert one.state.log_history[0]["sampler_kl"] > 0.01


def test_a_server_of_another_model_is_found_before_it_samples(tokenizer, tmp_path, model_folder, data_files, capsys):
    other = FakeServer(tiny_model(vocab_size=400), tokenizer, weights="vllm")
    assert beginning(other, tmp_path, model_folder, data_files / "sft.jsonl") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf grpo: ")]
    assert f"{other.url}/collective_rpc answered 500" in line and "size mismatch" in line
    assert "it must serve the model that is trained" in line and not other.bodies
    other.engine.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    other.engine.tokenizer.add_tokens(["naïve"])
    with pytest.raises(ValueError, match=r"has another tokenizer than the policy: 'It'… is .*; it must"):
        trainer(other, tokenizer, tmp_path)
    other.shutdown()


def test_a_server_with_a_shorter_context_is_found_before_it_samples(server, tokenizer, tmp_path):
    server.context_length = 64
    trainer(server, tokenizer, tmp_path)
    server.context_length = 63
    with pytest.raises(ValueError, match="has a context of 63 tokens, less than max_length 64: start it with a longer"):
        trainer(server, tokenizer, tmp_path)


def test_a_server_that_goes_on_with_another_vocabulary(tokenizer, tmp_path):
    other = FakeServer(tiny_model(vocab_size=400), tokenizer, weights="sglang")
    other.load = lambda folder: None  # and says that all went well
    with pytest.raises(ServerError, match=r"sampled token 3\d\d, and the policy has 330: it must serve the model"):
        trainer(other, tokenizer, tmp_path).train()
    other.shutdown()


@pytest.mark.parametrize("weights", [None, "sglang"])
def test_servers_that_say_little(weights, tokenizer, tmp_path, model_folder, data_files, capsys):
    """No tokenizer is told of; without a way to load weights, one line says so."""
    other = FakeServer(tiny_model(seed=1), tokenizer, weights=weights)
    assert beginning(other, tmp_path, model_folder, data_files / "sft.jsonl") == (2 if weights is None else 0)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf grpo: ")]
    assert len(told) == (weights is None) and all("offers no way to load weights" in line for line in told)
    other.shutdown()


def test_answers_that_nothing_ends_are_refused(server, tokenizer, tmp_path):
    endless = tiny_model()
    endless.generation_config.eos_token_id = None
    silent = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no token ends a completion"):
        trainer(server, silent, tmp_path, model=endless)
