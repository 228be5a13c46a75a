"""Samples as people read them: lines of ``completions.jsonl``, and a table on the console."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf.online.config import PPOConfig
from rlhf.online.samples import Sample
from rlhf.rewards import completion_text
from rlhf.visible import visible

COMPLETIONS = "completions.jsonl"  # in output_dir
MAX_PROMPT, MAX_COMPLETION = 300, 600  # characters of each in the table


def show_completions(samples: Sequence[Sample], args: PPOConfig, step: int) -> None:
    """Write and print the samples of a rollout, as far as the configuration asks for it.

    Args:
        samples: with rewards; may be empty.
        args: the configuration.
        step: optimizer steps so far.
    """
    if args.log_unique_prompts:
        # Reversed, so that the first sample of a group is the one that stays in the dictionary.
        first_of_group = {sample.group: sample for sample in reversed(samples)}
        samples = list(first_of_group.values())[::-1]
    if args.log_completions and samples:
        append_completions(Path(str(args.output_dir)) / COMPLETIONS, samples, step)
    if args.num_completions_to_print != 0 and samples:
        print_completions(samples[: args.num_completions_to_print], step)


def append_completions(file: Path, samples: Sequence[Sample], step: int) -> None:
    """Append one line of JSON for each sample.

    Args:
        file: made if it is not there, with its folder.
        samples: with rewards.
        step: optimizer steps so far.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        for sample in samples:
            lines.write(json.dumps(_entry(sample, step), ensure_ascii=False) + "\n")


def _entry(sample: Sample, step: int) -> dict[str, Any]:
    advantages = sample.tokens.get("advantages")
    return {
        "step": step,
        "prompt": sample.row.get("prompt"),
        "completion": sample.completion,
        "reward": _rounded(sample.reward),
        "rewards": {name: _rounded(value) for name, value in sample.reward_components.items()},
        **sample.extra,  # columns that reward functions logged
        "advantage": None if advantages is None else _rounded(float(advantages.mean())),
        "tokens": len(sample),
        "truncated": sample.truncated,
    }


def _rounded(value: float) -> float | None:
    # JSON has no NaN.
    return None if math.isnan(value) else round(value, 6)


def print_completions(samples: Sequence[Sample], step: int) -> None:
    """Print the beginning of each prompt and completion, with its reward, as a table.

    Args:
        samples: with rewards.
        step: optimizer steps so far.
    """
    table = Table("prompt", "completion", "reward", title=f"step {step}")
    for sample in samples:
        prompt: Any = sample.row.get("prompt", "")
        if not isinstance(prompt, str):  # of a conversation, the last message
            prompt = str(prompt[-1].get("content")) if prompt else ""
        completion = completion_text(sample.completion)
        shown_texts = visible(prompt[:MAX_PROMPT]), visible(completion[:MAX_COMPLETION])
        table.add_row(*shown_texts, f"{sample.reward:.3g}")
    Console().print(table, markup=False)
