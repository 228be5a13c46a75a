"""A training script written for TRL, with the import changed."""

import os
import sys

import pytest
from conftest import tiny_model, write_rows

from rlhf import (
    DistillationConfig,
    DistillationTrainer,
    DistillConfig,
    DistillTrainer,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)


def test_a_script_runs(tmp_path, tokenizer, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "the cat is small"}] * 4)
    other = write_rows(tmp_path / "other.jsonl", [{"text": "the dog"}] * 2)
    config = tmp_path / "sft.yaml"
    config.write_text(
        f"env:\n  SCRIPT_TEST: 7\ndataset_name: {rows}\neval_dataset_name: {other}\nuse_peft: true\nlora_r: 4\n"
        f"output_dir: {tmp_path / 'run'}\nreport_to: none\nuse_cpu: true\nmax_steps: 5\n"
    )
    monkeypatch.setenv("SCRIPT_TEST", "before")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), "--max_steps", "1"])
    script_args, training_args, model_args = TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig)
    ).parse_args_and_config()
    assert os.environ["SCRIPT_TEST"] == "7"
    assert training_args.max_steps == 1
    assert get_quantization_config(model_args) is None
    dataset = get_dataset(script_args)
    assert (len(dataset["train"]), len(dataset["test"])) == (4, 2)
    trainer = SFTTrainer(
        model=tiny_model(), args=training_args, train_dataset=dataset["train"], eval_dataset=dataset["test"],
        processing_class=tokenizer, peft_config=get_peft_config(model_args),
    )  # fmt: skip
    trainer.train()
    assert trainer.model.peft_config["default"].r == 4


def test_an_unknown_option_is_named():
    with pytest.raises(ValueError, match=r"unknown option --lora_rank; did you mean --lora_r\?"):
        TrlParser(ModelConfig).parse_args_and_config(["--lora_rank", "4"])
    assert get_peft_config(ModelConfig(model_name_or_path="x")) is None


def test_distillation_by_trls_names():
    assert (DistillationConfig, DistillationTrainer) == (DistillConfig, DistillTrainer)
