"""What a model has learnt: held-out perplexity and preference accuracy, and answers with their rewards."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from settings import ANSWER_TOKENS, SAMPLES

from rlhf.cli.main import main
from rlhf.data import encode_prompt
from rlhf.models import load_model, load_tokenizer
from rlhf.rewards import ModelReward
from rlhf.rollouts import LocalEngine, Sampling


def evaluate(model: str, reference: str | None, rows: str, out: Path, name: str) -> dict[str, Any]:
    """What ``rlhf eval`` finds.

    Args:
        model: a folder.
        reference: of the preference metrics; without one there are none.
        rows: a file of pairs.
        out: a folder for its output.
        name: of that output.
    Returns:
        Figures by name.
    """
    file = out / f"eval-{name}.json"
    command = ["eval", "--model_name_or_path", model, "--dataset_name", rows]
    command += ["--ref_model_name_or_path", reference] if reference else []
    command += ["--dtype", "bfloat16", "--batch_size", "8", "--max_length", "1024"]
    main([*command, "--output_file", str(file), "--overwrite"])
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return found


def answer(model: str, rows: Dataset, tokens: int = ANSWER_TOKENS, samples: int = SAMPLES) -> list[dict[str, Any]]:
    """A greedy and some sampled answers to each prompt.

    Args:
        model: a folder.
        rows: prompts.
        tokens: the longest answer.
        samples: sampled answers to each prompt.
    Returns:
        An entry for each answer.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(model)
    policy = load_model(model, dtype="float32").to(device)
    # As in training. With weights in bfloat16 some of these models would take the slow path of `model.generate`.
    engine = LocalEngine(policy, tokenizer, autocast=torch.bfloat16)
    ids = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    found = []
    for kind, temperature, count in (("greedy", 0.0, 1), ("sampled", 1.0, samples)):
        groups = engine.generate(ids, count, Sampling(temperature=temperature, max_tokens=tokens), seed=0)
        for number, group in enumerate(groups):
            for completion in group:
                text = tokenizer.decode(completion.ids, skip_special_tokens=True)
                entry = {"prompt": number, "kind": kind, "text": text, "tokens": len(completion.ids)}
                found.append(entry | {"ended": completion.finish_reason == "stop"})
    return found


def add_rewards(answers: list[dict[str, Any]], rows: Dataset, judges: Sequence[Path]) -> None:
    """Add the reward of each judge to each answer.

    Args:
        answers: of :func:`answer`.
        rows: the same prompts.
        judges: folders of reward models.
    """
    asked = [rows[entry["prompt"]]["prompt"] for entry in answers]
    replies = [[{"role": "assistant", "content": entry["text"]}] for entry in answers]
    for folder in judges:
        judge = ModelReward(str(folder), batch_size=16)
        for entry, reward in zip(answers, judge(asked, replies), strict=True):
            entry[folder.name] = reward
