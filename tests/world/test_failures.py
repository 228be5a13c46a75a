"""What is found before the first step is told in one line, with status 2; most of it before a model is loaded."""

import json
import os
import shutil

import pytest
import torch
from conftest import tiny_model, write_rows
from safetensors.torch import load_file, save_file

from rlhf.cli.main import main

BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}


@pytest.fixture
def fails(capsys, tmp_path, model_folder, data_files):
    """Run a command that must fail; gives its one line, and whether weights were asked for."""

    def run(command="sft", **options):
        file = "preferences" if command in ("dpo", "reward") else "sft"
        base = dict(
            model_name_or_path=model_folder, dataset_name=data_files / f"{file}.jsonl", output_dir=tmp_path / "out",
            max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        argv = [command]
        for name, value in (base | options).items():
            if value is not None:
                argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        capsys.readouterr()
        assert main(argv) == 2
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith(f"rlhf {command}: ")]
        assert len(lines) == 1 and "Traceback" not in printed.err + printed.out
        return lines[0]

    return run


EARLY = {
    "columns of no kind": ("sft", {"dataset_name": "odd"}, "odd.jsonl: no column to train on: found here, there"),
    "no pairs": ("dpo", {"dataset_name": "odd"}, "odd.jsonl: no column 'chosen' and 'rejected': found here, there"),
    "pairs that are none": ("reward", {"dataset_name": "odd"}, "no column 'chosen' and 'rejected'"),
    "no labels": ("kto", {"dataset_name": "odd"}, "odd.jsonl: no column 'label': found here, there"),
    "no prompts": ("grpo", {"dataset_name": "odd", "reward_funcs": "length_reward"}, "no column 'prompt'"),
    "evaluation rows of another kind": ("dpo", {"eval_dataset_name": "odd"}, "odd.jsonl: no column 'chosen'"),
    "evaluation without rows": ("sft", {"eval_strategy": "steps"}, "no rows: pass --eval_dataset_name"),
    "an unknown tracker": ("sft", {"report_to": "wandbb"}, "--report_to wandbb is unknown: one of"),
    "several trackers": ("sft", {"report_to": ["mlflow", "wandbb"]}, "--report_to "),
    "an unknown optimizer": ("sft", {"optim": "adamm"}, "adamm"),
    "an optimizer's package": ("sft", {"optim": "galore_adamw"}, "pip install galore-torch"),
    "an optimizer of another device": ("sft", {"optim": "adamw_bnb_8bit"}, "bitsandbytes has no optimizers for a CPU"),
    "deepspeed's package": ("sft", {"deepspeed": '{"zero_optimization": {}}'}, "pip install deepspeed"),
    "a resumed folder that is not there": ("sft", {"resume_from_checkpoint": "/none"}, "/none: no such folder"),
    "a resumed folder that is no checkpoint": ("sft", {"resume_from_checkpoint": "model"}, "no trainer_state.json"),
    "nothing to resume": ("sft", {"resume_from_checkpoint": "true"}, "no checkpoint to resume from"),
    "steps of no batch": ("sft", {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
    "JSON with a fault": ("sft", {"model_init_kwargs": '{"a": }'}, "--model_init_kwargs {\"a\": }: not valid JSON"),
    "text where JSON is due": ("sft", {"chat_template_kwargs": "no"}, "--chat_template_kwargs no: not valid JSON"),
    "float16 in training on a CPU": ("sft", {"tf32": True}, "--tf32 requires"),
    "label smoothing": ("sft", {"label_smoothing_factor": 0.1}, "--label_smoothing_factor 0.1 has no effect here"),
    "evaluation in bfloat16": ("sft", {"bf16_full_eval": True}, "--bf16_full_eval true has no effect here"),
    "Liger": ("sft", {"use_liger_kernel": True}, "--use_liger_kernel true has no effect here"),
    "packing and groups by length": (
        "sft", {"packing": True, "train_sampling_strategy": "group_by_length"}, "plan rows by their length already"),
    "groups by length of prompts": (
        "grpo", {"reward_funcs": "length_reward", "train_sampling_strategy": "group_by_length"}, "shuffle_dataset"),
    "a best checkpoint without evaluation": ("sft", {"load_best_model_at_end": True}, "strategy to match"),
}  # fmt: skip


@pytest.mark.parametrize("case", EARLY)
def test_what_needs_no_weights_is_found_without_them(case, fails, tmp_path, model_folder, monkeypatch):
    """A wrong column cost the loading of a large model before it was named."""
    command, options, said = EARLY[case]
    odd = write_rows(tmp_path / "odd.jsonl", [{"here": "the cat", "there": "1"}])
    files = {"odd": odd, "model": model_folder}
    options = {name: files.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("weights loaded"))
    assert said in fails(command, **options)


def torn(folder, model_folder):
    shutil.copytree(model_folder, folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)


def other_shape(folder, model_folder):
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def no_json(folder, model_folder):
    shutil.copytree(model_folder, folder)
    (folder / "config.json").write_text("{")


def unknown_family(folder, model_folder):
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llamaa"}))


def encoder_decoder(folder, model_folder):
    from transformers import T5Config, T5ForConditionalGeneration

    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    T5ForConditionalGeneration(
        T5Config(vocab_size=330, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    ).save_pretrained(folder)


def fewer_tokens(folder, model_folder):
    shutil.copytree(model_folder, folder)
    tiny_model(vocab_size=100).save_pretrained(folder)


def few_positions(folder, model_folder):
    shutil.copytree(model_folder, folder)
    tiny_model("gpt2", n_positions=8).save_pretrained(folder)


MODELS = {
    "weights that end early": (torn, {}, "cannot be loaded as a causal LM"),
    "weights of another shape": (other_shape, {}, "its weights have other shapes than its config.json says"),
    "a config that is no JSON": (no_json, {}, "config.json: not valid JSON"),
    "a family that nobody knows": (unknown_family, {}, "llamaa"),
    "an encoder with a decoder": (encoder_decoder, {}, "its config is a T5Config"),
    "a tokenizer of another model": (fewer_tokens, {}, "100: is this the model's own tokenizer?"),
    "rows beyond the positions": (few_positions, {}, "8 positions): pass --max_length 8 or less"),
    "an unknown dtype": (None, {"dtype": "float31"}, "float31"),
    "an unknown attention": (None, {"attn_implementation": "flash"}, "cannot be loaded as a causal LM"),
    "an attention that is not installed": (None, {"attn_implementation": "flash_attention_2"}, "a package is missing"),
    "an unknown argument of the model": (None, {"model_init_kwargs": '{"hidden_sizze": 3}'}, "hidden_sizze"),
    "a metric that evaluation does not give": (
        None, {**BEST, "eval_dataset_name": "sft", "metric_for_best_model": "bleu"},
        "--metric_for_best_model bleu: evaluation gives loss, perplexity"),
    "the hub, offline": (None, {"push_to_hub": True}, "offline"),
    "what a schedule does not take": (None, {"lr_scheduler_kwargs": '{"foo": 1}'}, "--lr_scheduler_kwargs {'foo': 1}"),
    "what a schedule needs": (None, {"lr_scheduler_type": "warmup_stable_decay"}, "--lr_scheduler_kwargs None: "),
    "batches that are dropped": (
        None, {"dataloader_drop_last": True, "per_device_train_batch_size": 64}, "leaves nothing to train on: 48 rows"),
    "a layer that is not there": (None, {"use_peft": True, "lora_target_modules": "q_prooj"}, "q_prooj"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_what_is_wrong_with_a_model_is_one_line(case, fails, tmp_path, model_folder, data_files):
    make, options, said = MODELS[case]
    if make is not None:
        make(tmp_path / "model", model_folder)
        options = {**options, "model_name_or_path": tmp_path / "model"}
    if options.get("eval_dataset_name") == "sft":
        options = {**options, "eval_dataset_name": data_files / "sft.jsonl"}
    line = fails(**options)
    assert said in line
    assert not os.path.exists(tmp_path / "out" / "trainer_state.json")
