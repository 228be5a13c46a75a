"""Figures, table and picture of the runs: ``python plot.py`` reads their metrics, and writes here.

``results.json`` keeps what the table and the picture need, so that they can be made again without the runs.
"""

import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RUNS = Path("runs/asynchronous")
KEPT = (
    "seconds", "reward", "rollout/staleness/mean", "rollout/staleness/max", "rollout/dropped",
    "rollout/waiting_seconds", "sampler_kl", "tokens_per_second/rollout", "tokens_per_second/training",
)  # fmt: skip
COLOURS = {0: "#2e6f95", 1: "#d1495b", 2: "#edae49"}
NAMES = {0: "synchronous", 1: "--max_staleness 1", 2: "--max_staleness 2"}
LAST = 10  # steps at the end, whose reward the table shows
WINDOW = 5  # steps of a moving mean


def read_run(folder: Path) -> list[dict]:
    """The figures of each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: line[name] for name in KEPT if name in line} for line in lines if "loss" in line]


def read_all() -> dict[str, list[dict]]:
    runs = {folder.name: read_run(folder) for folder in sorted(RUNS.glob("ahead*-seed*"))}
    if runs:
        (HERE / "results.json").write_text(json.dumps(runs) + "\n", encoding="utf-8")
    return json.loads((HERE / "results.json").read_text(encoding="utf-8"))


def of_staleness(runs: dict[str, list[dict]], staleness: int) -> list[list[dict]]:
    return [steps for name, steps in runs.items() if name.startswith(f"ahead{staleness}-")]


def seconds_per_step(steps: list[dict]) -> float:
    # Without the first: nothing was sampled ahead before it, and its time has the start of the run in it.
    return (steps[-1]["seconds"] - steps[0]["seconds"]) / (len(steps) - 1)


def mean_and_range(values: list[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def table(runs: dict[str, list[dict]]) -> str:
    columns = "seconds a step", "steps an hour", "beside synchronous", "reward, last 10 steps", "age", "sampler_kl"
    rows = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    baseline = statistics.mean(seconds_per_step(steps) for steps in of_staleness(runs, 0))
    for staleness, name in NAMES.items():
        group = of_staleness(runs, staleness)
        times = [seconds_per_step(steps) for steps in group]
        rewards = [statistics.mean(step["reward"] for step in steps[-LAST:]) for steps in group]
        ages = [step.get("rollout/staleness/mean", 0.0) for steps in group for step in steps[1:]]
        divergence = statistics.mean(step["sampler_kl"] for steps in group for step in steps)
        rows.append(
            f"| {name} | {mean_and_range(times, 2)} | {3600 / statistics.mean(times):.0f} "
            f"| {baseline / statistics.mean(times):.2f} × | {mean_and_range(rewards, 3)} "
            f"| {statistics.mean(ages):.2f} | {divergence:.1e} |"
        )
    return "\n".join(rows)


def smoothed(values: list[float]) -> list[float]:
    return [statistics.mean(values[max(0, end - WINDOW) : end]) for end in range(1, len(values) + 1)]


def draw(runs: dict[str, list[dict]]) -> None:
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for staleness, name in NAMES.items():
        for number, steps in enumerate(of_staleness(runs, staleness)):
            reward = smoothed([step["reward"] for step in steps])
            style = {"color": COLOURS[staleness], "linewidth": 1.6, "alpha": 0.85, "label": None if number else name}
            by_step.plot(range(1, len(steps) + 1), reward, **style)
            # From the end of the first step on, which no mode can overlap with anything.
            by_time.plot([step["seconds"] - steps[0]["seconds"] for step in steps], reward, **style)
    by_step.set(xlabel="optimizer steps", ylabel=f"reward, mean of {WINDOW} steps", title="by steps")
    by_time.set(xlabel="seconds since the first step", title="by time")
    for axis in (by_step, by_time):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    by_step.legend(frameon=False, loc="lower right")
    figure.savefig(HERE / "curves.png", dpi=110)


if __name__ == "__main__":
    all_runs = read_all()
    print(table(all_runs))
    draw(all_runs)
