"""On-policy runs that must agree: rollouts, advantages and updates do not depend on how the work is cut up."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import close, sentences, tiny_model, write_rows
from datasets import Dataset
from transformers import AutoModelForCausalLM

from rlhf import GRPOConfig, GRPOTrainer, OnlineDPOConfig, OnlineDPOTrainer, PPOConfig, PPOTrainer
from rlhf.cli.main import main

ROOT = Path(__file__).parents[2]
STEPS = 4
EPSILON = 1e-5  # as PPO's authors have it; at 1e-8 Adam's steps are as large for gradients that are rounding alone
KINDS = {
    "ppo": (PPOTrainer, PPOConfig, dict(num_mini_batches=2, num_iterations=2, adaptive_kl_target=0.1)),
    "grpo": (GRPOTrainer, GRPOConfig, dict(num_generations=2, beta=0.1, num_iterations=2, scale_rewards="batch")),
    "gspo": (GRPOTrainer, GRPOConfig, dict(num_generations=2, beta=0.1, num_iterations=2, loss_type="gspo")),
    "online-dpo": (OnlineDPOTrainer, OnlineDPOConfig, dict(num_generations=2)),
}
MOVES = ("tokens_per_second", "train_", "epoch", "total_flos")


def vowels(completions, **_):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def run(kind, tmp_path, tokenizer):
    def train(batch=8, accumulation=1, name="run", **changes):
        trainer_class, config_class, own = KINDS[kind]
        args = config_class(
            str(tmp_path / name), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            max_steps=STEPS, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
            max_length=64, max_completion_length=8, adam_epsilon=EPSILON, **{"learning_rate": 1e-3, **own, **changes},
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": text} for text in sentences(1, 12)])
        trainer = trainer_class(tiny_model(), vowels, args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        return log_of(trainer.state.log_history), dict(trainer.model.named_parameters())

    return train


def log_of(history):
    entries = [entry for entry in history if "loss" in entry]
    return [{k: v for k, v in entry.items() if not k.startswith(MOVES)} for entry in entries]


def agree(one, other):
    (log, weights), (other_log, other_weights) = one, other
    assert len(log) == len(other_log) == STEPS
    for entry, other_entry in zip(log, other_log, strict=True):
        assert entry.keys() == other_entry.keys()
        for key in entry.keys() - {"num_tokens"}:  # a prompt that two micro-batches share is read twice
            if not math.isnan(entry[key]) or not math.isnan(other_entry[key]):  # of nothing: both say so
                close(other_entry[key], entry[key])
    for key, weight in weights.items():
        close(other_weights[key].detach(), weight.detach())


def test_accumulated(run):
    agree(run(), run(batch=2, accumulation=4, name="other"))


def test_padded_rows(run):
    # Not Adam's steps, whose size does not shrink with the gradient: they amplify its rounding.
    plain = dict(optim="sgd", learning_rate=0.1)
    agree(run(layout="segments", **plain), run(layout="rows", name="other", **plain))


def test_sampled_in_parts(run):
    agree(run(), run(rollout_batch_size=3, name="other"))


def test_two_processes(tmp_path, model_folder, subtests):
    """Each as its command, against one process with twice the batch; all in one launch."""
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in sentences(1, 12)])
    kinds = ("ppo", "grpo", "online-dpo")

    def command(kind, processes):
        options = dict(
            model_name_or_path=model_folder, dataset_name=data, eval_dataset_name=data, max_steps=STEPS,
            output_dir=tmp_path / kind / f"{processes}", per_device_train_batch_size=8 // processes, learning_rate=1e-3,
            logging_steps=1, save_strategy="no", adam_epsilon=EPSILON, report_to="none", max_length=64,
            max_completion_length=8, reward_funcs="length_reward(target=3)", **KINDS[kind][2],
        )  # fmt: skip
        return [kind, *(f"--{key}={value}" for key, value in options.items()), "--use_cpu"]

    (tmp_path / "commands.json").write_text(json.dumps([command(kind, 2) for kind in kinds]))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/two_cpu.yaml"]
    argv = [*launch, "--main_process_port", "0", "tests/invariants/commands.py", str(tmp_path / "commands.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in kinds:
        with subtests.test(kind):
            assert main(command(kind, 1)) == 0
            found = []
            for folder in (tmp_path / kind / number for number in "12"):
                history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
                weights = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
                evaluation = json.loads((folder / "all_results.json").read_text())
                found.append(((log_of(history), weights), evaluation))
            agree(found[0][0], found[1][0])
            for key in ("eval_reward", "eval_reward_std", "eval_completions/mean_length"):
                close(found[1][1][key], found[0][1][key])


VOWELS = """
import os, re, signal

def vowels(prompts, completions, **columns):
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    return [float(bool(re.search("[aeiou]", text))) for text in completions]
"""


@pytest.mark.slow
def test_dynamic_sampling_on_two_processes_is_that_on_one(tmp_path, model_folder):
    """One of them is asked to save, and both do: a signal changes no number."""
    (tmp_path / "reward.py").write_text(VOWELS)
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in sentences(1, 12)])
    weights = []
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/two_cpu.yaml"]
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        options = dict(
            model_name_or_path=model_folder, dataset_name=data, output_dir=folder, max_steps=2, learning_rate=1e-3,
            per_device_train_batch_size=8 // processes, save_strategy="no", report_to="none", max_length=64,
            num_generations=2, adam_epsilon=EPSILON, max_completion_length=8, dynamic_sampling=3,
            reward_funcs=f"{tmp_path / 'reward.py'}:vowels",
        )  # fmt: skip
        words = [*(f"--{k}={v}" for k, v in options.items()), "--use_cpu"]
        if processes == 1:
            assert main(["grpo", *words]) == 0
        else:
            argv = [sys.executable, *launch, "--main_process_port", "0", "scripts/grpo.py", *words]
            done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
        weights.append(AutoModelForCausalLM.from_pretrained(folder).state_dict())
        # Both processes wrote theirs.
        assert len(list(folder.glob("checkpoint-1/rng_state_*"))) == 2 * (processes - 1)
    for key, weight in weights[0].items():
        close(weights[1][key], weight)
    assert any(not torch.equal(w, tiny_model().state_dict()[k]) for k, w in weights[0].items())
