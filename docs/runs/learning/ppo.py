"""PPO from the fine-tuned model of seed 0 against the reward model, whose copy is the critic's start.

python ppo.py SFT_MODEL OUT DATA SCALE
"""

import json
import sys
from pathlib import Path

import torch
from answers import answer
from clock import Budget, wait_for
from rows import prompts
from settings import COMMON, PPO, REWARD, SECONDS

import rlhf

start, out, data, scale = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
judge = out / "models" / f"reward-{next(iter(REWARD))}"
folder = out / "models" / "ppo"
questions = prompts(data, "train")
(out / "gates" / "ready-ppo").touch()
wait_for(out / "gates" / "go-ppo")
options = COMMON | PPO | {"value_model": str(judge), "bf16": torch.cuda.is_available(), "drop_long_prompts": True}
trainer = rlhf.PPOTrainer(
    start,
    str(judge),
    rlhf.PPOConfig(str(out / "runs" / "ppo"), log_completions=False, **options),
    train_dataset=questions,
)
budget = Budget(SECONDS["ppo"] * scale)
lines = budget.train(trainer)
trainer.save_model(str(folder))
results = {"seconds": budget.elapsed, "steps": trainer.state.global_step, "lines": lines, "options": options}
(out / "ppo.json").write_text(json.dumps(results, default=str), encoding="utf-8")
judges = sorted((out / "models").glob("reward-*"))
held_out = prompts(data, "eval")
results["after"] = answer(str(folder), held_out, judges, tokens=PPO["max_completion_length"])
(out / "ppo.json").write_text(json.dumps(results, default=str), encoding="utf-8")
results["before"] = answer(start, held_out, judges, tokens=PPO["max_completion_length"])
(out / "ppo.json").write_text(json.dumps(results, default=str), encoding="utf-8")
