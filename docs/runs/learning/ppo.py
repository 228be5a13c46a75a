"""PPO from the fine-tuned model of seed 0 against the reward model, whose layers are the critic's start.

python ppo.py SFT_MODEL OUT DATA SCALE
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from answers import answer
from clock import Budget, wait_for
from rows import one_sentence_prompts
from settings import (
    COMMON,
    LENGTH_PENALTY,
    MEAN_TOKENS,
    PPO,
    PPO_SAMPLES,
    REWARD_MEAN,
    REWARD_STD,
    ROWS,
    SECONDS,
)

import rlhf
from rlhf.rewards import ModelReward


def length_penalty(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """What the reward model gives for length, with the other sign; 0 for an answer of the mean length at the start."""
    return [LENGTH_PENALTY * (MEAN_TOKENS - len(ids)) for ids in completion_ids]


start, out, data, scale = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
judge = out / "models" / "reward-tuned"
folder = out / "models" / "ppo"
questions = one_sentence_prompts(data, "train").shuffle(seed=0)
if ROWS is not None:
    questions = questions.select(range(min(ROWS, len(questions))))
(out / "gates" / "ready-ppo").touch()
wait_for(out / "gates" / "go-ppo")
options = COMMON | PPO | {"value_model": str(judge), "drop_long_prompts": True}
trainer = rlhf.PPOTrainer(
    start,
    [ModelReward(str(judge), mean=REWARD_MEAN, std=REWARD_STD), length_penalty],
    rlhf.PPOConfig(str(out / "runs" / "ppo"), log_completions=False, **options),
    train_dataset=questions,
)
budget = Budget(SECONDS["ppo"] * scale, decays=False)
lines = budget.train(trainer)
trainer.save_model(str(folder))
results = {"seconds": budget.elapsed, "steps": trainer.state.global_step, "lines": lines, "options": options}
(out / "ppo.json").write_text(json.dumps(results, default=str), encoding="utf-8")
held_out = one_sentence_prompts(data, "eval")
for part, model in (("after", str(folder)), ("before", start)):
    results[part] = answer(model, held_out, tokens=PPO["max_completion_length"], samples=PPO_SAMPLES)
    (out / "ppo.json").write_text(json.dumps(results, default=str), encoding="utf-8")
