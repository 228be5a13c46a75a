"""One side and one seed: SFT, DPO on the result, and GRPO, each when it is this side's turn; then what was learnt.

python side.py ours|trl SEED MODEL DATA OUT SCALE
"""

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from answers import answer, evaluate
from clock import Budget, wait_for
from reward_one_sentence import one_short_sentence
from rows import chosen_answers, one_sentence_prompts, pairs, prompts
from settings import COMMON, DPO, GRPO, SECONDS, SFT, STAGES, TRL
from transformers import AutoModelForCausalLM, AutoTokenizer

side, seed, model, data, out, scale = sys.argv[1], int(sys.argv[2]), *sys.argv[3:5], Path(sys.argv[5]), sys.argv[6]
name = f"{side}-{seed}"
package: Any = importlib.import_module("rlhf" if side == "ours" else "trl")
tokenizer = AutoTokenizer.from_pretrained(model)
folders = {"base": model} | {stage: str(out / "models" / f"{name}-{stage}") for stage in STAGES}
results: dict[str, Any] = {"side": side, "seed": seed}


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make(stage: str) -> Any:
    """The trainer of a stage, ready to train."""
    options = COMMON | {"sft": SFT, "dpo": DPO, "grpo": GRPO}[stage] | {"seed": seed}
    options |= {"output_dir": str(out / "runs" / f"{name}-{stage}"), "bf16": torch.cuda.is_available()}
    if side == "trl":
        options |= TRL
        if stage == "grpo":
            options |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    elif stage == "grpo":
        options |= {"max_length": 512, "log_completions": False}
    start = folders["sft"] if stage == "dpo" else model
    arguments: dict[str, Any] = {"model": load(start), "processing_class": tokenizer}
    if stage == "sft":
        arguments["train_dataset"] = chosen_answers(Path(data))
    elif stage == "dpo":
        # Given, because TRL would load the reference from the place where the model's config comes from.
        arguments |= {"train_dataset": pairs(Path(data), "train"), "ref_model": load(start)}
    else:
        arguments |= {"train_dataset": one_sentence_prompts(Path(data), "train"), "reward_funcs": one_short_sentence}
    kind = stage.upper()
    return getattr(package, f"{kind}Trainer")(args=getattr(package, f"{kind}Config")(**options), **arguments)


def write() -> None:
    (out / f"side-{name}.json").write_text(json.dumps(results), encoding="utf-8")


def train(stage: str) -> None:
    """Wait for this side's turn, train, save, and write the curve."""
    trainer = make(stage)
    budget = Budget(SECONDS[stage] * float(scale))
    (out / "gates" / f"ready-{stage}-{name}").touch()
    wait_for(out / "gates" / f"go-{stage}-{side}")
    lines = budget.train(trainer)
    results[stage] = {"seconds": budget.elapsed, "steps": trainer.state.global_step, "lines": lines}
    if torch.cuda.is_available():
        results[stage]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    trainer.save_model(folders[stage])
    write()


for stage in STAGES:
    try:
        train(stage)
    except Exception:  # the other stages are worth having
        traceback.print_exc()
        results[stage] = {"failed": traceback.format_exc()[-2000:]}
    (out / "gates" / f"done-{stage}-{name}").touch()
wait_for(out / "gates" / "go-answers")
held_out = str(Path(data) / "preferences_eval.jsonl.gz")
references = {"sft": "base", "dpo": "sft"}
judges = sorted((out / "models").glob("reward-*"))
for stage in ("sft", "dpo"):
    try:
        results[f"{stage}_held_out"] = evaluate(folders[stage], folders[references[stage]], held_out, out, name)
        results[f"{stage}_answers"] = answer(folders[stage], prompts(Path(data), "eval"), judges)
        write()
    except Exception:
        traceback.print_exc()
try:
    answers = answer(folders["grpo"], one_sentence_prompts(Path(data), "eval"), [], tokens=48)
    for entry in answers:
        entry["fits"] = one_short_sentence([entry["text"]])[0]
    results["grpo_answers"] = answers
except Exception:
    traceback.print_exc()
write()
(out / "gates" / f"done-answers-{name}").touch()
