"""Sharding on two CPU processes; accelerate itself shards over accelerators only."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharded_training import IN_SHARDS, KINDS, losses, make_trainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

HERE = Path(__file__).parent


needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.parametrize(
    "sharding",
    ["fsdp2", *(pytest.param(name, marks=[pytest.mark.slow, needs_deepspeed]) for name in ("zero2", "zero3"))],
)
def test_sharded_runs_are_those_of_one_process(sharding, tmp_path, tokenizer):
    """Losses and the saved weights; resumed by two processes, and by one. A frozen reference is sharded too.

    With FSDP2 also scores and gradients of single models (sharded.py) and the first loss of DPO in bf16, in the same
    processes.

    With DeepSpeed: `DS_BUILD_OPS=0 pip install deepspeed`, then `pytest -m slow` on this file, two minutes each.
    """
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, HERE / "sharded_training.py", sharding, tmp_path, *KINDS], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    if sharding == "fsdp2":
        shards = {kind for kind in KINDS if (tmp_path / kind / "checkpoint-2/pytorch_model_fsdp_0").is_dir()}
        assert shards == set(IN_SHARDS)
    assert found["dpo"].pop("half", [math.log(2)]) == pytest.approx([math.log(2)], abs=1e-7)
    for kind in KINDS:
        trainer = make_trainer(kind, tmp_path / f"{kind}-one", tokenizer, 4, use_cpu=True, save_strategy="no")
        trainer.train()
        weights = dict(trainer.model.model.named_parameters())
        loader = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
        for name, folder in {"whole": kind, "resumed": f"{kind}-resumed", "alone": f"{kind}-alone"}.items():
            if name not in found[kind]:
                continue
            torch.testing.assert_close(found[kind][name], losses(trainer), rtol=1e-6, atol=1e-6)
            saved = loader.from_pretrained(tmp_path / folder)
            for key, weight in saved.named_parameters():
                torch.testing.assert_close(weight, weights[key], rtol=0, atol=1e-6, msg=f"{kind} {name} {key}")
