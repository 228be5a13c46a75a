"""Sharding on two CPU processes; accelerate itself shards over accelerators only."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from sharded_training import CASES, losses, make_trainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from world.families import tiny_family

from rlhf.models import Policy, add_scalar_head

HERE = Path(__file__).parent


needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.parametrize(
    ("sharding", "processes", "slow"),
    [
        ("fsdp2", 2, False),
        pytest.param("fsdp2", 2, True, marks=pytest.mark.slow),
        pytest.param("fsdp2", 4, True, marks=pytest.mark.slow),
        pytest.param("ddp", 2, None, marks=pytest.mark.slow),
        *(pytest.param(f"zero{stage}", 2, None, marks=[pytest.mark.slow, needs_deepspeed]) for stage in (1, 2, 3)),
    ],
)
def test_sharded_runs_are_those_of_one_process(sharding, processes, slow, tmp_path, tokenizer, subtests):
    """Losses and the saved weights; resumed by two processes, and by one. A frozen reference is sharded too.

    With FSDP2 also scores and gradients of single models (sharded.py, context_parallel.py), in the same processes.

    With DeepSpeed: `make zero`, half a minute for each stage.
    """
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for part in (add_scalar_head(tiny_model(seed=1)), tokenizer):
        part.save_pretrained(tmp_path / "critic")
    # Groups of processes are accelerate's under FSDP2 alone.
    names = [
        name for name, case in CASES.items() if case.processes == processes and (sharding == "fsdp2" or not case.groups)
    ]
    if slow is not None:
        names = [name for name in names if CASES[name].slow == slow]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launcher, HERE / "sharded_training.py", sharding, tmp_path, *names], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    for name in names:
        with subtests.test(name):
            trainer = make_trainer(name, tmp_path / f"{name}-one", tokenizer, 1, use_cpu=True, save_strategy="no")
            trainer.train()
            compare_runs(name, trainer, found[name], tmp_path)


def test_the_layers_that_are_sharded_occur_in_the_model():
    """accelerate refuses a class that it does not find: transformers lists SigLIP's text model for Gemma 3."""
    layers = Policy(tiny_family("gemma3"))._no_split_modules
    assert {"Gemma3DecoderLayer", "SiglipEncoderLayer"} <= layers and "SiglipTextEmbeddings" not in layers


def test_a_reference_without_its_adapter_freezes_nothing():
    """FSDP2 asks at its first forward pass what is trained, and that may be the reference's."""
    policy = Policy(get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"])))
    trained = [parameter.requires_grad for parameter in policy.parameters()]
    with policy.adapter_off():
        assert [parameter.requires_grad for parameter in policy.parameters()] == trained
    assert [parameter.requires_grad for parameter in policy.parameters()] == trained and any(trained)


def compare_runs(name, trainer, found, folder):
    """The losses and the saved weights of runs in two processes, against a run in one."""
    case = CASES[name]
    weights = dict(trainer.model.model.named_parameters())
    loader = AutoModelForSequenceClassification if case.trainer == "Reward" else AutoModelForCausalLM
    if case.lora:
        loader = AutoPeftModelForCausalLM
    for place, values in found.items():
        torch.testing.assert_close(values, losses(trainer), rtol=1e-6, atol=1e-6)
        saved = loader.from_pretrained(folder / f"{name}{place}")
        for key, weight in saved.named_parameters():
            torch.testing.assert_close(weight, weights[key], rtol=0, atol=1e-6, msg=f"{place} {key}")


@pytest.mark.slow
def test_scores_under_tensor_parallelism_are_those_of_the_whole():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, HERE / "tensor_parallel.py"], capture_output=True, text=True, timeout=200,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
