"""The parts of on-policy training one by one, without a trainer: collector, metrics, schedule, sampler, completions."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model
from datasets import Dataset

from rlhf.data import RowFormat
from rlhf.models import Policy
from rlhf.online import GRPOConfig
from rlhf.online.collector import RolloutCollector
from rlhf.online.completions import show_completions
from rlhf.online.metrics import (
    Diagnosis,
    StepStatistics,
    derived_metrics,
    policy_metrics,
    reward_function_metrics,
    sample_metrics,
)
from rlhf.online.prompts import Prompts
from rlhf.online.samples import MinibatchSchedule, Sample, zero_std_groups
from rlhf.rewards import RewardSet
from rlhf.rollouts import Completion
from rlhf.rollouts.policy_sampler import PolicySampler

CPU = torch.device("cpu")


class CountingEngine:
    """Completions whose one token counts up, and a record of what the engine was asked."""

    version = 0

    def __init__(self):
        self.calls = []
        self.tokens = iter(range(5, 300))

    def generate(self, prompt_ids, n, sampling, seed, index=None):
        self.calls.append(("generate", list(index), n, sampling.temperature))
        return [[Completion([next(self.tokens)], [-0.5], "stop", 0) for _ in range(n)] for _ in prompt_ids]

    def update_weights(self, weights, version):
        self.calls.append(("weights", len(dict(weights)), version))

    def sleep(self):
        self.calls.append(("sleep",))

    def wake(self):
        self.calls.append(("wake",))

    def asked(self, what):
        return [call[1:] for call in self.calls if call[0] == what]


def config(folder, **changes):
    options = dict(per_device_train_batch_size=4, num_generations=2, max_length=32, max_completion_length=4)
    return GRPOConfig(str(folder), use_cpu=True, report_to="none", **options | changes)


def collector(args, tokenizer, reward):
    rows = Dataset.from_list([{"prompt": text, "prompt_ids": [3, i]} for i, text in enumerate("abcdef")])
    engine = CountingEngine()
    sampler = PolicySampler(engine, Accelerator(cpu=True))
    prompts = Prompts(rows, seed=0, shuffle=False, prepare=lambda part: part)
    return engine, RolloutCollector(args, sampler, prompts, tokenizer, RowFormat(), RewardSet([reward]))


def models():
    policy = Policy(tiny_model())
    return policy, policy, SimpleNamespace(global_step=0)


def sample(reward=1.0, group=0, **tokens):
    vectors = {name: torch.tensor(values) for name, values in tokens.items()}
    return Sample(group, {"prompt": "ask"}, [3], [5, 6], None, "answer", False, vectors, reward, {"reward": reward})


def test_a_rollout_is_sampled_and_scored(tmp_path, tokenizer):
    engine, collect = collector(config(tmp_path, num_mini_batches=2), tokenizer, lambda completion_ids, **_: [
        float(ids[0]) for ids in completion_ids
    ])  # fmt: skip
    with collect.sampler.during_training():
        rollout = collect.collect(*models())
        assert engine.calls[0] == ("wake",) and engine.calls[-1] == ("sleep",)
    assert engine.calls[-1] == ("wake",)
    assert [one.group for one in rollout.samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [one.row["prompt"] for one in rollout.samples[::2]] == ["a", "b", "c", "d"]
    assert [one.reward for one in rollout.samples] == [float(one.ids[0]) for one in rollout.samples]
    assert rollout.zero_std_groups == (0, 4) and rollout.greedy_rewards is None
    assert [one.row["prompt"] for one in collect.collect(*models()).samples[::2]] == ["e", "f", "a", "b"]


def test_groups_of_equal_rewards_are_sampled_again(tmp_path, tokenizer):
    def odd_prompts(prompts, completion_ids, **_):
        return [float(ids[0]) if prompt in "bdf" else 0.0 for prompt, ids in zip(prompts, completion_ids, strict=True)]

    engine, collect = collector(config(tmp_path, dynamic_sampling=3), tokenizer, odd_prompts)
    rollout = collect.collect(*models())
    assert [one.row["prompt"] for one in rollout.samples] == ["b", "b", "d", "d"]
    assert [one.group for one in rollout.samples] == [0, 0, 1, 1]
    # Prompts a and b, then c, then d: each with a number of its own, which its random numbers follow.
    assert [numbers for numbers, *_ in engine.asked("generate")] == [[0, 1], [2], [3]]
    assert rollout.zero_std_groups == (2, 4) and len(rollout.scored) == 3


def test_greedy_rewards_are_of_one_completion_of_each_prompt(tmp_path, tokenizer):
    args = config(tmp_path, advantage_estimator="remax", loss_type="ppo", num_generations=1)
    engine, collect = collector(args, tokenizer, lambda completions, **_: [1.0] * len(completions))
    rollout = collect.collect(*models())
    assert rollout.greedy_rewards.tolist() == [1.0] * 4
    assert [(n, temperature) for _, n, temperature in engine.asked("generate")] == [(1, 1.0), (1, 0.0)]


def test_weights_are_sent_once_for_each_step():
    engine = CountingEngine()
    sampler = PolicySampler(engine, Accelerator(cpu=True))
    policy = Policy(tiny_model())
    assert not sampler.is_local
    for step in (0, 0, 1):
        with sampler.synced_engine(policy, policy, step) as same:
            assert same is engine and engine.calls[-1][0] in ("weights", "wake")
        assert engine.calls[-1] != ("sleep",)  # outside of training nobody needs its memory
    assert [version for _, version in engine.asked("weights")] == [1, 2]


@pytest.mark.parametrize("noticed_by", ["this process", "another one"])
def test_all_processes_sample_anew_after_a_restart(noticed_by, caplog):
    """A process that lost no connection may have asked the original weights too."""
    engine = CountingEngine()
    engine.has_lost_weights = noticed_by == "this process"
    engine.forget_weights = lambda: setattr(engine, "has_lost_weights", False)
    others = [float(noticed_by != "this process"), 0.0]
    accelerator = SimpleNamespace(
        num_processes=2, is_main_process=True, device=torch.device("cpu"), wait_for_everyone=lambda: None,
        reduce=lambda noticed: noticed + others.pop(0), get_state_dict=lambda model: model.state_dict(),
    )  # fmt: skip
    sampler = PolicySampler(engine, accelerator)
    policy = Policy(tiny_model())
    draws = []
    assert sampler.sample(policy, policy, 0, lambda: draws.append("drawn") or len(draws)) == 2
    assert [version for _, version in engine.asked("weights")] == [1, 2] and not others
    assert caplog.text.count("a server that was started again has its original weights") == 1


def test_metrics_of_samples():
    def means(metrics):
        return {name: float(total.sum() / count.sum()) for name, (total, count) in metrics.items()}

    samples = [sample(1.0), sample(4.0, group=1), sample(math.nan, group=1)]
    values = derived_metrics(means(sample_metrics(samples, ["reward"], CPU)))
    assert values["reward"] == 2.5 and values["reward_std"] == 1.5 and values["rewards/reward/std"] == 1.5
    assert values["completions/mean_length"] == 2 and values["completions/eos_ratio"] == 1
    assert not any("squared" in name for name in values)
    assert zero_std_groups(samples) == (2, 2) and zero_std_groups([*samples, sample(5.0)]) == (1, 2)


def test_metrics_of_the_recorded_log_probs():
    vectors = dict(old_logps=[-1.0, -2.0], sampler_logps=[-1.0, -2.0], ref_logps=[-2.0, -2.5])
    sums = policy_metrics([sample(**vectors), sample(**vectors)])
    assert {name: float(total / count) for name, (total, count) in sums.items()} == {
        "frac_not_learned": 0.0, "entropy": 1.5, "sampler_kl": 0.0, "kl": 1.5,
    }  # fmt: skip
    critic = policy_metrics([sample(values=[0.0, 0.0], returns=[1.0, 3.0])])
    means = {name: float(total / count) for name, (total, count) in critic.items()}
    assert derived_metrics(means)["critic/explained_variance"] == 0.0


def test_what_reward_functions_logged():
    def broken(completions, log_metric, **_):
        log_metric("letters", 3.0)
        raise RuntimeError("no")

    scored = RewardSet([broken], on_error="drop")(["a"], ["b"])
    assert reward_function_metrics([scored, scored], with_failures=True)["rewards/broken/failed"] == (2, 2)
    assert "rewards/broken/failed" not in reward_function_metrics([scored], with_failures=False)


def test_the_kl_limit_is_of_the_last_step_alone():
    accelerator, statistics = Accelerator(cpu=True), StepStatistics()

    def add(kl, peak):
        statistics.add({"approx_kl": (torch.tensor(kl), torch.tensor(2.0))}, {"ratio/max": torch.tensor(peak)})

    add(0.2, 1.5)
    add(0.4, 1.1)
    assert statistics.exceeds_kl_limit(0.1, accelerator)
    assert not statistics.exceeds_kl_limit(0.1, accelerator)  # nothing since
    add(0.1, 1.0)
    assert not statistics.exceeds_kl_limit(0.1, accelerator)
    assert statistics.pop_peaks(accelerator) == {"ratio/max": 1.5} and statistics.pop_peaks(accelerator) == {}


def test_a_trouble_is_new_once():
    diagnosis = Diagnosis()
    assert diagnosis.new_troubles({"entropy": 2.0, "reward_std": 1.0}, False) == []
    (found,) = diagnosis.new_troubles({"entropy": 0.01, "reward_std": 1.0}, False)
    assert "entropy fell from 2 to 0.01" in found
    assert diagnosis.new_troubles({"entropy": 0.01, "reward_std": 1.0}, False) == []


def test_minibatches_keep_their_samples_from_pass_to_pass():
    samples = [sample(group=number) for number in range(8)]
    schedule = MinibatchSchedule(micro_batch_size=2, micro_batches_per_step=1, num_passes=3)
    schedule.divide(samples)
    schedule.order_steps(4, seed=0)
    assert schedule.remaining_steps[:4] == [0, 1, 2, 3]
    assert sorted(schedule.remaining_steps[4:8]) == sorted(schedule.remaining_steps[8:]) == [0, 1, 2, 3]
    schedule.next_step()
    assert schedule.remaining_micro_batches == [samples[:2]] and len(schedule.remaining_steps) == 11


@pytest.mark.parametrize("unique", [False, True])
def test_completions_are_written_and_printed(tmp_path, capsys, caplog, unique):
    caplog.set_level(logging.ERROR)
    samples = [sample(1.0), sample(math.nan), sample(2.0, group=1, advantages=[0.5, 0.5])]
    args = config(tmp_path, log_unique_prompts=unique, num_completions_to_print=1)
    show_completions(samples, args, step=7)
    entries = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [entry["reward"] for entry in entries] == ([1.0, 2.0] if unique else [1.0, None, 2.0])
    assert entries[-1]["advantage"] == 0.5 and entries[0]["step"] == 7
    assert "step 7" in capsys.readouterr().out
