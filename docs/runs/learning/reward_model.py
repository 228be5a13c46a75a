"""A reward model of the pairs, and its rewards for validation and held-out pairs.

python reward_model.py NAME MODEL DATA OUT SCALE
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from clock import Budget, wait_for
from rows import pairs
from settings import COMMON, REWARD, REWARD_COMMON, SECONDS
from transformers import AutoTokenizer

import rlhf

name, model, data, out, scale = *sys.argv[1:3], Path(sys.argv[3]), Path(sys.argv[4]), float(sys.argv[5])
folder = out / "models" / f"reward-{name}"
options = COMMON | REWARD_COMMON | REWARD[name]
parts = {part: pairs(data, part) for part in ("train", "validation", "eval")}
trainer = rlhf.RewardTrainer(
    model,
    rlhf.RewardConfig(str(out / "runs" / f"reward-{name}"), bf16=torch.cuda.is_available(), **options),
    train_dataset=parts["train"],
    eval_dataset={part: parts[part] for part in ("validation", "eval")},
    processing_class=AutoTokenizer.from_pretrained(model),
)
budget = Budget(SECONDS["reward"] * scale)
(out / "gates" / f"ready-reward-{name}").touch()
wait_for(out / "gates" / "go-reward")
lines = budget.train(trainer)
results = {"seconds": budget.elapsed, "steps": trainer.state.global_step, "lines": lines, "options": options}
trainer.save_model(str(folder))
(folder / "whole").touch()  # others wait for this file
for part in ("validation", "eval"):
    rewards = trainer.predict(parts[part]).predictions
    results[part] = np.stack([rewards["rewards/chosen"], rewards["rewards/rejected"]], 1).tolist()
(out / f"reward-{name}.json").write_text(json.dumps(results, default=str), encoding="utf-8")
accuracy = np.mean(np.diff(np.asarray(results["eval"]), axis=1) < 0)
print(
    f"reward model {name}: {results['steps']} steps, accuracy {accuracy:.4f} of {len(results['eval'])} held-out pairs"
)
