"""Curves of the run, from curves.json: ``python plot.py`` writes ``curves.png``."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
COLOURS = {"ours": "#d1495b", "trl": "#4f6d7a"}
LABELS = {"ours": "this package", "trl": "TRL 1.16"}
curves = json.loads((HERE / "curves.json").read_text(encoding="utf-8"))


def smoothed(values: list[float]) -> list[float]:
    """The mean of each value with the four before it."""
    return [sum(values[max(0, i - 4) : i + 1]) / len(values[max(0, i - 4) : i + 1]) for i in range(len(values))]


def draw_sides(axis: Axes, stage: str, name: str, title: str) -> None:
    """A line for each side and seed, against seconds."""
    for key, lines in curves.items():
        kind, *rest = key.split("-")
        if kind == stage and lines.get(name):
            seconds, _, values = zip(*lines[name], strict=True)
            label = LABELS[rest[0]] if rest[1] == "0" else None
            axis.plot(seconds, smoothed(list(values)), color=COLOURS[rest[0]], marker=".", linewidth=1.2, label=label)
    axis.set(title=title, xlabel="seconds of training")


def draw_ppo(axis: Axes, name: str, title: str) -> None:
    """A figure of PPO, against optimizer steps."""
    if points := curves.get("ppo", {}).get(name):
        _, steps, values = zip(*points, strict=True)
        axis.plot(steps, values, color=COLOURS["ours"], marker=".", linewidth=1.2)
    axis.set(title=title, xlabel="optimizer step")


has_ppo = bool(curves.get("ppo", {}).get("reward"))
figure, axes = plt.subplots(1 + has_ppo, 3, figsize=(13, 3.4 * (1 + has_ppo)), layout="constrained", squeeze=False)
draw_sides(axes[0, 0], "sft", "loss", "SFT: loss, mean of 5 steps")
draw_sides(axes[0, 1], "dpo", "loss", "DPO: loss, mean of 5 steps")
draw_sides(axes[0, 2], "grpo", "reward", "GRPO: share of fitting answers, mean of 5 steps")
if has_ppo:
    draw_ppo(axes[1, 0], "rewards/reward-tuned/mean", "PPO: reward, in standard deviations of the start")
    draw_ppo(axes[1, 1], "critic/explained_variance", "PPO: variance the critic explains")
    draw_ppo(axes[1, 2], "completions/mean_length", "PPO: tokens an answer")
for axis in axes.flat:
    axis.spines[["top", "right"]].set_visible(False)
axes[0, 0].legend(frameon=False)
figure.savefig(HERE / "curves.png", dpi=110)
