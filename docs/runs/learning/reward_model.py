"""The reward model of frozen_reward.py, fine-tuned, and its rewards for the held-out pairs.

python reward_model.py DATA OUT SCALE
"""

import json
import sys
from pathlib import Path

import numpy as np
from clock import Budget, wait_for
from rows import beyond_length, pairs
from settings import COMMON, REWARD, SECONDS
from transformers import AutoTokenizer

import rlhf

data, out, scale = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
start, folder = (out / "models" / f"reward-{name}" for name in ("frozen", "tuned"))
options = COMMON | REWARD
parts = {part: beyond_length(pairs(data, part)) for part in ("train", "eval")}
trainer = rlhf.RewardTrainer(
    str(start),
    rlhf.RewardConfig(str(out / "runs" / "reward"), **options),
    train_dataset=parts["train"],
    eval_dataset=parts["eval"],
    processing_class=AutoTokenizer.from_pretrained(start),
)
budget = Budget(SECONDS["reward"] * scale)
(out / "gates" / "ready-reward").touch()
wait_for(out / "gates" / "go-reward")
lines = budget.train(trainer)
results = {"seconds": budget.elapsed, "steps": trainer.state.global_step, "lines": lines, "options": options}
trainer.save_model(str(folder))
(folder / "whole").touch()  # others wait for this file
rewards = trainer.predict(parts["eval"]).predictions
results["eval"] = np.stack([rewards["rewards/chosen"], rewards["rewards/rejected"]], 1).tolist()
(out / "reward-tuned.json").write_text(json.dumps(results, default=str), encoding="utf-8")
accuracy = np.mean(np.diff(np.asarray(results["eval"]), axis=1) < 0)
print(f"{results['steps']} steps, accuracy {accuracy:.4f} of {len(results['eval'])} held-out pairs")
