"""``rlhf eval`` with several models, a reference, JSON on stdout, and tasks of lm-eval."""

import importlib.util
import json

import pytest
from conftest import close, tiny_model, write_rows

from rlhf.cli.main import main


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("other")
    tiny_model(seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(capsys):
    """Runs the command and returns the JSON that it prints."""

    def run(*argv):
        assert main(["eval", *map(str, argv), "--output_file", "-"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_models_are_columns_and_the_reference_is_one_of_them(evaluate, model_folder, other_folder, data_files):
    rows = ["--dataset_name", data_files / "sft.jsonl"]
    names = [str(model_folder), str(other_folder)]
    answers = ["--num_completions", "2", "--max_new_tokens", "3"]
    # Without pairs there are no preferences to measure, and the reference is a model like the others.
    both = evaluate("--model_name_or_path", names[0], "--ref_model_name_or_path", names[1], *rows, *answers)
    assert both["model"] == list(both["metrics"]) == names and both["reference"] == names[1]
    alone = evaluate("--model_name_or_path", names[1], *rows, *answers)
    assert alone["metrics"] == both["metrics"][names[1]] != both["metrics"][names[0]]
    assert [row["completions"][names[1]] for row in both["completions"]] == [
        row["completion"] for row in alone["completions"]
    ]


def test_the_figures_of_the_reference_are_its_own(evaluate, model_folder, other_folder, data_files):
    rows = ["--dataset_name", data_files / "preferences.jsonl"]
    names = [str(model_folder), str(other_folder)]
    third = ["--model_name_or_path", names[0], names[1], "--ref_model_name_or_path", names[0], *rows]
    found = evaluate(*third)["metrics"]
    assert list(found) == names and found[names[0]]["rewards/accuracies"] == 0.5
    # As derived from the other model's rewards.
    from rlhf.cli.eval import reference_metrics

    for name, value in reference_metrics(found[names[1]], 0.1).items():
        close(value, found[names[0]][name])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model_name_or_path", "a", "a"], "a is named twice"),
        (["--model_name_or_path", "a", "b", "--teacher_model_name_or_path", "t"], "judges one model, got 2"),
        (["--model_name_or_path", "a", "b", "--model_revision", "v1"], "--model_revision is of one model"),
    ],
)
def test_options_that_do_not_fit_are_told(argv, message, capsys):
    assert main(["eval", *argv, "--dataset_name", "x.jsonl"]) == 2
    assert message in capsys.readouterr().err


def test_tasks_in_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["eval", "--model_name_or_path", "a", "--tasks", "gsm8k"]) == 2
    assert "--tasks runs in one process" in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("rlhf.evaluation.harness.find_spec", lambda name: None)
    assert main(["eval", "--model_name_or_path", "a", "--tasks", "gsm8k"]) == 2
    assert capsys.readouterr().err.strip().endswith("--tasks needs lm-eval: pip install 'rlhf-exact[eval]'")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval")
def test_tasks_of_lm_eval_are_rows_of_the_same_table(
    evaluate, tmp_path, model_folder, other_folder, data_files, capsys
):
    """A task of our own: which of two words follows, by log-likelihood."""
    rows = [
        {"question": f"the {word} is", "choices": [" big", " small"], "gold": 0} for word in ("cat", "dog", "river")
    ]
    file = write_rows(tmp_path / "words.jsonl", rows)
    task = tmp_path / "words.yaml"
    lines = ["task: words", "dataset_path: json", "dataset_kwargs:", f"  data_files: {file}", "test_split: train"]
    lines += ["output_type: multiple_choice", 'doc_to_text: "{{question}}"', "doc_to_choice: choices"]
    lines += ["doc_to_target: gold", 'target_delimiter: ""', "metric_list:", "  - metric: acc"]
    task.write_text("\n".join(lines) + "\n")
    names = [str(model_folder), str(other_folder)]
    found = evaluate("--model_name_or_path", *names, "--tasks", task, "--dataset_name", data_files / "sft.jsonl")
    for name, seed in zip(names, (0, 1), strict=True):
        metrics = found["metrics"][name]
        assert metrics["words/acc"] == pytest.approx(share_of_first_choice(seed, rows)) and "perplexity" in metrics
    alone = evaluate("--model_name_or_path", names[0], "--tasks", task)
    assert alone["metrics"]["words/acc"] == found["metrics"][names[0]]["words/acc"]
    assert main(["eval", "--model_name_or_path", names[0], "--tasks", "no_such_task"]) == 2
    assert "no such task of lm-eval" in capsys.readouterr().err


def share_of_first_choice(seed, rows):
    """By the model's own forward."""
    import torch
    from conftest import small_tokenizer

    tokenizer, model = small_tokenizer(), tiny_model(seed=seed).eval()
    right = 0
    for row in rows:
        prompt = tokenizer(row["question"])["input_ids"]
        scores = []
        for choice in row["choices"]:
            ids = tokenizer(row["question"] + choice)["input_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(logps[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
        right += scores[0] > scores[1]
    return right / len(rows)
