"""The commands from a data file to a checkpoint, in process."""

import json
import os
from unittest.mock import Mock

import pytest
import torch
from conftest import close, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rlhf
from rlhf import DistillConfig, DistillTrainer, SFTConfig
from rlhf.cli.arguments import DataArguments, ModelArguments
from rlhf.cli.commands import COMMANDS, GROUPS
from rlhf.cli.main import main
from rlhf.cli.parsing import parse
from rlhf.data import load_data

FILES = {"sft": "sft.jsonl", "distill": "sft.jsonl", "dpo": "preferences.jsonl", "reward": "preferences.jsonl"}


@pytest.fixture
def train(tmp_path, model_folder, data_files, capsys):
    def run(command, *more):
        options = dict(
            model_name_or_path=model_folder, output_dir=tmp_path / "run", max_steps=2, learning_rate=1e-3,
            dataset_name=data_files / FILES[command], report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        assert main([command, *(f"--{k}={v}" for k, v in options.items()), *more]) == 0, capsys.readouterr().err
        return tmp_path / "run"

    return run


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_from_a_file_to_a_checkpoint_that_loads(command, train, model_folder, data_files):
    file = data_files / FILES[command]
    folder = train(command, "--eval_dataset_name", str(file), "--dataset_test_split", "train[:8]")
    trained, start = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, model_folder))
    assert trained.config.to_dict().keys() == start.config.to_dict().keys()
    assert trained.config.use_cache == start.config.use_cache
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(model_folder).chat_template
    )
    results = json.loads((folder / "all_results.json").read_text())
    assert results["eval_perplexity" if command == "sft" else "eval_rewards/accuracies"] > 0


def test_an_adapter_is_saved_alone_and_loads(train, model_folder):
    folder = train("dpo", "--use_peft", "--lora_r", "4")
    assert not (folder / "model.safetensors").exists()
    adapted = AutoModelForCausalLM.from_pretrained(folder)  # transformers reads adapter_config.json
    assert any("lora_B" in name and p.any() for name, p in adapted.named_parameters())
    assert main(["eval", "--model_name_or_path", str(folder), "--dataset_name", "x.jsonl"]) == 2  # merges, then reads


def test_a_student_of_a_teacher_in_a_folder(train, model_folder, data_files):
    teacher = [
        "--teacher_model_name_or_path",
        str(model_folder),
        "--teacher_model_init_kwargs",
        '{"dtype": "bfloat16"}',
    ]
    rows = ["--eval_dataset_name", str(data_files / "sft.jsonl")]
    folder = train("distill", *teacher, *rows, "--divergence", "skew_kl", "--alpha", "0.2", "--reverse")
    results = json.loads((folder / "all_results.json").read_text())
    assert 0 < results["eval_kl"] < 1 and 0.5 < results["eval_agreement"] < 1  # of bfloat16 and two steps
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"


def test_an_adapter_in_a_folder_teaches_another_one(train, tmp_path, model_folder, data_files):
    """Both on one model: the teacher stays as it was, and a run that goes on has it again."""
    rows = ["--eval_dataset_name", str(data_files / "sft.jsonl"), "--use_peft", "--learning_rate", "3e-2"]
    teacher = train("sft", *rows, "--output_dir", str(tmp_path / "tutor")).with_name("tutor")
    perplexity = json.loads((teacher / "all_results.json").read_text())["eval_perplexity"]
    own = [
        "--teacher_adapter",
        str(teacher),
        "--save_steps",
        "1",
        "--logging_steps",
        "1",
        "--divergence",
        "kl_divergence",
    ]
    folder = train("distill", *rows, *own)
    train("distill", *rows, *own, "--resume", "--max_steps", "12")
    results = json.loads((folder / "all_results.json").read_text())
    close(results["eval_teacher_perplexity"], perplexity)
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert 0 < results["eval_kl"] < 0.9 * log[0]["loss"]
    before, after = (load_file(f / "adapter_model.safetensors") for f in (teacher, folder / "teacher"))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    pupil = AutoModelForCausalLM.from_pretrained(folder)  # of the two, the student
    assert list(pupil.peft_config) == ["default"]


@pytest.mark.parametrize("peft", [(), ("--use_peft", "--lora_r", "4")])
def test_a_reward_model_from_a_file_and_on_from_there(peft, train, data_files, tmp_path, capsys):
    rows = ["--eval_dataset_name", str(data_files / "preferences.jsonl")]
    folder = train("reward", *rows, *peft)
    results = json.loads((folder / "all_results.json").read_text())
    assert 0 <= results["eval_calibration_error"] <= 1 and 0 < results["eval_accuracy"] < 1
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert loaded.score.weight.shape[0] == 1 and loaded.score.weight.abs().max() > 0
    train(
        "reward",
        *rows,
        "--model_name_or_path",
        str(folder),
        "--output_dir",
        str(tmp_path / "more"),
        "--logging_steps",
        "1",
    )
    (first, *_) = json.loads((tmp_path / "more" / "trainer_state.json").read_text())["log_history"]
    assert first["std_reward"] > 0  # the head was kept


