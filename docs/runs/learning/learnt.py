"""What the models of one side and seed have learnt: python learnt.py ours|trl SEED DATA OUT."""

import json
import sys
from pathlib import Path
from typing import Any

from answers import answer, evaluate
from reward_one_sentence import one_short_sentence
from rows import one_sentence_prompts, prompts
from settings import STAGES


def folder_of(out: Path, side: str, seed: int, stage: str) -> str:
    """Where a stage leaves its model."""
    return str(out / "models" / f"{side}-{seed}-{stage}")


def write(out: Path, results: dict[str, Any]) -> None:
    """Write the results of a side and seed; what is there is replaced."""
    (out / f"side-{results['side']}-{results['seed']}.json").write_text(json.dumps(results), encoding="utf-8")


def add_findings(side: str, seed: int, data: Path, out: Path) -> None:
    """Add perplexity, preference accuracy and answers to the results of training.

    Args:
        side: ours or trl.
        seed: of the run.
        data: folder of the preferences.
        out: folder of the run.
    """
    results: dict[str, Any] = json.loads((out / f"side-{side}-{seed}.json").read_text(encoding="utf-8"))
    trained = {stage: folder_of(out, side, seed, stage) for stage in STAGES if "steps" in results[stage]}
    for stage, reference in (("sft", None), ("dpo", trained.get("sft"))):
        if stage in trained:
            pairs = str(out / "held_out.jsonl")
            results[f"{stage}_held_out"] = evaluate(trained[stage], reference, pairs, out, f"{side}-{seed}")
            write(out, results)
    if "grpo" in trained:
        results["grpo_answers"] = answer(trained["grpo"], one_sentence_prompts(data, "eval"), tokens=48)
        for entry in results["grpo_answers"]:
            entry["fits"] = one_short_sentence([entry["text"]])[0]
        write(out, results)
    for stage in ("sft", "dpo"):
        if stage in trained:
            results[f"{stage}_answers"] = answer(trained[stage], prompts(data, "eval"))
            write(out, results)


if __name__ == "__main__":
    add_findings(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
