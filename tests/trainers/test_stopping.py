"""A signal saves or stops a run at the end of its step, and the run that goes on from there is the same run."""

import json
import os
import signal
import sys

import pytest
import torch
from conftest import tiny_model, write_rows
from safetensors.torch import load_file
from transformers import TrainerCallback

from rlhf import SFTConfig, SFTTrainer
from rlhf.cli.lasting_output import lasting_output
from rlhf.cli.main import main
from rlhf.trainers.stopping import SignalRequests, noted_signals


class Send(TrainerCallback):
    """Sends this process signals at the beginning of steps."""

    def __init__(self, signals):
        self.signals = signals

    def on_step_begin(self, args, state, control, **kwargs):
        for number in self.signals.get(state.global_step + 1, []):
            os.kill(os.getpid(), number)


@pytest.fixture
def train(tmp_path, tokenizer, sft_rows):
    def run(callback, **options):
        base = dict(max_steps=8, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True)
        args = SFTConfig(str(tmp_path / "run"), per_device_train_batch_size=12, **(base | options))
        trainer = SFTTrainer(
            tiny_model(), args, train_dataset=sft_rows, eval_dataset=sft_rows.select(range(4)),
            processing_class=tokenizer, callbacks=[callback],
        )  # fmt: skip
        with noted_signals() as requests:
            trainer.obey(requests)
            trainer.train()
        return trainer, requests, sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))

    return run


def test_sigusr1_saves_and_goes_on_and_sigterm_stops(train):
    trainer, requests, checkpoints = train(Send({2: [signal.SIGUSR1], 4: [signal.SIGTERM]}))
    assert (requests.stopped_by, trainer.state.global_step) == (signal.SIGTERM, 4)
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]


def test_a_second_ctrl_c_does_not_wait(train):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(Send({3: [signal.SIGINT, signal.SIGINT]}))
    assert signal.getsignal(signal.SIGINT) is before


def test_the_last_checkpoint_is_kept_beside_the_best(train):
    """A finished run deletes all but the best, and a stopped one needs its last to go on."""
    best = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1)
    best |= dict(load_best_model_at_end=True, metric_for_best_model="perplexity", greater_is_better=True)
    _, _, checkpoints = train(Send({4: [signal.SIGTERM]}), learning_rate=1e-2, **best)
    assert checkpoints == ["checkpoint-1", "checkpoint-4"]


def test_an_epoch_that_ends_is_evaluated_and_one_that_does_not_is_not(train):
    """Four steps an epoch."""
    for step, evaluations in ((4, 1), (6, 1)):
        trainer, _, checkpoints = train(Send({step: [signal.SIGTERM]}), eval_strategy="epoch", save_strategy="epoch")
        assert f"checkpoint-{step}" in checkpoints and trainer.state.global_step == step
        assert sum("eval_loss" in line for line in trainer.state.log_history) == evaluations


def test_a_run_that_is_complete_was_not_stopped(train):
    _, requests, checkpoints = train(Send({8: [signal.SIGTERM]}))
    assert (requests.stopped_by, checkpoints) == (None, [])


def test_what_any_process_got_is_due_in_all():
    requests = SignalRequests()
    requests.note(signal.SIGUSR1)
    assert requests.pop_received() == [0, 0, 1] and requests.pop_received() == [0, 0, 0]
    requests.settle([1.0, 0.0, 2.0])
    assert requests.due == {signal.SIGTERM, signal.SIGUSR1}


REWARD = """
import os, signal, time
calls = 0

def reward(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == 2 and os.environ.get("INTERRUPT"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
    return [float(len(text)) for text in completions]
"""


def test_ctrl_c_inside_a_reward(tmp_path, model_folder, capsys, monkeypatch):
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("the cat", "a dog", "big", "no")])
    (tmp_path / "reward.py").write_text(REWARD)

    def run(folder, *words):
        argv = f"grpo --model {model_folder} --data {rows} --output_dir {tmp_path / folder} --max_steps 3 --use_cpu "
        argv += f"--reward_funcs {tmp_path / 'reward.py'}:reward --num_generations 2 --per_device_train_batch_size 4 "
        argv += "--max_length 64 --max_completion_length 4 --save_strategy no --disable_tqdm true --learning_rate 1e-3"
        return main([*argv.split(), *words])

    monkeypatch.setenv("INTERRUPT", "1")
    assert run("stopped") == 130
    assert capsys.readouterr().out.endswith("stopped at step 2 of 3; go on with --resume\n")
    assert [path.name for path in (tmp_path / "stopped").iterdir() if "model" in path.name] == []
    monkeypatch.delenv("INTERRUPT")
    assert run("stopped", "--resume") == 0
    assert run("whole") == 0
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    resumed = load_file(tmp_path / "stopped" / "model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def test_ctrl_c_before_training_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGUSR1)  # nothing to save yet
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.cli.training.run", interrupted)
    before = signal.getsignal(signal.SIGUSR1)
    assert main(["sft"]) == 130
    assert capsys.readouterr().err == "rlhf sft: interrupted\n"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_output_outlasts_its_reader(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_output():
            print("seen")
            assert os.read(reading, 100) == b"seen\n"
            os.close(reading)
            print("not seen")
            print(json.dumps({"loss": 1.0}), flush=True)
        stream.write("what ends the program finds no fault either\n")
