"""Curves of the runs in this folder, from the trainers' own logs: ``python plot.py`` writes ``curves.png``."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PANELS = [
    ("reward", "share of answers that fit"),
    ("kl", "KL to the start, nats an answer"),
    ("entropy", "entropy, nats a token"),
    ("completions/mean_length", "tokens of an answer"),
]
COLOURS = {"grpo": "#2e6f95", "ppo": "#d1495b"}


def series(log: list[dict], name: str) -> tuple[list[float], list[float]]:
    """Against completions sampled so far: the two commands make different numbers of steps of them."""
    points = [(entry["epoch"], entry[name]) for entry in log if name in entry]
    return [epoch for epoch, _ in points], [value for _, value in points]


figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 3.2), layout="constrained")
for name, colour in COLOURS.items():
    file = HERE / f"{name}_state.json"
    if not file.exists():
        continue
    log = json.loads(file.read_text())["log_history"]
    for axis, (metric, title) in zip(axes, PANELS, strict=True):
        axis.plot(*series(log, metric), color=colour, linewidth=1, alpha=0.7, label=f"{name}, training")
        axis.plot(*series(log, f"eval_{metric}"), "o-", color=colour, linewidth=2, label=f"{name}, held out")
        axis.set(title=title, xlabel="passes over the prompts")
        axis.spines[["top", "right"]].set_visible(False)
axes[0].legend(frameon=False)
figure.savefig(HERE / "curves.png", dpi=110)
