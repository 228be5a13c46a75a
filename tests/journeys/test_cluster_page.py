"""docs/journeys/cluster.md, word for word: two processes, killed by SIGTERM, resumed, read by a script."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/journeys/cluster.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)
CHANGED = {"max_steps: 200": "max_steps: 120", "2.0e-5": "3.0e-3"}  # for a model of a million parameters


@pytest.fixture
def folder(tmp_path):
    """What the reader of the page has: a model, rows, and `rlhf` on the path."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "data").mkdir()
    for part in ("train", "eval"):
        shutil.copy(ROOT / f"demo/data/sft_{part}.jsonl", tmp_path / f"data/{part}.jsonl")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ROOT / "demo/model")).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(ROOT / "demo/model").save_pretrained(tmp_path / "base")
    command = tmp_path / "bin/rlhf"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m rlhf "$@"\n')
    command.chmod(0o755)
    return tmp_path


def run(folder, *words):
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_page(folder):
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    outputs = []
    for kind, title, block in BLOCK.findall(PAGE.read_text()):
        if kind == "yaml":
            text = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "base")
            for before, after in CHANGED.items():
                assert before in text
                text = text.replace(before, after)
            (folder / title).write_text(text)
        elif kind == "python":
            (folder / title).write_text(block)
            outputs.append(run(folder, sys.executable, title))
        elif kind == "sh":
            outputs.append(run(folder, "bash", "-e", "-c", block))
    stopped, went_on, complete, read = outputs
    assert stopped.strip() == "status 143"
    assert re.search(r"stopped at step \d+ of 120; go on with --resume", (folder / "first.log").read_text())
    assert "runs/sft" in went_on and complete.splitlines()[-1] == "runs/sft: already complete at step 120"
    assert read.startswith("finished · 2 processes\nwent on 1 times\ndata/train.jsonl 858 rows")

    # The trackers have both parts.
    assert len(list((folder / "runs/sft/runs").rglob("events.*"))) == 2
    assert len(list((folder / "runs/sft/wandb").glob("offline-run-*"))) == 2

    # A run that was never stopped has the same log and weights.
    words = ("--output_dir", "runs/whole", "--report_to", "none")
    run(folder, "rlhf", "sft", "--config", "sft.yaml", *words)
    whole, resumed = (metrics_of(folder / f"runs/{name}/metrics.jsonl") for name in ("whole", "sft"))
    assert whole == resumed
    weights = [load_file(folder / f"runs/{name}/model.safetensors") for name in ("whole", "sft")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def metrics_of(file):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and "runtime" not in k} for line in lines]
