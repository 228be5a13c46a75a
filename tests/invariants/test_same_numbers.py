"""Whole runs that must agree: losses, metrics and weights do not depend on how the work is cut up."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import close, tiny_model
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from rlhf import (
    DistillConfig,
    DistillTrainer,
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf.cli.main import main
from rlhf.data import Collator

ROOT = Path(__file__).parents[2]
STEPS = 3
scoring = importlib.import_module("rlhf.logprobs.chunk_plan")  # the name in the package is the function's
KINDS = {
    "sft": (SFTTrainer, SFTConfig, "sft_rows"),
    "dpo": (DPOTrainer, DPOConfig, "preference_rows"),
    "kto": (KTOTrainer, KTOConfig, "unpaired_rows"),
    "reward": (RewardTrainer, RewardConfig, "preference_rows"),
    "distill": (DistillTrainer, DistillConfig, "sft_rows"),
}
# Gradients that are nearly 0 come out of rounding here, and Adam would magnify them.
OWN = {"distill": dict(temperature=2.0, crossentropy_weight=0.5, optim="sgd", learning_rate=0.3)}
LOADERS = {"reward": AutoModelForSequenceClassification}
CUT = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "epoch")
CUT += ("tokens_per_second/rollout",)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def run(kind, request, tmp_path, tokenizer):
    """Train a fresh tiny model; gives its log and weights."""

    def train(batch=8, accumulation=1, collator=None, peft=None, resume=None, callbacks=(), name="run", **changes):
        trainer_class, config_class, rows = KINDS[kind]
        args = config_class(
            str(tmp_path / name), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            max_steps=STEPS, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True,
            **{"learning_rate": 1e-3, "save_strategy": "no", **OWN.get(kind, {}), **changes},
        )  # fmt: skip
        trainer = trainer_class(
            model=tiny_model(), args=args, data_collator=collator, train_dataset=request.getfixturevalue(rows),
            processing_class=tokenizer, callbacks=list(callbacks), peft_config=peft,
            **({"teacher_model": tiny_model(seed=1)} if kind == "distill" else {}),
        )  # fmt: skip
        if "layout" in changes:
            assert trainer.data_collator.layout == changes["layout"]
        trainer.train(resume_from_checkpoint=resume)
        return log_of(trainer), dict(trainer.model.model.named_parameters())

    return train


def log_of(trainer):
    return [{k: v for k, v in entry.items() if k not in CUT} for entry in trainer.state.log_history if "loss" in entry]


def agree(one, other):
    (log, weights), (other_log, other_weights) = one, other
    assert len(log) == len(other_log) == STEPS
    for entry, other_entry in zip(log, other_log, strict=True):
        assert entry.keys() == other_entry.keys()
        for key in entry:
            close(other_entry[key], entry[key])
    assert weights.keys() == other_weights.keys()
    for key, weight in weights.items():
        close(other_weights[key].detach(), weight.detach())


@pytest.fixture
def whole(run):
    return run()


def test_weights_move_and_the_log_has_figures(whole):
    log, weights = whole
    start = dict(tiny_model().named_parameters())
    assert all(not torch.equal(weights[key], start[key]) for key in weights.keys() & start.keys())
    assert log[0]["loss"] > 0 and log[0]["grad_norm"] > 0


def test_accumulated(run, whole):
    agree(whole, run(batch=1, accumulation=8))


def test_padded_rows(run):
    agree(run(layout="segments"), run(layout="rows"))


def test_padded_rows_under_an_adapter(run):
    """For DPO, the reference is the model with its adapter off. Adam would magnify A's gradients, zero at first."""

    def one(layout):
        adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        return run(layout=layout, peft=adapter, optim="sgd", learning_rate=1.0)

    log, weights = one("segments")
    assert abs(log[-1]["loss"] - log[0]["loss"]) > 1e-3
    agree((log, weights), one("rows"))


@pytest.mark.parametrize("layout", ["segments", "rows"])
def test_batches_planned_by_tokens(run, layout):
    """All rows in each step, in one batch or in many of unequal size."""
    agree(run(batch=48), run(layout=layout, tokens_per_batch=100, accumulation=48))


@pytest.mark.parametrize("kind", ["sft"], indirect=True)
@pytest.mark.parametrize("layout", ["segments", "rows"])
def test_packed(run, layout):
    agree(run(batch=48, max_length=64), run(layout=layout, packing=True, max_length=64, batch=3, accumulation=48))


def test_left_padded(run, whole):
    agree(whole, run(collator=Collator(0, padding_side="left")))


