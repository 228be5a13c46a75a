"""Curves of the runs in this folder, from the trainers' own logs: ``python plot.py`` writes ``curves.png``."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLOURS = {"hard": "#9aa5b1", "live": "#d1495b", "cached": "#30638e", "gkd": "#d1495b"}
LABELS = {"hard": "hard labels", "live": "teacher in memory", "cached": "teacher on disk", "gkd": "own answers"}


def series(run: str, name: str) -> tuple[list[int], list[float]]:
    log = json.loads((HERE / f"{run}_state.json").read_text())["log_history"]
    points = [(entry["step"], entry[name]) for entry in log if name in entry]
    return [step for step, _ in points], [value for _, value in points]


PANELS = [
    ("perplexity", "perplexity, training rows", ("hard", "live", "cached")),
    ("eval_perplexity", "perplexity, 48 held-out rows", ("hard", "live", "cached")),
    ("loss", "KL(teacher, student), training rows", ("live", "cached")),
    ("loss", "KL(student, teacher), own answers", ("gkd",)),
]
figure, axes = plt.subplots(1, len(PANELS), figsize=(16, 3.6), layout="constrained")
for axis, (metric, title, runs) in zip(axes, PANELS, strict=True):
    for run in runs:
        style = "--" if run == "cached" else "-"
        axis.plot(*series(run, metric), style, color=COLOURS[run], label=LABELS[run], linewidth=1.6)
    axis.set(title=title, xlabel="optimizer step")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    if "perplexity" in metric:
        axis.set_yscale("log")
figure.savefig(HERE / "curves.png", dpi=110)
