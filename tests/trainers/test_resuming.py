"""A run that was killed and resumed is the uninterrupted one: weights, log and completions."""

import json
import logging
from dataclasses import fields
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from conftest import close, sentences, tiny_model
from datasets import Dataset, concatenate_datasets
from transformers import TrainerCallback

from rlhf import PPOConfig, PPOTrainer, SFTConfig, SFTTrainer
from rlhf.cli.commands import COMMANDS, TrainingCommand
from rlhf.data.fingerprint import fingerprint
from rlhf.runs.files import read_lines
from rlhf.trainers.option_changes import LENGTH, MAY_CHANGE, MOVE_FIGURES, compare, recorded_options
from rlhf.trainers.options import REFUSED
from rlhf.trainers.resuming import checkpoint_to_resume, finished_step, resume_request
from rlhf.trainers.run_lock import run_lock

TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
TIMES |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
TIMES |= {"tokens_per_second/rollout", "tokens_per_second/training"}


class Killed(Exception):
    """What nothing handles."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.fixture
def make(tmp_path, tokenizer, sft_rows):
    def one(kind, name, kill_at=None, rows=sft_rows, **options):
        trainer, config = {"sft": (SFTTrainer, SFTConfig), "ppo": (PPOTrainer, PPOConfig)}[kind]
        base = dict(
            output_dir=str(tmp_path / name), max_steps=6, logging_steps=2, save_steps=3, learning_rate=1e-3,
            per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, report_to="none",
        )  # fmt: skip
        rewards = {}
        if kind == "ppo":
            base |= dict(max_length=64, max_completion_length=6, num_iterations=2)
            rewards = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
            rows = Dataset.from_list([{"prompt": text} for text in sentences(1, 12)])
        return trainer(
            tiny_model(), args=config(**{**base, **options}), train_dataset=rows, processing_class=tokenizer,
            eval_dataset=rows.select(range(4)),
            callbacks=[] if kill_at is None else [KillAt(kill_at)], **rewards,
        )  # fmt: skip

    return one


def without_times(line):
    return {key: value for key, value in line.items() if key not in TIMES} | (
        {"seconds": 0} if "seconds" in line else {}
    )


def log_of(trainer):
    return [without_times(line) for line in trainer.state.log_history]


def agree(one, other):
    """The same run; keys of lines too, such as those of speeds."""
    assert log_of(one) == log_of(other)
    assert [line.keys() for line in one.state.log_history] == [line.keys() for line in other.state.log_history]
    for weight, other_weight in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(weight, other_weight)


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_a_killed_run_that_is_resumed_is_the_uninterrupted_one(make, kind, tmp_path):
    """Saved at step 3, logged at 2 and 4, killed before 6: sums of step 3 were lost, lines of step 4 came twice."""
    whole = make(kind, "whole")
    whole.train()
    with pytest.raises(Killed):
        make(kind, "cut", kill_at=5).train()
    resumed = make(kind, "cut")
    resumed.train(resume_from_checkpoint="auto")
    agree(resumed, whole)
    # The file of metrics has the lines of the log, each once, in strict JSON.
    logs = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("cut", "whole")]
    assert [{**line, "seconds": 0} for line in log_of(whole)] == [without_times(line) for line in logs[0]]
    assert [without_times(line) for line in logs[0]] == [without_times(line) for line in logs[1]]
    seconds = [line["seconds"] for line in logs[0]]
    assert seconds == sorted(seconds) and seconds[-1] > 0
    if kind == "ppo":
        completions = [tmp_path / name / "completions.jsonl" for name in ("cut", "whole")]
        assert completions[0].read_bytes() == completions[1].read_bytes() != b""


def test_a_run_without_a_step_left_takes_none(make):
    """transformers took one more: a run that was killed before its last save had other weights."""
    whole = make("sft", "run", max_steps=3)
    whole.train()
    again = make("sft", "run", max_steps=3)
    again.train(resume_from_checkpoint=True)
    agree(again, whole)


def test_the_end_of_an_epoch_comes_once(make, sft_rows):
    """A checkpoint of an epoch's last step is saved before the epoch's line and evaluation, which were lost."""
    options = dict(
        max_steps=-1, num_train_epochs=2, rows=sft_rows.select(range(12)), logging_strategy="epoch",
        eval_strategy="epoch", eval_on_start=True,
    )  # fmt: skip
    whole = make("sft", "whole", **options)
    whole.train()
    with pytest.raises(Killed):
        make("sft", "cut", kill_at=4, **options).train()
    for _ in range(2):  # from the end of the first epoch, then from the end of the run
        resumed = make("sft", "cut", **options)
        resumed.train(resume_from_checkpoint="auto")
        agree(resumed, whole)


def trainer_options():
    """All fields of the configurations and groups of the commands that train, by name."""
    commands = [command for command in COMMANDS.values() if isinstance(command, TrainingCommand)]
    paths = {path for command in commands for path in command.option_classes}
    return {option.name: option for path in paths for option in fields(resolve_name(path)) if option.init}


def test_each_option_moves_figures_or_may_change():
    """A field that is new fails here, until somebody decided whether a run may go on with another value of it."""
    by_subject = [*MOVE_FIGURES.values(), *MAY_CHANGE.values(), " ".join(LENGTH), " ".join(REFUSED)]
    known = [name for names in by_subject for name in names.split()]
    assert len(known) == len(set(known))
    # A name of TRL sets an option of ours, or is refused.
    ours = {name for name, option in trainer_options().items() if not option.metadata["help"].startswith("TRL's name")}
    assert ours <= set(known) <= set(trainer_options())


def test_what_breaks_exactness_is_refused_and_the_rest_is_told(make, sft_rows, tmp_path, caplog):
    caplog.set_level(logging.INFO, "rlhf")
    make("sft", "run", max_steps=3).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    refused = r"checkpoint-3: another run was saved there \(learning_rate: 0.01, was 0.001\); give the same options"
    with pytest.raises(ValueError, match=refused):
        make("sft", "run", learning_rate=1e-2).train(resume_from_checkpoint=checkpoint)
    # A row that says something else, in as many tokens.
    changed = Dataset.from_list([{**sft_rows[0], "completion": " " + sft_rows[0]["prompt"]}, *list(sft_rows)[1:]])
    with pytest.raises(ValueError, match=r"\(rows: 48 rows \w+, was 48 rows \w+\)"):
        make("sft", "run", rows=changed).train(resume_from_checkpoint=checkpoint)
    going_on = make("sft", "run", max_steps=4, logging_steps=1, learning_rate=1e-2, allow_changes=True)
    going_on.train(resume_from_checkpoint=checkpoint)
    assert going_on.state.global_step == 4
    told = "changed since: learning_rate: 0.01, was 0.001; allow_changes: true, was false; logging_steps: 1, was 2;"
    assert told in caplog.text and "max_steps: 4, was 3" in caplog.text


def test_a_record_holds_no_secret_and_no_address_of_memory():
    options = {
        "hub_token": "hf_key", "reward_funcs": ["https://me:word@host/score?key=1", "a.py:b"], "loss_type": close,
        "lr_scheduler_type": SFTConfig("runs", use_cpu=True).lr_scheduler_type, "do_predict": False,
    }  # fmt: skip
    recorded = recorded_options(options)
    assert not any(secret in str(recorded) for secret in ("hf_key", "me:word", "key=1"))
    del recorded["hub_token"], recorded["reward_funcs"]
    assert recorded == {"loss_type": "close", "lr_scheduler_type": "linear"}


def test_a_longer_run_goes_on_and_a_shorter_one_is_another():
    assert compare({"max_steps": 3}, {"max_steps": 5, "new": 1}) == ([], ["max_steps: 5, was 3"])
    assert compare({"num_train_epochs": 3.0}, {"num_train_epochs": 2.0}).breaking == ["num_train_epochs: 2.0, was 3.0"]


def test_rows_are_told_apart_by_what_they_hold():
    ids = [[1, 2], [3]] * 600
    rows = Dataset.from_dict({"input_ids": ids, "answer": ["a"] * 1200})
    other_ids = Dataset.from_dict({"input_ids": [*ids[:1], [4], *ids[2:]], "answer": ["a"] * 1200})
    other_column = Dataset.from_dict({"input_ids": ids, "answer": ["b"] * 1200})
    same = concatenate_datasets([rows.select(range(7)), rows.select(range(7, 1200))])
    assert fingerprint(rows) == fingerprint(same) == fingerprint(rows.add_column("logps", [0.0] * 1200), ["logps"])
    assert len({fingerprint(each) for each in (rows, other_ids, other_column, rows.select(range(1199)))}) == 4
    assert fingerprint(rows.to_iterable_dataset()) is None


def test_what_is_resumed(tmp_path):
    run = str(tmp_path)
    assert checkpoint_to_resume("auto", run) is None and checkpoint_to_resume("auto", run + "/none") is None
    with pytest.raises(ValueError, match="no checkpoint to resume from; leave out --resume to start, or pass --res"):
        checkpoint_to_resume("true", run)
    assert [resume_request(given) for given in (None, False, "False", True, "AUTO", "a/b")] == [
        "", "", "", "true", "auto", "a/b",
    ]  # fmt: skip


def test_a_run_is_finished_once_its_last_files_are_there(tmp_path):
    def is_finished(max_steps=-1, epochs=3.0):
        return finished_step(str(tmp_path), max_steps, epochs) is not None

    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 5, "epoch": 1.0}))
    assert not is_finished(5)
    (tmp_path / "all_results.json").write_text("{}")
    assert is_finished(5) and is_finished(4) and not is_finished(6)
    assert is_finished(epochs=1.0) and not is_finished(epochs=1.5)
    (tmp_path / "all_results.json").write_text('{"epoch": 1')  # cut off
    assert not is_finished(5)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    folder = tmp_path / "run"
    refused = pytest.raises(ValueError, match=r"another run writes into it \(process \d+ on .+ since 20")
    with run_lock(folder), refused, run_lock(folder):
        pass
    assert not folder.exists()  # nothing was written
    folder.mkdir()
    with run_lock(folder):
        Path(folder / "rows").touch()
    assert [path.name for path in folder.iterdir()] == ["rows"]


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path):
    (tmp_path / "file").write_text("mine")
    said = r"file/out: cannot be written \(Not a directory\); choose another folder"
    with pytest.raises(OSError, match=said), run_lock(tmp_path / "file/out"):
        pass