def wider(rows, more=5):
    """The collator's batch with more padding, of a token that occurs in the text."""
    batch = Collator(7)(rows)
    width = batch.input_ids.size(1)
    tensors = {name: F.pad(t, (0, more), value=7 if name == "input_ids" else 0) for name, t in batch.inputs().items()}
    row, column = batch.targets.source // width, batch.targets.source % width
    return replace(batch, targets=replace(batch.targets, source=row * (width + more) + column), **tensors)


def test_padded_wider(run, whole):
    agree(whole, run(collator=wider))


@pytest.mark.parametrize("kind", ["sft", "dpo", "distill"], indirect=True)
def test_any_chunk_size(run, whole, monkeypatch):
    monkeypatch.setattr(scoring, "_chunk_size", lambda *_: 3)
    agree(whole, run())


@pytest.mark.parametrize("kind", ["sft", "dpo"], indirect=True)
def test_logits_kept_or_computed_again(run, whole, monkeypatch):
    monkeypatch.setattr(scoring, "_chunks_to_cache", lambda *_: 0)
    agree(whole, run())


def test_collated_by_a_worker(run, whole):
    agree(whole, run(dataloader_num_workers=1))


def test_activation_checkpointing(run, whole):
    agree(whole, run(activation_checkpointing=True))


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_resumed_is_uninterrupted(kind, run, whole, tmp_path):
    run(name="cut", callbacks=[Stop()], save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert LOADERS.get(kind, AutoModelForCausalLM).from_pretrained(checkpoint).config.model_type == "llama"
    agree(whole, run(name="cut", resume=str(checkpoint)))


@pytest.fixture
def teacher_folder(tmp_path, tokenizer):
    tiny_model(seed=1).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def words_of(kind, folder, data, processes, **more):
    options = dict(
        dataset_name=data, output_dir=folder, per_device_train_batch_size=8 // processes, max_steps=STEPS,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", eval_dataset_name=data,
        per_device_eval_batch_size=5,
    ) | OWN.get(kind, {}) | more  # fmt: skip
    return [kind, *(f"--{key}={value}" for key, value in options.items()), "--use_cpu"]


def read_run(kind, folder):
    """Log and weights, and the evaluation."""
    state = json.loads((folder / "trainer_state.json").read_text())
    log = [{k: v for k, v in entry.items() if k not in CUT} for entry in state["log_history"] if "loss" in entry]
    weights = dict(LOADERS.get(kind, AutoModelForCausalLM).from_pretrained(folder).named_parameters())
    return (log, weights), json.loads((folder / "all_results.json").read_text())


def test_two_processes(tmp_path, model_folder, teacher_folder, data_files, subtests):
    """Each trainer as its command, against one process with twice the batch; all in one launch."""
    answered, teacher = tmp_path / "answered", dict(teacher_model_name_or_path=teacher_folder)
    options = dict(
        model_name_or_path=teacher_folder, dataset_name=data_files / "sft.jsonl", output_dir=answered, k=4,
        temperature=2.0,
    )  # fmt: skip
    assert main(["teacher", *(f"--{key}={value}" for key, value in options.items())]) == 0
    runs = {
        "sft": ("sft", "sft", {}),
        "dpo": ("dpo", "preferences", {}),
        "kto": ("kto", "unpaired", {}),
        "reward": ("reward", "preferences", {}),
        "distill": ("distill", "sft", teacher),
        # The same rows are answered, with the same tokens, whichever process holds them.
        "on-policy": (
            "distill",
            "sft",
            dict(
                lmbda=0.5, max_length=64, max_completion_length=6, crossentropy_weight=0.0, adam_epsilon=1e-5, **teacher
            ),
        ),
        # Each process finds the tokens of its own rows in the one folder.
        "teacher's file": ("distill", "sft", dict(teacher_file=answered)),
    }

    def command(name, processes):
        kind, rows, more = runs[name]
        more = dict(model_name_or_path=model_folder, **more)
        return words_of(kind, tmp_path / name / f"{processes}", data_files / f"{rows}.jsonl", processes, **more)

    (tmp_path / "commands.json").write_text(json.dumps([command(name, 2) for name in runs]))
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/two_cpu.yaml"]
    argv = [sys.executable, *launch, "--main_process_port", "0", "tests/invariants/commands.py"]
    done = subprocess.run(
        [*argv, str(tmp_path / "commands.json")], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (kind, *_) in runs.items():
        with subtests.test(name):
            assert main(command(name, 1)) == 0
            (one, want), (two, got) = (read_run(kind, tmp_path / name / number) for number in "12")
            agree(one, two)
            measured = [k for k in want if k.startswith("eval_") and "per_second" not in k and "runtime" not in k]
            assert "eval_loss" in measured
            for key in measured:
                close(got[key], want[key])
