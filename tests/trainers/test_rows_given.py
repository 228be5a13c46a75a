"""Trainers take rows as a program has them."""

import pandas as pd
import pytest
from conftest import tiny_model

import rlhf


def is_short(completions, **columns):
    return [-float(len(text)) for text in completions]


@pytest.mark.parametrize("kind", ["list", "frame", "path"])
@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_a_trainer_takes_them(tmp_path, tokenizer, data_files, preference_rows, sft_rows, name, kind):
    file = data_files / ("preferences.jsonl" if name == "DPO" else "sft.jsonl")
    rows = preference_rows if name == "DPO" else sft_rows
    given = {"list": list(rows), "frame": pd.DataFrame(list(rows)), "path": file}[kind]
    args = getattr(rlhf, f"{name}Config")(
        str(tmp_path), use_cpu=True, report_to="none", **({"num_generations": 4} if name == "GRPO" else {})
    )
    reward = {"reward_funcs": is_short} if name == "GRPO" else {}
    trainer = getattr(rlhf, f"{name}Trainer")(
        tiny_model(), args=args, train_dataset=given, eval_dataset={"a": given}, processing_class=tokenizer, **reward
    )
    assert len(trainer.train_dataset) == len(trainer.eval_dataset["a"]) == 48


def test_model_and_tokenizer_by_name(tmp_path, model_folder):
    args = rlhf.SFTConfig(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = rlhf.SFTTrainer(str(model_folder), args, train_dataset=[{"prompt": "the cat", "completion": " is big"}])
    trainer.train()
    rows = [{"prompt": "a dog", "completion": " is red"}]
    from_list = trainer.evaluate(rows)["eval_loss"]
    assert from_list == trainer.evaluate(pd.DataFrame(rows, index=[7]))["eval_loss"] > 0
    assert trainer.processing_class.eos_token == "<|im_end|>"
