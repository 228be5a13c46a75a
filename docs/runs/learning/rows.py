"""The data of the run: pairs, prompts, and a part of the training pairs that chooses between reward models."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset

VALIDATION_PROMPTS = 60
ASKED = "Answer in one sentence of at most 20 words."


def read(data: Path, part: str) -> list[dict[str, Any]]:
    """The rows of ``preferences_PART.jsonl.gz``."""
    with gzip.open(data / f"preferences_{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def question(row: dict[str, Any]) -> str:
    """What the user asks last."""
    return str(row["prompt"][-1]["content"])


def pairs(data: Path, part: str) -> Dataset:
    """Pairs for DPO and reward models; ``train`` and ``validation`` have no prompt in common."""
    if part == "eval":
        return Dataset.from_list(read(data, part))
    rows = read(data, "train")
    questions = sorted({question(row) for row in rows})
    held_out = set(random.Random(0).sample(questions, min(VALIDATION_PROMPTS, len(questions) // 5)))
    return Dataset.from_list([row for row in rows if (question(row) in held_out) == (part == "validation")])


def chosen_answers(data: Path) -> Dataset:
    """The chosen answers, to be imitated."""
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in read(data, "train")]
    return Dataset.from_list(rows)


def prompts(data: Path, part: str, longest: int = 1000) -> Dataset:
    """The different prompts of one turn, of at most ``longest`` characters."""
    rows = read(data, part)
    questions = {question(row) for row in rows if len(row["prompt"]) == 1 and len(question(row)) <= longest}
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in sorted(questions)])


def one_sentence_prompts(data: Path, part: str) -> Dataset:
    """Questions of 4 to 40 words that ask for one short sentence."""
    texts = [" ".join(question(row).split()) for row in prompts(data, part)]
    fitting = [text for text in texts if 4 <= len(text.split()) <= 40]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"{text} {ASKED}"}]} for text in fitting])
