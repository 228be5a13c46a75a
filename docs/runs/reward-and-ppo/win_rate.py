"""Held-out prompts answered by two models, and which answer the reward model prefers.

python win_rate.py BEFORE AFTER REWARD_MODEL PROMPTS OUTPUT

Each model gives one sampled answer to each prompt (temperature 1, as in training) and a greedy one.
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
TOKENS = 128
rows = [row["prompt"] for row in load_data(prompts)]
reward = ModelReward(reward_model)


def answers(model: str, temperature: float) -> tuple[list[dict], list[float]]:
    tokenizer = load_tokenizer(model)
    engine = LocalEngine(load_model(model, dtype="float32"), tokenizer)
    sampling = Sampling(temperature=temperature, max_tokens=TOKENS)
    groups = engine.generate([encode_prompt(tokenizer, prompt) for prompt in rows], 1, sampling, seed=0)
    texts = [tokenizer.decode(group[0].ids, skip_special_tokens=True) for group in groups]
    scores = reward(rows, [[{"role": "assistant", "content": text}] for text in texts])
    kept = [
        {"completion": text, "reward": round(score, 4), "tokens": len(group[0].ids), "end": group[0].finish_reason}
        for text, score, group in zip(texts, scores, groups, strict=True)
    ]
    return kept, scores


found, table = {}, {}
for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
    (old, old_scores), (new, new_scores) = (answers(model, temperature) for model in (before, after))
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(new_scores, old_scores, strict=True)]
    half = 1.96 * (statistics.pvariance(wins) / len(wins)) ** 0.5
    table[name] = {"prompts": len(wins), "win_rate": statistics.mean(wins), "plus_minus": half} | {
        f"{side}_{key}": statistics.mean(values)
        for side, kept in (("before", old), ("after", new))
        for key, values in (
            ("reward", [entry["reward"] for entry in kept]),
            ("tokens", [entry["tokens"] for entry in kept]),
            ("ended", [entry["end"] == "stop" for entry in kept]),
        )
    }
    found[name] = [
        {"prompt": prompt[-1]["content"], "before": a, "after": b} for prompt, a, b in zip(rows, old, new, strict=True)
    ]
picked = random.Random(0).sample(found["sampled"], 8)
text = json.dumps({"table": table, "samples": picked}, indent=1, ensure_ascii=False)
Path(output).write_text(text + "\n", encoding="utf-8")
print(json.dumps(table, indent=1))
