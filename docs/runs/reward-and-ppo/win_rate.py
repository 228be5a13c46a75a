"""Held-out prompts answered by two models, and which answer the reward model prefers.

python win_rate.py BEFORE AFTER REWARD_MODEL PROMPTS OUTPUT

Each model gives four sampled answers to each prompt (temperature 1, as in training) and a greedy one.
"""

import json
import random
import statistics
import sys
from pathlib import Path

from rlhf.data import encode_prompt, load_data
from rlhf.models import load_model, load_tokenizer
from rlhf.rewards import ModelReward
from rlhf.rollouts import LocalEngine, Sampling

before, after, reward_model, prompts, output = sys.argv[1:]
TOKENS, SAMPLES = 128, 4
rows = [row["prompt"] for row in load_data(prompts)]
reward = ModelReward(reward_model)


def answers(model: str, temperature: float, count: int) -> list[dict]:
    """``count`` of each prompt, one prompt after another."""
    tokenizer = load_tokenizer(model)
    engine = LocalEngine(load_model(model, dtype="float32"), tokenizer)
    sampling = Sampling(temperature=temperature, max_tokens=TOKENS)
    groups = engine.generate([encode_prompt(tokenizer, prompt) for prompt in rows], count, sampling, seed=0)
    found = [answer for group in groups for answer in group]
    texts = [tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in found]
    asked = [prompt for prompt in rows for _ in range(count)]
    scores = reward(asked, [[{"role": "assistant", "content": text}] for text in texts])
    return [
        {"completion": text, "reward": score, "tokens": len(answer.ids), "end": answer.finish_reason}
        for text, score, answer in zip(texts, scores, found, strict=True)
    ]


def mean_and_half(values: list[float], count: int) -> tuple[float, float]:
    """The mean, and 1.96 standard errors over prompts, each the mean of its ``count`` values."""
    each = [statistics.mean(values[start : start + count]) for start in range(0, len(values), count)]
    return statistics.mean(each), 1.96 * statistics.stdev(each) / len(each) ** 0.5


found, table = {}, {}
for name, temperature, count in (("sampled", 1.0, SAMPLES), ("greedy", 0.0, 1)):
    old, new = (answers(model, temperature, count) for model in (before, after))
    pairs = list(zip(old, new, strict=True))
    wins = [(b["reward"] > a["reward"]) + 0.5 * (b["reward"] == a["reward"]) for a, b in pairs]
    table[name] = {"prompts": len(rows), "answers": count}
    table[name]["win_rate"], table[name]["win_rate_plus_minus"] = mean_and_half(wins, count)
    gains = [b["reward"] - a["reward"] for a, b in pairs]
    table[name]["reward_gain"], table[name]["reward_gain_plus_minus"] = mean_and_half(gains, count)
    for side, kept in (("before", old), ("after", new)):
        table[name][f"{side}_reward"] = statistics.mean(entry["reward"] for entry in kept)
        table[name][f"{side}_tokens"] = statistics.mean(entry["tokens"] for entry in kept)
        table[name][f"{side}_ended"] = statistics.mean(entry["end"] == "stop" for entry in kept)
    # Is it length alone? Among pairs of the same length.
    same = [win for win, (a, b) in zip(wins, pairs, strict=True) if a["tokens"] == b["tokens"]]
    table[name]["same_length_pairs"], table[name]["same_length_win_rate"] = len(same), statistics.mean(same)
    found[name] = [
        {"prompt": prompt[-1]["content"], "before": a, "after": b}
        for prompt, (a, b) in zip(rows, pairs[::count], strict=True)
    ]
picked = random.Random(0).sample(found["sampled"], 8)
text = json.dumps({"table": table, "samples": picked}, indent=1, ensure_ascii=False)
Path(output).write_text(text + "\n", encoding="utf-8")
print(json.dumps(table, indent=1))
