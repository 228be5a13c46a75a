"""A dry run predicts the memory that the run then takes within a tenth. Slow: a model of 90 million parameters."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]


def load_measure():
    spec = importlib.util.spec_from_file_location("measure", ROOT / "docs/runs/memory/measure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("run", ["SFT, LoRA", "SFT, all weights", "DPO, stored reference"])
def test_memory_is_predicted_within_a_tenth(run, tmp_path):
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=16, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for file in (ROOT / "demo/model").iterdir():
        if file.name != "config.json":
            shutil.copy(file, tmp_path / "model")
    rows = [json.loads(line) for line in (ROOT / "demo/data/pairs_train.jsonl").read_text().splitlines()]
    # Answers of different lengths, up to 250 tokens.
    words = " ".join(row["chosen"] if isinstance(row["chosen"], str) else row["chosen"][-1]["content"] for row in rows)
    pairs = [
        {"prompt": "Go on:", "chosen": words[i : i + 200 + 37 * i], "rejected": words[i + 50 : i + 250 + 29 * i]}
        for i in range(16)
    ]
    figures = load_measure().compare(run, str(tmp_path / "model"), pairs)
    assert figures["predicted_gib"] == pytest.approx(figures["measured_gib"], rel=0.1)
