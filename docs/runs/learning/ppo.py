"""PPO from the fine-tuned model of seed 0 against the reward model, whose copy is the critic's start.

python ppo.py SFT_MODEL OUT DATA SCALE
"""

import json
import sys
from pathlib import Path

from answers import answer
from clock import Budget, wait_for
from rows import one_sentence_prompts
from settings import COMMON, PPO, SECONDS

import rlhf

start, out, data, scale = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
judge = out / "models" / "reward-tuned"
folder = out / "models" / "ppo"
questions = one_sentence_prompts(data, "train")
(out / "gates" / "ready-ppo").touch()
wait_for(out / "gates" / "go-ppo")
options = COMMON | PPO | {"value_model": str(judge), "drop_long_prompts": True}
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
held_out = one_sentence_prompts(data, "eval")
for part, model in (("after", str(folder)), ("before", start)):
    results[part] = answer(model, held_out, tokens=PPO["max_completion_length"])
    (out / "ppo.json").write_text(json.dumps(results, default=str), encoding="utf-8")
