"""Curves of the runs in this folder, from the trainers' own logs: ``python plot.py`` writes ``curves.png``."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PANELS = [
    ("reward", "accuracy", "reward model: accuracy", "pairs"),
    ("reward", "loss", "reward model: loss", "pairs"),
    ("ppo", "reward", "PPO: reward", "rollouts of 64"),
    ("ppo", "kl", "PPO: KL to the start, nats an answer", "rollouts of 64"),
    ("ppo", "completions/mean_length", "PPO: tokens of an answer", "rollouts of 64"),
]

figure, axes = plt.subplots(1, len(PANELS), figsize=(17, 3.2), layout="constrained")
for axis, (run, metric, title, unit) in zip(axes, PANELS, strict=True):
    log = json.loads((HERE / f"{run}_state.json").read_text())["log_history"]
    scale = 8 if run == "reward" else 1 / 4
    for name, style in ((metric, dict(linewidth=1, alpha=0.7)), (f"eval_{metric}", dict(marker="o", linewidth=2))):
        points = [(entry["step"] * scale, entry[name]) for entry in log if name in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label="held out" if "eval" in name else "training", **style)
    axis.set(title=title, xlabel=unit)
    axis.spines[["top", "right"]].set_visible(False)
axes[2].legend(frameon=False)
figure.savefig(HERE / "curves.png", dpi=110)
