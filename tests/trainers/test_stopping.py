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
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number, step, times=1):
        self.number, self.step, self.times = number, step, times

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


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


def test_sigterm_saves_the_step_and_stops(train):
    trainer, requests, checkpoints = train(Send(signal.SIGTERM, 3))
    assert (requests.stopped_by, trainer.state.global_step, checkpoints) == (signal.SIGTERM, 3, ["checkpoint-3"])


def test_sigusr1_saves_and_goes_on(train):
    trainer, requests, checkpoints = train(Send(signal.SIGUSR1, 3))
    assert (requests.stopped_by, trainer.state.global_step, checkpoints) == (None, 8, ["checkpoint-3"])


def test_a_second_ctrl_c_does_not_wait(train):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(Send(signal.SIGINT, 3, times=2))
    assert signal.getsignal(signal.SIGINT) is before


def test_the_last_checkpoint_is_kept_beside_the_best(train):
    """A finished run deletes all but the best, and a stopped one needs its last to go on."""
    best = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1)
    best |= dict(load_best_model_at_end=True, metric_for_best_model="perplexity", greater_is_better=True)
    _, _, checkpoints = train(Send(signal.SIGTERM, 4), learning_rate=1e-2, **best)
    assert checkpoints == ["checkpoint-1", "checkpoint-4"]


def test_an_epoch_that_ends_is_evaluated_and_one_that_does_not_is_not(train):
    """Four steps an epoch."""
    for step, evaluations in ((4, 1), (6, 1)):
        trainer, _, checkpoints = train(Send(signal.SIGTERM, step), eval_strategy="epoch", save_strategy="epoch")
        assert f"checkpoint-{step}" in checkpoints and trainer.state.global_step == step
        assert sum("eval_loss" in line for line in trainer.state.log_history) == evaluations


def test_a_run_that_is_complete_was_not_stopped(train):
    _, requests, checkpoints = train(Send(signal.SIGTERM, 8))
    assert (requests.stopped_by, checkpoints) == (None, [])


def test_processes_add_up_what_each_got():
    class Two:
        num_processes = 2

        def reduce(self, sums):
            return sums + torch.tensor([7, 1, 0, 1])  # the other one got SIGTERM and SIGUSR1

    requests = SignalRequests()
    requests.note(signal.SIGINT)
    assert requests.reduce_with(torch.tensor(5), Two()) == 12
    assert requests.pop_due() == {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


REWARD = """
import os, signal, time
calls = 0

def reward(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == 2 and os.environ.get("SEND_TO_ITSELF"):
        os.kill(os.getpid(), int(os.environ["SEND_TO_ITSELF"]))
        time.sleep(0.05)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_inside_a_reward(number, status, tmp_path, model_folder, capsys, monkeypatch):
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("the cat", "a dog", "big", "no")])
    (tmp_path / "reward.py").write_text(REWARD)

    def run(folder, *words):
        argv = f"grpo --model {model_folder} --data {rows} --output_dir {tmp_path / folder} --max_steps 3 --use_cpu "
        argv += f"--reward_funcs {tmp_path / 'reward.py'}:reward --num_generations 2 --per_device_train_batch_size 4 "
        argv += "--max_length 64 --max_completion_length 4 --save_strategy no --disable_tqdm true --learning_rate 1e-3"
        return main([*argv.split(), *words])

    monkeypatch.setenv("SEND_TO_ITSELF", str(int(number)))
    assert run("stopped") == status
    assert capsys.readouterr().out.endswith("stopped at step 2 of 3; go on with --resume\n")
    assert [path.name for path in (tmp_path / "stopped").iterdir() if "model" in path.name] == []
    monkeypatch.delenv("SEND_TO_ITSELF")
    if number == signal.SIGINT:
        return
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
