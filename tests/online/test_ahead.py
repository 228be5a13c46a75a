"""Rollouts that a server samples while the policy trains: their order, their age, and what is left behind."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import close, sentences, tiny_model, write_rows
from datasets import Dataset
from family import FAMILY, vowels
from safetensors.torch import load_file
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "rollouts"))
from fake_server import FakeServer

from rlhf.cli.main import main
from rlhf.models import add_scalar_head
from rlhf.online.ahead import RolloutQueue
from rlhf.online.checks import check_staleness
from rlhf.online.rollout import Rollout, fresh_rollouts
from rlhf.online.samples import Sample
from rlhf.rollouts import Reply, ServerError
from rlhf.runs.rollout_faults import diagnose
from rlhf.trainers.stopping import noted_signals


@pytest.fixture
def server(tokenizer):
    one = FakeServer(tiny_model(seed=1), tokenizer, weights="vllm")
    yield one
    one.shutdown()


@pytest.fixture
def make(server, tokenizer, tmp_path):
    def trainer(kind="grpo", reward=vowels, callbacks=(), name="run", max_steps=4, **changes):
        environment_factory = changes.pop("environment_factory", None)
        trainer_class, config = FAMILY[kind]
        options = dict(
            per_device_train_batch_size=4, num_generations=2, max_steps=max_steps, learning_rate=1e-2, logging_steps=1,
            report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", max_length=64,
            max_completion_length=3, rollout_server_url=server.url, rollout_server_model="tiny",
            rollout_weights_dir=str(tmp_path / "weights"), max_staleness=1,
        ) | changes  # fmt: skip
        options = {name: value for name, value in options.items() if value is not None}
        rows = Dataset.from_list([{"prompt": text, "number": i} for i, text in enumerate(sentences(1, 12))])
        return trainer_class(
            tiny_model(), reward, config(str(tmp_path / name), **options), train_dataset=rows,
            eval_dataset=rows.select(range(2)), processing_class=tokenizer, callbacks=list(callbacks),
            environment_factory=environment_factory,
        )  # fmt: skip

    return trainer


def lines(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return {name: weight.clone() for name, weight in trainer.policy.model.state_dict().items()}


class Record(TrainerCallback):
    """Of each rollout when training begins on it: the numbers of its rows, and the versions of its samples."""

    def __init__(self):
        self.rows, self.versions, self.samples, self.policies = [], [], [], []

    def watch(self, trainer):
        inner = trainer._start_rollout

        def start():
            inner()
            samples = [sample for batch in trainer.schedule.minibatches for part in batch for sample in part]
            self.rows += [sample.row["number"] for sample in samples]
            self.versions.append({sample.version for sample in samples})
            self.samples.append(samples)
            self.policies.append(copy.deepcopy(trainer.policy.model))

        trainer._start_rollout = start
        return trainer


def in_order(trainer, num_rollouts):
    """The numbers of the rows of the first rollouts, each with its two samples."""
    rows = trainer.collector.prompts.draw(num_rollouts * trainer.collector.prompts_per_rollout)
    return [row["number"] for row in rows for _ in range(2)]


def no_thread_is_left():
    return not any(thread.name == "rollouts" for thread in threading.enumerate())


def wait_until(is_so, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert is_so()


def test_without_staleness_nothing_is_other_than_before(make):
    with_option = make(max_staleness=0, max_steps=2)
    without = make(max_steps=2, name="without", max_staleness=None)
    with_option.train(), without.train()
    assert with_option.rollouts is with_option.collector
    for name, weight in weights(with_option).items():
        assert torch.equal(weight, weights(without)[name])
    assert not any(name.startswith("rollout/") for name in lines(with_option)[0])


def test_one_ahead(make, server):
    record = Record()
    server.delay = 0.05
    asked_meanwhile, asked_at_updates = [], []
    load = server.load
    server.load = lambda folder: asked_at_updates.append(server.under_way) or load(folder)
    trainer = record.watch(make())
    measure = trainer.measure
    trainer.measure = lambda *inputs: asked_meanwhile.append(server.under_way) or measure(*inputs)
    trainer.train()
    assert record.versions == [{0}, {0}, {1}, {2}]
    assert record.rows == in_order(make(), 4)
    assert set(asked_at_updates) == {0} and max(asked_meanwhile) > 0
    assert [entry["rollout/staleness/mean"] for entry in lines(trainer)] == [0, 1, 1, 1]
    assert [entry["rollout/staleness/max"] for entry in lines(trainer)] == [0, 1, 1, 1]
    assert all(entry["rollout/dropped"] == 0 and entry["rollout/waiting_seconds"] >= 0 for entry in lines(trainer))
    assert "/pause?mode=keep&clear_cache=true" not in server.posts
    # Nothing is sampled that nobody trains on.
    assert len([body for body in server.bodies if body["max_tokens"] == 3]) == 4 * 4 and no_thread_is_left()

    # Samples depend on seeds alone, not on how long anything takes.
    server.delay = 0.0
    other = make(name="other")
    other.train()
    for name, weight in weights(trainer).items():
        assert torch.equal(weight, weights(other)[name])


def test_rollouts_of_a_server_that_was_started_again_are_dropped(make, server, monkeypatch, caplog):
    """As in one of several processes, which cannot know what the others got."""
    monkeypatch.setattr("rlhf.data.http_client.sleep_using_event", lambda event: lambda seconds: None)
    record = Record()
    trainer = record.watch(make())
    sampler = trainer.collector.sampler
    sampler.engine.is_shared = True
    original = {name: weight.clone() for name, weight in server.model.state_dict().items()}
    restart = trainer.collector.next_rollout

    def draw(state):
        if trainer.collector.num_rollouts == 2 and not sampler.num_restarts:
            server.faults["/v1/completions"] = [lambda: server.model.load_state_dict(original)]
        return restart(state)

    trainer.rollouts.queue._sample = draw
    trainer.train()
    assert sampler.num_restarts == 1 and caplog.text.count("the rollout is sampled anew") == 1
    # The third rollout is sampled from the policy that is trained on it.
    assert record.versions == [{0}, {0}, {2}, {2}]
    assert record.rows == in_order(make(), 4) and no_thread_is_left()
    assert lines(trainer)[2]["sampler_kl"] < 1e-5


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_weights_that_come_while_requests_are_under_way(make, server, kind):
    """vLLM is paused; where a server cannot be, the rollout is waited for."""
    server.weights = kind
    record = Record()
    observed, seen = [], []
    load = server.load

    def observe(folder):
        observed.append((server.under_way, server.goes_on.is_set()))
        server.delay = 0.0
        load(folder)

    def be_slow_after_the_first_rollout(choice):
        seen.append(len(choice["token_ids"]))
        if seen.count(3) == 4:
            server.delay = 30.0 if kind == "vllm" else 1.0

    server.load, server.sees = observe, be_slow_after_the_first_rollout
    trainer = record.watch(make(max_staleness=2, max_steps=3))
    measure = trainer.measure

    def measure_while_the_server_samples(*inputs):
        if trainer.state.global_step < 1:
            wait_until(lambda: server.under_way == 4)
        return measure(*inputs)

    trainer.measure = measure_while_the_server_samples
    trainer.train()
    updates = observed[2:]  # the first is loaded twice, for the proof
    if kind == "vllm":
        assert updates[0] == (4, False) and not any(goes_on for _, goes_on in updates)
    else:
        assert all(under_way == 0 for under_way, _ in updates)
    assert record.rows == in_order(make(), 3)


def test_two_ahead(make, server):
    record = Record()
    trainer = record.watch(make(max_staleness=2))
    measure = trainer.measure

    def measure_once_the_queue_is_full(*inputs):
        wait_until(lambda: len(trainer.rollouts.queue.finished) == min(2, 3 - trainer.state.global_step))
        return measure(*inputs)

    trainer.measure = measure_once_the_queue_is_full
    trainer.train()
    assert record.versions == [{0}, {0}, {0}, {1}]
    assert record.rows == in_order(make(), 4)
    assert [entry["rollout/staleness/max"] for entry in lines(trainer)] == [0, 1, 2, 2]


def test_a_critic_warms_up_on_the_rollouts_that_were_taken(make, tokenizer, tmp_path):
    add_scalar_head(tiny_model(seed=3)).save_pretrained(tmp_path / "critic")
    tokenizer.save_pretrained(tmp_path / "critic")
    options = dict(value_model=str(tmp_path / "critic"), critic_warmup=1, num_generations=1, num_iterations=1)
    trainer = make("ppo", max_staleness=2, max_steps=2, **options)
    at_steps = []
    measure = trainer.measure

    def measure_once_the_queue_is_full(*inputs):
        at_steps.append(weights(trainer))
        wait_until(lambda: len(trainer.rollouts.queue.finished) == 1 - trainer.state.global_step)
        return measure(*inputs)

    trainer.measure = measure_once_the_queue_is_full
    trainer.train()
    first, second = at_steps
    assert all(torch.equal(weight, first[name]) for name, weight in second.items())
    assert not all(torch.equal(weight, second[name]) for name, weight in weights(trainer).items())


def test_tokens_are_weighed_by_the_policy_now_over_the_policy_that_sampled(make, monkeypatch):
    from rlhf.online import trainer as module

    record, seen = Record(), []
    inner = module.truncated_importance_weights
    monkeypatch.setattr(module, "truncated_importance_weights", lambda *args: seen.append(inner(*args)) or seen[-1])
    trainer = record.watch(make(max_steps=3))
    assert trainer.importance_cap == 2.0
    trainer.train()

    def logps(model, sample):
        ids = torch.tensor([sample.prompt_ids + sample.ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(sample.prompt_ids) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(sample.ids)[:, None])[:, 0]

    wanted = []
    for samples, now in zip(record.samples, record.policies, strict=True):
        for sample in samples:
            sampler = record.policies[sample.version]
            wanted.append((logps(now, sample) - logps(sampler, sample)).exp().clamp(max=2.0))
    close(torch.cat(seen), torch.cat(wanted))
    assert float(torch.cat(wanted).max()) > 1.1 and float(torch.cat(wanted).min()) < 0.9


@pytest.mark.parametrize(
    "max_staleness", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_with_the_prompts_that_come_next(make, server, max_staleness, tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, name="killed")
    first, second = Record(), Record()
    trainer = first.watch(make(max_staleness=2, **options))
    save = trainer.resume_state

    def save_once_the_queue_is_full():
        wait_until(lambda: len(trainer.rollouts.queue.finished) == min(2, 4 - trainer.state.global_step))
        return save()

    trainer.resume_state = save_once_the_queue_is_full
    # What comes after the checkpoint of step 2 is lost, as by a kill.
    trainer.train()
    resumed = second.watch(make(max_staleness=max_staleness, allow_changes=True, **options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed/checkpoint-2"))
    assert first.rows[:8] + second.rows == in_order(make(), 4)
    # Rollout 3 was sampled by version 0 or 1, and rollout 4 by version 1: they are trained from versions 2 and 3.
    assert all(number - min(versions) <= max_staleness for number, versions in enumerate(second.versions, start=2))
    if max_staleness:
        dropped = [entry["rollout/dropped"] for entry in lines(resumed)[-2:]]
        assert dropped == {1: [8, 0], 2: [0, 0]}[max_staleness]


def test_a_run_that_is_stopped_leaves_a_checkpoint_and_no_thread_and_no_request(make, server, tmp_path):
    trainer = make(max_steps=9)
    measure, seen = trainer.measure, []

    def be_slow_after_the_first_rollout(choice):
        seen.append(len(choice["token_ids"]))
        if seen.count(3) == 4:
            server.delay, server.sees = 30.0, lambda choice: None

    server.sees = be_slow_after_the_first_rollout

    def measure_while_the_server_samples(*inputs):
        wait_until(lambda: server.under_way == 4)
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*inputs)

    trainer.measure = measure_while_the_server_samples
    with noted_signals() as requests:
        trainer.obey(requests)
        trainer.train()
    assert trainer.state.global_step == 1 and (tmp_path / "run/checkpoint-1").is_dir()
    assert no_thread_is_left()
    wait_until(lambda: server.given_up == 4)
    server.delay = 0.0
    assert trainer.evaluate()["eval_reward"] >= 0  # the connection can be used again


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tokenizer, tmp_path, model_folder):
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in sentences(1, 12)])

    def command(processes, url):
        options = dict(
            model_name_or_path=model_folder, dataset_name=data, max_steps=4, output_dir=tmp_path / f"{processes}",
            per_device_train_batch_size=8 // processes, num_generations=2, learning_rate=1e-3, logging_steps=1,
            save_strategy="no", adam_epsilon=1e-4, report_to="none", max_length=64, max_completion_length=8,
            reward_funcs="length_reward(target=3)", rollout_server_url=url, rollout_server_model="tiny",
            rollout_weights_dir=tmp_path / "weights", max_staleness=1,
        )  # fmt: skip
        return ["grpo", *(f"--{key}={value}" for key, value in options.items()), "--use_cpu"]

    servers = [FakeServer(tiny_model(seed=1), tokenizer, weights="vllm") for _ in range(2)]
    (tmp_path / "commands.json").write_text(json.dumps([command(2, servers[0].url)]))
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/two_cpu.yaml"]
    argv = [*launch, "--main_process_port", "0", "tests/invariants/commands.py", str(tmp_path / "commands.json")]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(command(1, servers[1].url)) == 0
    for server in servers:
        server.shutdown()
    histories = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in "12"]
    for one, two in zip(*histories, strict=True):
        for name in ("reward", "sampler_kl", "approx_kl", "rollout/staleness/mean", "rollout/staleness/max"):
            if name in one:
                close(two[name], one[name])
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    for name, weight in one.items():
        close(two[name], weight)


def test_an_error_of_the_server_ends_the_step(make, server):
    trainer = make(max_steps=9)
    measure = trainer.measure

    def measure_and_break(*inputs):
        server.faults["/v1/completions"] = [400] * 9
        return measure(*inputs)

    trainer.measure = measure_and_break
    with pytest.raises(ServerError, match="/v1/completions answered 400"):
        trainer.train()
    assert trainer.state.global_step <= 2 and no_thread_is_left()


def test_an_error_of_a_reward_function_ends_the_step(make):
    def fails(completions, trainer_state, **_):
        if trainer_state.global_step:
            raise RuntimeError("no such unit")
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"reward 'fails' failed on sample 1 of 4 .*no such unit"):
        make(max_steps=9, reward=fails).train()
    assert no_thread_is_left()


class Echo:
    def reset(self, row):
        return None

    def step(self, answer):
        return Reply("on", reward=float(len(answer)), done=False)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("ppo", dict(num_generations=1, num_iterations=2)),
        pytest.param("online-dpo", {}, marks=pytest.mark.slow),
        pytest.param("best-of-n", {}, marks=pytest.mark.slow),
        pytest.param("grpo", dict(dynamic_sampling=1), marks=pytest.mark.slow),
        ("grpo", dict(environment_factory=Echo, reward=None, max_turns=2)),
        pytest.param("grpo", dict(advantage_estimator="remax", num_iterations=2), marks=pytest.mark.slow),
        ("grpo", dict(eval_strategy="steps", eval_steps=1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_family_learns_from_rollouts_that_are_sampled_ahead(make, kind, options):
    trainer = make(kind, max_steps=3, **options)
    before = weights(trainer)
    trainer.train()
    last = lines(trainer)[-1]
    assert last["rollout/staleness/max"] == 1
    assert any(not torch.equal(weight, before[name]) for name, weight in weights(trainer).items())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rollout_server_url=None), "LocalEngine cannot in this process: give a rollout server"),
        (
            dict(
                use_vllm=True,
                vllm_mode="colocate",
                rollout_server_url=None,
                rollout_server_model=None,
                rollout_weights_dir=None,
            ),
            "vllm_mode colocate: one process cannot sample while it trains",
        ),
        (dict(rollout_server_sleep=True), "it cannot sleep: leave rollout_server_sleep out"),
        (dict(max_staleness=-1), "max_staleness must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused_by_name(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_groups_of_several_processes_are_not_exchanged_by_threads():
    args = SimpleNamespace(
        max_staleness=1, rollout_server_sleep=False, dynamic_sampling=1, world_size=2, colocated_vllm=lambda: None
    )
    with pytest.raises(ValueError, match="dynamic_sampling works on one process, not on 2"):
        check_staleness(args)


def test_rollouts_up_to_the_first_that_is_too_old():
    def rollout(number, *versions):
        samples = [Sample(0, {}, [1], [2], None, "", False, {}, version=version) for version in versions]
        return Rollout(samples, number=number)

    rollouts = [rollout(5, 4, 3), rollout(6, 3), rollout(7, 6)]
    assert [one.number for one in fresh_rollouts(rollouts, 2)] == [5, 6, 7]
    assert [one.number for one in fresh_rollouts(rollouts, 1)] == [5]
    assert fresh_rollouts(rollouts, 0) == []


def test_the_queue_waits_for_what_is_allowed():
    made = []

    def sample(state):
        made.append(state)
        return Rollout([], number=len(made))

    queue = RolloutQueue(sample, torch.device("cpu"))
    queue.allow(2, "first")
    assert queue.take().number == 1
    with queue.held():
        pass
    assert queue.take().number == 2 and made == ["first"] * 2
    queue.allow(3, "second")
    assert queue.take().number == 3 and made[-1] == "second"


def test_old_samples_are_further_from_the_policy():
    line = {"sampler_kl": 0.05, "rollout/staleness/mean": 1.0}
    assert "sampler" not in diagnose(line, None, half_precision=False)
    assert "sampler" in diagnose(line | {"rollout/staleness/mean": 0.0}, None, half_precision=False)
    message = diagnose(line | {"sampler_kl": 0.2}, None, half_precision=False)["sampler"]
    assert "samples are 1.0 updates old: lower max_staleness or learning_rate" in message
