"""The pages of own functions and of notebooks: their blocks do what they say."""

from pathlib import Path

from page_runner import run_page

from rlhf.cli import sweep
from rlhf.cli.main import main

DOCS = Path(__file__).parents[2] / "docs"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_the_journey_of_an_own_loss(tmp_path, model_folder, monkeypatch):
    # A process for each run would import torch each time.
    monkeypatch.setattr(sweep, "run_command", main)
    replace = {
        MODEL: model_folder,
        "max_steps: 50": "max_steps: 1",
        "max_steps=50": "max_steps=1",
        "--max_steps 20": "--max_steps 1 --max_length 64",
        "--max_completion_length 16": "--max_completion_length 4",
        "--max_new_tokens 16": "--max_new_tokens 4",
        # Two of the four runs are enough.
        "0.05,0.1,0.2,0.4 --output_dir runs/betas\n```": "0.05,0.4 --output_dir runs/betas\n```",
    }
    ran = run_page(DOCS / "journeys/own-loss.md", work(tmp_path), replace=replace)
    outputs = {one.source.split(" --")[0] + one.source[-9:]: one.output for one in ran}
    wrong = next(one for one in ran if "runs/wrong" in one.source)
    page = (DOCS / "journeys/own-loss.md").read_text()
    assert wrong.status == 2 and wrong.output.strip().splitlines()[-1] in page
    dry, real = (one.output for one in ran if one.source.startswith("rlhf sweep"))
    assert dry.count("not run ") == 4
    assert "sorted by eval_rewards/accuracies, the highest first" in real and outputs
    assert (tmp_path / "work/ends.html").exists() and (tmp_path / "work/runs/betas/report.html").exists()
    assert any("win rate" in one.output.lower() for one in ran if one.source.startswith("rlhf compare"))


def test_the_page_on_extending(tmp_path, model_folder):
    replace = {
        MODEL: model_folder,
        "max_steps=20": "max_steps=1",
        "max_completion_length=16": "max_completion_length=4, max_length=64",
    }
    ran = run_page(DOCS / "extending.md", work(tmp_path), replace=replace)
    assert len(ran) == 12


def test_the_page_on_notebooks(tmp_path, model_folder):
    replace = {MODEL: model_folder, "max_steps=20": "max_steps=6", "max_new_tokens=16": "max_new_tokens=4"}
    ran = run_page(DOCS / "notebook.md", work(tmp_path), replace=replace)
    tail, evaluations, answers = (one.output for one in ran[-3:])
    assert "perplexity" in tail and "eval_loss" in evaluations and "What is 4 + 4?" in answers
