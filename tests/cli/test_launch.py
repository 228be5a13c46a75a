"""Several processes by accelerate's own launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf.cli.launch import LaunchArguments, accelerate_file, first_status, launch, launch_words, split_launch_options
from rlhf.cli.main import main

CPU = ["--use_cpu"] if torch.accelerator.is_available() else []  # without it, where there is nothing else


def test_its_options_are_taken_out():
    options, rest = split_launch_options(
        ["--beta", "1", "--num_processes", "2", "--lr", "1", "--accelerate-config=zero3", "--use_cpu"]
    )
    assert options == LaunchArguments(2, "zero3") and rest == ["--beta", "1", "--lr", "1", "--use_cpu"]


def test_a_file_is_found_by_its_name_or_its_path(tmp_path):
    assert accelerate_file("zero3").name == "zero3.yaml"
    (tmp_path / "mine.yaml").write_text("num_processes: 1\n")
    assert accelerate_file(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"
    with pytest.raises(FileNotFoundError, match=r"zero9: no such file, and none of cluster_512, .*, fsdp2, "):
        accelerate_file("zero9")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--num_processes", "0"], "--num_processes must be at least 1, got 0"),
        (["--num_processes", "two"], "argument --num_processes/--num-processes: invalid int value: 'two'"),
        (["--accelerate_config", "zero9"], "--accelerate_config zero9: no such file"),
        (["--num_processes", "2", "--nonsense"], "unknown option --nonsense"),
    ],
)
def test_mistakes_are_found_before_anything_is_started(words, line, capsys):
    assert main(["dpo", *words]) == 2
    assert capsys.readouterr().err.startswith(f"rlhf dpo: {line}")


def test_processes_that_were_launched_launch_no_others(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="give --num_processes to the launcher instead"):
        launch("dpo", [], LaunchArguments(num_processes=2))


@pytest.mark.parametrize(
    ("failures", "status"),
    [
        ([(10, -15), (10, 2)], 2),  # the launcher ended the first of them
        ([(10, -15), (11, 3)], 3),
        ([(11, -15), (10, -9)], 137),  # as when memory runs out
        ([(10, -15), (10, -15)], 143),
        ([(12, 1), (10, 2)], 2),
    ],
)
def test_the_status_is_that_of_the_process_that_failed(failures, status):
    assert first_status(failures) == status


def test_a_file_of_options_can_ask_for_processes(monkeypatch, tmp_path):
    """Also a run.yaml; the command line wins, and a process that was launched launches no others."""
    asked = []
    monkeypatch.setattr("rlhf.cli.main.launch", lambda name, words, options: asked.append((words, options)) or 0)
    monkeypatch.setattr("rlhf.cli.main.import_module", lambda name: pytest.fail("not launched"))
    file = tmp_path / "dpo.yaml"
    file.write_text("num_processes: 2\naccelerate_config: two_cpu\n")
    words = ["--config", str(file)]
    assert main(["dpo", *words]) == 0 and main(["dpo", *words, "--num_processes", "3"]) == 0
    assert asked == [(words, LaunchArguments(2, "two_cpu")), (words, LaunchArguments(3, "two_cpu"))]
    for variable in ("WORLD_SIZE", "RLHF_LAUNCHED"):
        with monkeypatch.context() as launched:
            launched.setenv(variable, "2")
            assert launch_words({"num_processes": 2}) == []


def run(tmp_path, model_folder, data_files, *words):
    argv = [sys.executable, "-m", "rlhf", "sft", "--model", str(model_folder), "--data", str(data_files / "sft.jsonl")]
    argv += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--logging_steps", "1", *CPU]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*argv, *words], capture_output=True, text=True, env=environment, cwd=tmp_path)


@pytest.mark.slow  # the example in two processes is a part of each run of the tests
def test_two_processes_share_a_batch(tmp_path, model_folder, data_files):
    """Twice the rows of one process in a step, and one checkpoint."""
    two = ("--num_processes", "2", "--accelerate_config", "two_cpu", "--per_device_train_batch_size", "2")
    done = run(tmp_path, model_folder, data_files, *two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved ") == 1
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    words = [
        "--model",
        str(model_folder),
        "--data",
        str(data_files / "sft.jsonl"),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    words += [
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
        "--per_device_train_batch_size",
        "4",
        "--overwrite",
        "--use_cpu",
    ]
    assert main(["sft", *words]) == 0
    alone = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["num_tokens"] for entry in log[:2]] == [entry["num_tokens"] for entry in alone[:2]]


def test_a_mistake_in_the_processes_is_told_once_and_ends_with_2(tmp_path, model_folder, data_files):
    done = run(tmp_path, model_folder, data_files, "--num_processes", "2", "--beta1", "3")
    assert done.returncode == 2 and "unknown option --beta1" in done.stderr
    done = run(tmp_path, model_folder, data_files, "--num_processes", "2", "--max_length", "1")
    assert done.returncode == 2
    assert done.stderr.count("rlhf sft: max_length must be at least 2") == 1, done.stderr


REWARD = """
import os

calls = 0

def score(completions, **columns):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls > 1:
        raise RuntimeError("no score today")
    return [float(len(completion) % 7) for completion in completions]
"""


def test_an_error_of_the_second_process_is_told_and_ends_both(tmp_path, model_folder, data_files):
    """In the second step, after a checkpoint whose value head one process alone wrote."""
    (tmp_path / "reward.py").write_text(REWARD)
    prompts = str(data_files / "sft.jsonl")
    words = ["ppo", "--model", str(model_folder), "--data", prompts, "--reward_funcs", f"{tmp_path}/reward.py:score"]
    words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--save_steps", "1", "--num_iterations", "1"]
    words += ["--max_completion_length", "4", "--per_device_train_batch_size", "2", "--num_processes", "2", *CPU]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *words], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "rlhf ppo (process 1): reward 'score' failed" in done.stderr and "no score today" in done.stderr
    assert "closed by peer" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "run" / "checkpoint-1" / "value_head.safetensors").exists()
