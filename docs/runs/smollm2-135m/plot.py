"""Curves of the run in this folder, from the trainers' own logs: ``python plot.py`` writes ``curves.png``."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def series(stage: str, name: str) -> tuple[list[int], list[float]]:
    log = json.loads((HERE / f"{stage}_state.json").read_text())["log_history"]
    points = [(entry["step"], entry[name]) for entry in log if name in entry]
    return [step for step, _ in points], [value for _, value in points]


PANELS = [
    ("sft", "perplexity", "SFT: perplexity of the answers"),
    ("dpo", "rewards/accuracies", "DPO: preference accuracy"),
    ("dpo", "rewards/margins", "DPO: reward margin"),
]
figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.4), layout="constrained")
for axis, (stage, name, title) in zip(axes, PANELS, strict=True):
    axis.plot(*series(stage, name), color="#9aa5b1", linewidth=1, marker=".", label="training steps")
    axis.plot(*series(stage, f"eval_{name}"), color="#d1495b", linewidth=2, marker="o", label="held-out rows")
    axis.set(title=title, xlabel="optimizer step")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].legend(frameon=False)
figure.savefig(HERE / "curves.png", dpi=110)
