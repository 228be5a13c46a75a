"""The model card: metadata that the hub reads, figures before and after, no path of the machine."""

import json
from types import SimpleNamespace

import pytest
from conftest import tiny_model, write_rows
from huggingface_hub import ModelCard
from peft import LoraConfig

from rlhf import DPOConfig, DPOTrainer
from rlhf.cli.main import main
from rlhf.runs import read_run
from rlhf.runs.card import model_card
from rlhf.runs.files import Run


def test_a_command_leaves_a_card(tmp_path, model_folder, preference_rows):
    """Of an adapter, in place of PEFT's form."""
    rows = write_rows(tmp_path / "secret-place.jsonl", list(preference_rows))
    words = [
        "dpo", f"--model_name_or_path={model_folder}", f"--dataset_name={rows}", f"--eval_dataset_name={rows}",
        f"--output_dir={tmp_path / 'my-run'}", "--eval_on_start", "--max_steps=1", "--use_cpu", "--use_peft",
        "--beta=0.3",
    ]  # fmt: skip
    assert main(words) == 0
    card = ModelCard.load(tmp_path / "my-run/README.md")
    data = card.data.to_dict()
    assert data == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["rlhf", "dpo"]}
    text = card.text
    assert "# my-run" in text and "AutoPeftModelForCausalLM" in text and "arXiv 2305.18290" in text
    assert str(tmp_path) not in text and "secret-place.jsonl" in text and "| `beta` | `0.3` |" in text
    evaluations = [line for line in read_run(tmp_path / "my-run").metrics if "eval_loss" in line]
    assert f"| `loss` | 0.6931 | {evaluations[-1]['eval_loss']:.4g} |" in text
    assert "More Information Needed" not in text


def test_names_on_the_hub_are_metadata(tmp_path):
    record = {
        "trainer": "RewardTrainer",
        "model": {"name": "owner/base", "parameters": 10, "trainable": 2},
        "data": [
            {"name": "owner/pairs", "use": "train", "rows": 7, "files": []},
            {"name": "a/b.jsonl", "use": "train", "rows": 1, "files": []},
        ],
    }
    run = Run(tmp_path / "run", {"beta": 0.1}, record, [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}], [], [])
    card = model_card(run, is_adapter=False)
    assert card.data.base_model == "owner/base" and card.data.datasets == ["owner/pairs"]
    assert card.data.pipeline_tag == "text-classification" and "num_labels=1" in card.text
    assert "| `loss` | 0.5 | 0.25 |" in card.text and "on training rows" in card.text


@pytest.fixture
def hub(monkeypatch):
    """The hub's interface, which notes what is sent."""
    sent = []

    def upload_folder(**kwargs):
        folder = kwargs["folder_path"]
        sent.append((kwargs["commit_message"], ModelCard.load(f"{folder}/README.md").text))

    api = SimpleNamespace(
        create_repo=lambda *args, **kwargs: SimpleNamespace(repo_id="me/run"), upload_folder=upload_folder,
        create_branch=lambda *args, **kwargs: None,
    )  # fmt: skip
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: api)
    return sent


def test_the_final_model_is_sent_to_the_hub_with_its_card(tmp_path, tokenizer, preference_rows, hub):
    args = DPOConfig(
        str(tmp_path),
        max_steps=1,
        use_cpu=True,
        report_to="none",
        push_to_hub=True,
        hub_strategy="end",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        tiny_model(), args=args, train_dataset=preference_rows, processing_class=tokenizer, peft_config=LoraConfig()
    )
    trainer.train()
    assert hub == []
    trainer.save_model()
    ((message, text),) = hub
    assert message == "Model save" and f"# {tmp_path.name}" in text
    marked = json.loads((tmp_path / "complete.json").read_text())["files"]
    assert "README.md" not in marked and "adapter_model.safetensors" in marked