def test_resume_and_overwrite(train, capsys, monkeypatch):
    folder = train("sft", "--save_steps", "1", "--resume", "auto")
    assert (folder / "checkpoint-2").is_dir()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):  # stopped before its results
        patch.setattr(rlhf.SFTTrainer, "save_metrics", Mock(side_effect=RuntimeError))
        train("sft", "--save_steps", "1", "--resume", "--max_steps", "3")
    train("sft", "--save_steps", "1", "--resume", "--max_steps", "3")
    assert "already complete" not in capsys.readouterr().out
    assert (folder / "all_results.json").exists()
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    train("sft", "--save_steps", "1", "--resume", "auto", "--max_steps", "3")
    assert f"{folder}: already complete at step 3" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files  # it trained a step more
    train("sft", "--save_strategy", "no", "--overwrite")
    assert not (folder / "checkpoint-2").exists() and (folder / "model.safetensors").exists()


def test_eval_says_the_same_for_any_batch_size(tmp_path, model_folder, data_files, train):
    tuned = train("sft")
    found = []
    for size in (1, 5, 48):
        report = tmp_path / f"{size}.json"
        argv = ["eval", "--model_name_or_path", str(tuned), "--ref_model_name_or_path", str(model_folder)]
        argv += ["--dataset_name", str(data_files / "preferences.jsonl"), "--batch_size", str(size)]
        assert main([*argv, "--num_completions", "2", "--max_new_tokens", "4", "--output_file", str(report)]) == 0
        found.append(json.loads(report.read_text()))
    for report in found[1:]:
        assert report["metrics"] == pytest.approx(found[0]["metrics"], rel=1e-5, abs=1e-5)
        assert report["completions"] == found[0]["completions"]
    assert {"rewards/accuracies", "rewards/margins", "perplexity/chosen"} <= found[0]["metrics"].keys()
    assert len(found[0]["completions"]) == 2


def test_eval_judges_a_student_beside_its_teacher(tmp_path, tokenizer, model_folder, data_files, capsys):
    """The figures are the trainer's; the costs of both are in the table and in the file."""
    teacher, report, file = tmp_path / "teacher", tmp_path / "report.json", data_files / "sft.jsonl"
    tiny_model(seed=1, num_hidden_layers=3).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    argv = ["eval", "--model_name_or_path", str(model_folder), "--teacher_model_name_or_path", str(teacher)]
    argv += ["--dataset_name", str(file), "--max_new_tokens", "3", "--batch_size", "4"]
    assert main([*argv, "--output_file", str(report), "--num_completions", "1"]) == 0
    shown, found = capsys.readouterr().out, json.loads(report.read_text())
    trainer = DistillTrainer(
        str(model_folder), str(teacher), DistillConfig(str(tmp_path / "run"), report_to="none", use_cpu=True),
        eval_dataset=load_data(str(file)),
    )  # fmt: skip
    want = trainer.evaluate()
    student, other = found["metrics"], found["teacher_metrics"]
    for name in ("kl", "agreement", "perplexity"):
        close(student.pop(name), want[f"eval_{name}"])
    close(other.pop("perplexity"), want["eval_teacher_perplexity"])
    costs = ["million parameters", "MiB", "forward tokens/s", "generation tokens/s"]
    assert list(student) == list(other) == costs
    assert min(*student.values(), *other.values()) > 0 and student["MiB"] < other["MiB"]
    assert found["teacher"] == str(teacher) and len(found["completions"]) == 1
    assert all(word in shown for word in ("student", "teacher", "kl", "agreement", *costs))
    assert main([*argv, "--ref_model_name_or_path", str(teacher)]) == 2
    line = capsys.readouterr().err.strip()
    assert line.endswith("--teacher_model_name_or_path and --ref_model_name_or_path exclude each other: pass one")


def read(tmp_path, text, *argv):
    (tmp_path / "c.yaml").write_text(text)
    return parse("sft", (DataArguments, ModelArguments, SFTConfig), ["--config", str(tmp_path / "c.yaml"), *argv])


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    text = (
        f"learning_rate: 3e-4\nmax_length: 77\nuse_peft: false\noutput_dir: {tmp_path}\nlora_target_modules: [q_proj]\n"
    )
    _, model, args = read(tmp_path, text, "--max_length", "99", "--use_peft", "true")
    assert (args.learning_rate, args.max_length, model.use_peft) == (3e-4, 99, True)
    assert model.lora_target_modules == ["q_proj"] and model.lora_r == 16


def test_old_names_are_taken_with_a_warning(tmp_path, caplog):
    args = read(tmp_path, f"max_seq_length: 55\noutput_dir: {tmp_path}\n")[-1]
    assert args.max_length == 55 and "max_seq_length is now called max_length" in caplog.text


def test_help_fits_a_screen(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    # Under headings, as there are more commands than a small screen has lines.
    assert len(shown.splitlines()) <= 45 and max(map(len, shown.splitlines())) <= 80
    assert [name for name in COMMANDS if f"\n  {name} " not in shown] == []
    assert {command.group for command in COMMANDS.values()} == set(GROUPS)


def test_help_of_a_command_lists_our_options_first(capsys):
    with pytest.raises(SystemExit):
        main(["sft", "--help"])
    shown = capsys.readouterr().out
    ours, theirs = shown.split("inherited from transformers.TrainingArguments")
    assert all(f"--{name}" in ours for name in ("config", "dataset_name", "max_length", "output_dir", "learning_rate"))
    assert "--adam_beta1" in theirs and "--adam_beta1" not in ours


def test_caches_of_operators_are_bounded_unless_the_user_says_otherwise(monkeypatch):
    """With torch's own bounds, a run over batches of many lengths grew by 170 MB (tests/soak/memory.py)."""
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    main(["--version"])
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128" and os.environ["LRU_CACHE_CAPACITY"] == "7"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == rlhf.__version__
