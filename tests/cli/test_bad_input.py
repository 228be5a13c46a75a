"""Each mistake ends with status 2 and one line that names what was found, where, and what to do; nothing is lost."""

import gzip
import json
import shutil

import pytest
import torch
from conftest import tiny_model, write_rows
from peft import LoraConfig, get_peft_model

from rlhf import DPOConfig
from rlhf.cli.main import main
from rlhf.cli.parsing import parse
from rlhf.trainers import SFTConfig

GOOD = {"prompt": "the cat", "chosen": " is big", "rejected": " is red"}
TURN = {"role": "user", "content": "why"}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def fails(capsys, out, model_folder):
    """Run a command that must fail; gives its one line."""

    def run(command, data=None, model=model_folder, **options):
        options = dict(model_name_or_path=model, output_dir=out, max_steps=1, report_to="none", use_cpu=True) | options
        if data is not None:
            options["dataset_name"] = data
        capsys.readouterr()
        argv = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
        assert main([command, *argv]) == 2
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith(f"rlhf {command}: ")]
        assert len(lines) == 1 and "Traceback" not in printed.err + printed.out
        return lines[0]

    return run


def text_file(path, text):
    path.write_text(text)
    return path


def truncated_gzip(path):
    whole = gzip.compress("".join(json.dumps({**GOOD, "n": n}) + "\n" for n in range(2000)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    return path


ROWS = {
    "empty completion": ("sft", {"prompt": "a", "completion": ""}, "'completion' is empty"),
    "identical answers": ("dpo", {**GOOD, "rejected": GOOD["chosen"]}, "'chosen' and 'rejected' are identical"),
    "a non-string": ("sft", {"prompt": "a", "completion": None}, "has no 'completion'"),
    "an unknown label": ("sft", {"input_ids": [1, 2], "labels": [1, 5000]}, "token 5000 in 'labels' is outside"),
    "a long prompt": ("dpo", {**GOOD, "prompt": "the " * 2000}, "raise --max_length, or pass --drop_long_prompts"),
    "a margin that is no number": ("reward", {**GOOD, "margin": None}, "'margin' is missing, expected a finite number"),
    "a message without content": (
        "sft",
        {"messages": [TURN, {"role": "assistant"}]},
        "message 2: 'content' is missing",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_named_with_its_file(case, fails, tmp_path):
    command, row, said = ROWS[case]
    good = {key: "the cat " + key if isinstance(value, str) or value is None else value for key, value in row.items()}
    good |= {"margin": 1.0} if "margin" in row else {}
    good |= {"labels": [1, 2]} if "labels" in row else {}
    good |= {"messages": [TURN, {"role": "assistant", "content": "no"}]} if "messages" in row else {}
    line = fails(command, write_rows(tmp_path / "rows.jsonl", [good, good | {}, row]))
    assert "rows.jsonl, row 3: " in line and said in line


FILES = {
    "no such file": (lambda p: p / "none.jsonl", "none.jsonl: no such file or folder"),
    "a format that we do not know": (lambda p: text_file(p / "rows.docx", "a"), "rows.docx: cannot tell the format"),
    "an empty file": (lambda p: text_file(p / "rows.jsonl", ""), "rows.jsonl: the file is empty"),
    "half a gzip file": (lambda p: truncated_gzip(p / "rows.jsonl.gz"), "the gzip file ends early, after row"),
    "half a line": (
        lambda p: text_file(p / "rows.jsonl", json.dumps(GOOD) + '\n{"prompt": "a'),
        "rows.jsonl: row 2 is not valid JSON",
    ),
    "a broken Parquet file": (lambda p: text_file(p / "rows.parquet", "PAR1"), "rows.parquet: cannot be read"),
    "a missing column": (
        lambda p: write_rows(p / "rows.jsonl", [{"question": "a"}]),
        "rows.jsonl: no column 'chosen' and 'rejected': found question",
    ),
    "two types in a column": (
        lambda p: write_rows(p / "rows.jsonl", [GOOD, {**GOOD, "chosen": 3}]),
        "row 2: 'chosen' is a",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_named(case, fails, tmp_path):
    make, said = FILES[case]
    assert said in fails("dpo", make(tmp_path))


@pytest.fixture
def pairs(data_files):
    return data_files / "preferences.jsonl"


def test_a_model_folder_that_is_not_there(fails, pairs, tmp_path, model_folder):
    assert "nowhere/model: no such model folder" in fails("dpo", pairs, model="./nowhere/model")
    (tmp_path / "empty").mkdir()
    assert "empty: no tokenizer found there" in fails("dpo", pairs, model=tmp_path / "empty")
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "config.json").unlink()
    assert "the folder holds no model (no config.json)" in fails("dpo", pairs, model=folder)


def test_weights_that_are_not_there(fails, pairs, tmp_path, model_folder):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded as a causal LM" in fails("dpo", pairs, model=folder)


def test_a_model_that_cannot_be_a_reward_model(fails, pairs, tmp_path, tokenizer):
    for part in (tiny_model("granite"), tokenizer):
        part.save_pretrained(tmp_path / "granite")
    assert "no sequence-classification class for granite" in fails("reward", pairs, model=tmp_path / "granite")
    assert "no such model folder" in fails("reward", pairs, model="./nowhere/model")


def test_conversations_without_a_template(fails, tmp_path, model_folder):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": [TURN, {"role": "assistant", "content": "no"}]}])
    assert "row 1: the data is conversational but the tokenizer has no chat template" in fails(
        "sft", rows, model=folder
    )


ONLINE = {
    "no reward": (dict(), "--reward_funcs is missing: a built-in, file.py:function"),
    "a reward that is not there": (dict(reward_funcs="numeric_anwser"), "did you mean numeric_answer?"),
    "no such column": (dict(reward_funcs="exact_match"), "needs 'answer', which is no column of the data: prompt"),
    "no room": (dict(reward_funcs="think_format", max_length=20, max_completion_length=19), "leaves room for 1"),
    "groups of one": (dict(reward_funcs="think_format", num_generations=1), "num_generations must be 2 or more"),
    "no such estimator": (dict(reward_funcs="think_format", advantage_estimator="grpo"), "is unknown: one of gae"),
    "no such environment": (dict(environment="nowhere.py:Game"), "environment 'nowhere.py:Game': nowhere.py: no such"),
    "no such reward server": (
        dict(reward_funcs="http://127.0.0.1:9/score"),
        "http://127.0.0.1:9/score: the reward server does not answer (ConnectError",
    ),
    "no such server": (
        dict(reward_funcs="think_format", rollout_server_url="http://127.0.0.1:9", rollout_server_model="m",
             rollout_weights_dir="w", server_startup_timeout=0.0),
        "http://127.0.0.1:9 does not answer",
    ),
    "half a server": (dict(reward_funcs="think_format", rollout_server_url="http://x"), "needs --rollout_server_model"),
}  # fmt: skip


@pytest.mark.parametrize("case", ONLINE)
def test_on_policy_mistakes_are_found_before_the_first_rollout(case, fails, tmp_path):
    options, said = ONLINE[case]
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat is big"}, {"prompt": "the dog is small"}])
    assert said in fails("grpo", rows, **{"max_completion_length": 8, "max_length": 64, **options})


def test_an_environment_that_leaves_no_room(fails, tmp_path, out):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat is big"}, {"prompt": "the dog is small"}])
    game = text_file(
        tmp_path / "game.py",
        "class Long:\n    def reset(self, row):\n        return 'the cat ' * (20 if 'dog' in row['prompt'] else 1)\n"
        "    def step(self, answer):\n        return ('', 1.0, True)\n",
    )
    line = fails("ppo", rows, environment=f"{game}:Long", max_completion_length=8, max_length=40)
    assert "environment Long, episode " in line and "are more than max_length 40: raise --max_length" in line
    assert not list(out.glob("*.safetensors"))


def test_an_adapter_that_cannot_teach(fails, data_files, model_folder, tmp_path, tokenizer):
    rows = data_files / "sft.jsonl"
    own = dict(teacher_adapter=model_folder)
    assert "needs --use_peft" in fails("distill", rows, **own)
    line = fails("distill", rows, **own, teacher_model_name_or_path=model_folder)
    assert "--teacher_adapter and --teacher_model_name_or_path exclude each other" in line
    assert "holds no adapter (no adapter_config.json)" in fails("distill", rows, **own, use_peft=True)
    assert "no such model folder" in fails("distill", rows, teacher_adapter="./nowhere", use_peft=True)
    wide = get_peft_model(tiny_model(hidden_size=64), LoraConfig(task_type="CAUSAL_LM", r=2))
    wide.save_pretrained(tmp_path / "wide")
    said = f"wide: cannot be loaded as an adapter of {model_folder}"
    assert said in fails("distill", rows, teacher_adapter=tmp_path / "wide", use_peft=True)


def test_options_are_checked_with_the_nearest_name(fails, pairs, tmp_path):
    assert "unknown option --bta; did you mean --beta?" in fails("dpo", pairs, bta=1)
    assert "--beta: invalid float value: 'high'" in fails("dpo", pairs, beta="high")
    line = fails("dpo", pairs, loss_type="dpo")
    assert "loss_type 'dpo' is unknown: one of sigmoid, hinge, ipo, " in line
    assert "beta must be in (0.0, inf), got -1.0" in fails("dpo", pairs, beta=-1)
    config = text_file(tmp_path / "c.yaml", "lerning_rate: 1e-6\n")
    assert "c.yaml: unknown key 'lerning_rate'; did you mean learning_rate?" in fails("dpo", pairs, config=config)
    config = text_file(tmp_path / "c.yaml", "beta: [1\n")
    assert "c.yaml: not valid YAML" in fails("dpo", pairs, config=config)
    assert "none.yaml: no such config file" in fails("dpo", pairs, config=tmp_path / "none.yaml")


YAML = {
    "a key given twice": ("beta: 0.1\nbeta: 0.2\n", "'beta' is given twice, again in line 2: delete one"),
    "a list for one value": ("beta: [0.1]\n", "'beta' takes one value, got a list"),
    "a mapping for a number": ("beta: {a: 1}\n", "'beta' has a dict, expected text or a number"),
    "a mapping in a list": ("loss_type: [{a: 1}]\n", "'loss_type' has a dict, expected text or a number"),
    "a list of other types": ("loss_weights: [high]\n", "'loss_weights': could not convert string to float: 'high'"),
    "a date": ("seed: 2020-01-01\n", "'seed' has a date, expected text or a number; put text into quotes"),
    "no such date": ("seed: 2020-13-01\n", "not valid YAML (month must be in 1..12"),
    "nothing": ("beta:\n", "'beta' is empty: give a value, or delete the line"),
    "no such choice": ("dtype: fp8\n", "'dtype' must be one of auto, float32"),
    "a bare no": ("save_strategy: no\n", 'got False (write "no" in quotes)'),
    "an environment that is a list": ("env: [1]\n", "'env' must hold `NAME: value` lines, got a list"),
    "no name of a variable": ("env: {A=B: 1}\n", "'env' has no valid variable 'A=B'"),
    "too deep": ("[" * 2000, "nested too deeply"),
    "other text": (b"a: \xff\xfe\n", "not UTF-8 text"),
}


@pytest.mark.parametrize("case", YAML)
def test_a_config_file_with_odd_values_is_named(case, fails, pairs, tmp_path):
    text, said = YAML[case]
    config = tmp_path / "c.yaml"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = fails("dpo", pairs, config=config)
    assert "c.yaml: " in line and said in line


def test_one_value_of_a_list_needs_no_list(tmp_path):
    config = text_file(tmp_path / "c.yaml", "loss_weights: 0.5\nloss_type: sigmoid\n")
    (args,) = parse("dpo", [DPOConfig], ["--config", str(config), "--output_dir", str(tmp_path)])
    assert args.loss_weights == [0.5] and args.loss_type == ["sigmoid"]


IGNORED = {"value_model": "critic", "gamma": 0.9, "lam": 0.5, "vf_coef": 0.5, "cliprange_value": 0.1, "max_turns": 2}


@pytest.mark.parametrize("option", IGNORED)
def test_an_option_that_the_estimator_ignores_is_refused(option, fails, pairs):
    line = fails("grpo", pairs, reward_funcs="think_format", **{option: IGNORED[option]})
    assert f"{option} has no effect with" in line


def test_layouts_and_planned_batches_are_checked(fails, pairs):
    assert "--layout: invalid choice: 'diagonal'" in fails("dpo", pairs, layout="diagonal")
    assert "tokens_per_batch must be at least 1, got 0" in fails("dpo", pairs, tokens_per_batch=0)
    assert "invalid int value: 'many'" in fails("dpo", pairs, tokens_per_batch="many")


def test_what_is_missing_is_asked_for(fails, pairs):
    assert "--dataset_name is missing" in fails("dpo")
    assert "--model_name_or_path is missing" in fails("dpo", pairs, model=None)
    assert "--output_dir is missing" in fails("dpo", pairs, output_dir=None)
    assert "pass --eval_dataset_name" in fails("dpo", pairs, eval_strategy="epoch")


def test_a_folder_that_holds_something_is_left_alone(fails, pairs, out):
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    assert "not empty and no run of ours" in fails("dpo", pairs)
    assert "not empty and no run of ours" in fails("dpo", pairs, overwrite=True)
    assert (out / "thesis.tex").read_text() == "mine"
    (out / "thesis.tex").unlink()
    (out / "completions.jsonl").write_text("{}")  # all that is left of an on-policy run which ended early
    assert "pass --resume to go on, or --overwrite to replace it" in fails("dpo", pairs)
    (out / "completions.jsonl").unlink()
    (out / "training_args.bin").write_bytes(b"a run")
    assert "pass --resume to go on, or --overwrite to replace it" in fails("dpo", pairs)
    assert "no checkpoint to resume from" in fails("dpo", pairs, resume=True)
    assert "exclude each other" in fails("dpo", pairs, resume=True, overwrite=True)


def test_bad_data_does_not_cost_the_run_that_it_would_replace(fails, out, tmp_path):
    out.mkdir()
    (out / "training_args.bin").write_bytes(b"a run")
    bad = write_rows(tmp_path / "rows.jsonl", [{**GOOD, "chosen": ""}])
    assert "row 1: 'chosen' is empty" in fails("dpo", bad, overwrite=True)
    assert (out / "training_args.bin").read_bytes() == b"a run"


def test_nothing_is_written_on_failure(fails, out, tmp_path):
    fails("dpo", write_rows(tmp_path / "rows.jsonl", [{**GOOD, "chosen": ""}]))
    assert not out.exists()


def test_debug_shows_the_traceback(capsys):
    assert main(["sft", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["frobnicate"])
    assert stopped.value.code == 2
    assert "invalid choice: 'frobnicate'" in capsys.readouterr().err


def several_processes(monkeypatch, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("rlhf.cli.failing.SECONDS_FOR_THE_FIRST", 0)
    monkeypatch.setattr("signal.signal", lambda *args: None)  # that of the tests stays


@pytest.mark.parametrize(("rank", "said"), [("0", "rlhf sft: "), ("1", "rlhf sft (process 1): ")])
def test_a_process_that_fails_alone_says_which_it_is(rank, said, capsys, monkeypatch):
    several_processes(monkeypatch, rank)
    assert main(["sft", "--nonsense"]) == 2
    assert capsys.readouterr().err == f"{said}unknown option --nonsense\n"


def test_a_bug_of_one_process_keeps_its_traceback_and_names_the_process(capsys, monkeypatch):
    def run(*args):
        raise KeyError("row")

    monkeypatch.setattr("rlhf.cli.main._run", run)
    several_processes(monkeypatch, "1")
    assert main(["sft"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("rlhf sft (process 1): KeyError: 'row'\n")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "2 processes were launched, and this one sees 1: each would train alone; --use_cpu trains on CPUs"),
        ({"RANK": "0", "ACCELERATE_USE_FSDP": "true"}, "FSDP needs accelerators"),
    ],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="what happens without an accelerator")
def test_processes_that_the_trainer_does_not_see_are_refused(variables, said, tmp_path, monkeypatch):
    """Else each would train on its own, into one folder."""
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        SFTConfig(str(tmp_path))
