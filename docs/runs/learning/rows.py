"""The data of the run: pairs, prompts, and a part of the training pairs that nothing is trained on."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from settings import LONGEST, ROWS

VALIDATION_PROMPTS = 60
# By logistic regression: the log-odds that an answer is the better one, for 1,000 characters more (training pairs).
LENGTH_WEIGHT = 2.65
ASKED = "Answer in one sentence of at most 20 words."


def read(data: Path, part: str) -> list[dict[str, Any]]:
    """The rows of ``preferences_PART.jsonl.gz``."""
    with gzip.open(data / f"preferences_{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def question(row: dict[str, Any]) -> str:
    """What the user asks last."""
    return str(row["prompt"][-1]["content"])


def length_advantage(row: dict[str, Any]) -> float:
    """What the length alone says about a pair: the log-odds that the chosen answer is the better one."""
    return LENGTH_WEIGHT * (len(row["chosen"][-1]["content"]) - len(row["rejected"][-1]["content"])) / 1000


def beyond_length(rows: Dataset) -> Dataset:
    """Pairs for a reward model that learns what the length does not tell: the length counts in the margin already.

    The loss is then that of the reward plus the length: -log sigmoid(r_chosen - r_rejected - margin).
    """
    return rows.map(lambda row: {"margin": -length_advantage(row)})


def characters(row: dict[str, Any]) -> int:
    """The length of a prompt with its longest answer."""
    answers = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
    return sum(len(turn["content"]) for turn in row["prompt"]) + max(len(answer[-1]["content"]) for answer in answers)


def drawn(rows: Dataset, seed: int) -> Dataset:
    """The rows of a seed: on a CPU some of them, and none that would be cut."""
    if ROWS is None:
        return rows
    fitting = rows.filter(lambda row: characters(row) <= LONGEST)
    return fitting.shuffle(seed=seed).select(range(min(ROWS, len(fitting))))


def one_pair_a_prompt(data: Path) -> list[dict[str, Any]]:
    """One held-out pair of each prompt."""
    rows = read(data, "eval")
    random.Random(0).shuffle(rows)
    return list({question(row): row for row in rows}.values())


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
