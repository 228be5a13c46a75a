"""One side and one seed: SFT, DPO on the result, and GRPO, each when it is this side's turn.

python side.py ours|trl SEED MODEL DATA OUT SCALE
"""

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from clock import Budget, wait_for
from learnt import add_findings, folder_of, write
from reward_one_sentence import one_short_sentence
from rows import chosen_answers, drawn, one_sentence_prompts, pairs
from settings import COMMON, DPO, GRPO, ON_GPU, SECONDS, SFT, SIDES, STAGES, TRL
from transformers import AutoModelForCausalLM, AutoTokenizer

side, seed, model, data, out, scale = sys.argv[1], int(sys.argv[2]), *sys.argv[3:5], Path(sys.argv[5]), sys.argv[6]
name = f"{side}-{seed}"
if not ON_GPU:
    # A core for each side; seeds take turns, in case the cores differ.
    os.sched_setaffinity(0, {(SIDES.index(side) + seed) % (os.cpu_count() or 1)})
package: Any = importlib.import_module("rlhf" if side == "ours" else "trl")
tokenizer = AutoTokenizer.from_pretrained(model)
results: dict[str, Any] = {"side": side, "seed": seed}


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make(stage: str) -> Any:
    """The trainer of a stage, ready to train."""
    options = COMMON | {"sft": SFT, "dpo": DPO, "grpo": GRPO}[stage] | {"seed": seed}
    options |= {"output_dir": str(out / "runs" / f"{name}-{stage}")}
    if side == "trl":
        options |= TRL
        if stage == "grpo":
            options |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    elif stage == "grpo":
        options |= {"max_length": 512, "log_completions": False}
    start = folder_of(out, side, seed, "sft") if stage == "dpo" else model
    arguments: dict[str, Any] = {"model": load(start), "processing_class": tokenizer}
    if stage == "sft":
        arguments["train_dataset"] = drawn(chosen_answers(Path(data)), seed)
    elif stage == "dpo":
        # Given, because TRL would load the reference from the place where the model's config comes from.
        arguments |= {"train_dataset": drawn(pairs(Path(data), "train"), seed), "ref_model": load(start)}
    else:
        arguments |= {"train_dataset": one_sentence_prompts(Path(data), "train"), "reward_funcs": one_short_sentence}
    kind = stage.upper()
    return getattr(package, f"{kind}Trainer")(args=getattr(package, f"{kind}Config")(**options), **arguments)


def train(stage: str) -> None:
    """Wait for this side's turn, train, save, and write the curve."""
    trainer = make(stage)
    budget = Budget(SECONDS[stage] * float(scale))
    (out / "gates" / f"ready-{stage}-{name}").touch()
    wait_for(out / "gates" / f"go-{stage}-{side}")
    lines = budget.train(trainer)
    results[stage] = {"seconds": budget.elapsed, "wall_seconds": budget.wall_seconds, "lines": lines}
    results[stage]["steps"] = trainer.state.global_step
    if torch.cuda.is_available():
        results[stage]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    trainer.save_model(folder_of(out, side, seed, stage))
    write(out, results)


for stage in STAGES:
    try:
        train(stage)
    except Exception:  # the other stages are worth having
        traceback.print_exc()
        results[stage] = {"failed": traceback.format_exc()[-2000:]}
        write(out, results)
    (out / "gates" / f"done-{stage}-{name}").touch()
if ON_GPU:
    wait_for(out / "gates" / "go-answers")
    add_findings(side, seed, Path(data), out)
