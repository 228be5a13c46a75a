"""All that a command prints, line by line: a run from its start, resumed, with an adapter."""

import re

import pytest

from rlhf.cli.main import main

NUMBER = r"-?\d[\d.e-]*"
FIGURES = rf"loss {NUMBER} · accuracy {NUMBER} · margin {NUMBER}"
ANSWERS = ["    prompt  .*", "    answer  .*"] * 2
EVALUATION = [rf"eval STEP/\d · {FIGURES} · took .* s", *ANSWERS]


def lines_of(words, capsys, recwarn):
    assert main(words) == 0
    shown = capsys.readouterr()
    # Python itself hides those of other packages' code that is out of date.
    hidden = (DeprecationWarning, PendingDeprecationWarning)
    assert [str(one.message) for one in recwarn.list if not issubclass(one.category, hidden)] == []
    return shown.out.splitlines(), shown.err.replace("\r", "\n").splitlines()


def agree(patterns, lines):
    unexpected = [line for pattern, line in zip(patterns, lines, strict=False) if not re.fullmatch(pattern, line)]
    assert unexpected == [] and len(lines) == len(patterns), "\n".join(lines)


@pytest.mark.filterwarnings("default")
def test_a_run_prints_its_lines_and_nothing_else(tmp_path, model_folder, data_files, capsys, recwarn):
    folder, file = tmp_path / "run", data_files / "preferences.jsonl"
    words = ["dpo", "--model", str(model_folder), "--data", str(file), "--output_dir", str(folder), "--use_cpu"]
    words += ["--eval_dataset_name", str(file), "--use_peft", "--gradient_checkpointing", "--max_steps", "4"]
    words += ["--logging_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
    words += ["--per_device_train_batch_size", "2", "--max_length", "96"]
    out, err = lines_of(words, capsys, recwarn)
    end = [
        rf"result  evaluation: loss {NUMBER} → {NUMBER} · accuracy {NUMBER} → {NUMBER} \(steps 2 and STEP\)",
        r"cost    STEP steps in 0:\d\d · [\d.]+k? tokens · [\d.]+k? tok/s",
        rf"saved   {folder} \([\d.]+ [kM]B\)",
        rf"next    rlhf chat {folder} · rlhf merge {folder} -o {folder}-merged",
    ]
    expected = [
        rf"step 2/4 · {FIGURES} · lr {NUMBER} · [\d.]+k? tok/s · 0:\d\d left",
        *(line.replace("STEP", "2") for line in EVALUATION),
        rf"step 4/4 · {FIGURES} · lr {NUMBER} · [\d.]+k? tok/s",
        *(line.replace("STEP", "4") for line in EVALUATION),
        *(line.replace("STEP", "4") for line in end),
    ]
    agree(expected, out)
    assert err == []
    # Longer, from its last checkpoint.
    out, err = lines_of([*words, "--max_steps", "6", "--resume"], capsys, recwarn)
    expected = [
        rf"step 6/6 · {FIGURES} · lr {NUMBER}",  # the time of its first tokens is unknown
        *(line.replace("STEP", "6") for line in EVALUATION),
        *(line.replace("STEP", "6") for line in end),
    ]
    agree(expected, out)
    assert err == []
