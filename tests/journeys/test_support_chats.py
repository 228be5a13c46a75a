"""docs/journeys/support-chats.md, with a tiny model and fewer steps."""

import json

import pytest
from conftest import tiny_model
from page_runner import ROOT, run_page

SUPPORT = ROOT / "examples/support"


@pytest.fixture
def tiny_folder(tmp_path, tokenizer):
    """A model that reads a ticket whole."""
    folder = tmp_path / "tiny"
    tiny_model(max_position_embeddings=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_from_a_csv_to_a_served_model(tmp_path, tiny_folder):
    work = tmp_path / "work"
    work.mkdir()
    ran = run_page(
        ROOT / "docs/journeys/support-chats.md",
        work,
        replace={
            "HuggingFaceTB/SmolLM2-135M-Instruct": tiny_folder,
            "--max_steps 20": "--max_steps 2",
            "--max_new_tokens 64": "--max_new_tokens 8",
            "--max_new_tokens 100": "--max_new_tokens 8",
            "--max_length 512": "--max_length 2048",
        },
        files={name: SUPPORT / name for name in ("chats.csv", "held_out.csv")},
    )
    printed = {step.source.split()[0] + " " + step.source.split()[1]: step.output for step in ran}
    assert "row 18: 'answer' is empty" in printed["rlhf data"]
    assert "100 of 105 rows are clean" in printed["python clean.py"]
    assert "win rate" in printed["rlhf compare"]
    assert "checked: logits as the adapter's" in printed["rlhf merge"]
    assert json.loads((work / "models/support/generation_config.json").read_text())["eos_token_id"] == 0
    assert (work / "models/support/Modelfile").exists()
    assert any(step.output.startswith("vllm serve models/support") for step in ran)
