"""Tables of the run: python summary.py RESULTS DATA writes summary.json and curves.json and prints Markdown.

RESULTS is the folder that run.py wrote (its .json files), DATA that of the preferences.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rows import LENGTH_WEIGHT, length_advantage, question, read
from settings import DPO, SIDES, STAGES
from win_rates import KINDS, WITH_LENGTH, duel, show_duels, show_win_rates, shown, side_duels, win

from rlhf.evaluation import Estimate, mean_ratio, share_difference

HERE = Path(__file__).parent
# What a curve shows; the rest of a line of the log is left out.
CURVES = {
    "sft": ("loss",),
    "dpo": ("loss", "rewards/accuracies"),
    "grpo": ("reward",),
    "ppo": ("reward", "rewards/reward-tuned/mean", "critic/explained_variance", "completions/mean_length", "kl"),
    "reward": ("loss", "accuracy"),
}


# Reward models


def by_prompt(hits: Sequence[float], rows: Sequence[dict[str, Any]]) -> Estimate | None:
    """The share of hits; its interval takes prompts, not pairs, as independent."""
    groups: dict[str, list[float]] = {}
    for hit, row in zip(hits, rows, strict=True):
        groups.setdefault(question(row), []).append(hit)
    return mean_ratio([sum(group) for group in groups.values()], [len(group) for group in groups.values()])


def length_differences(rows: Sequence[dict[str, Any]], measure: Callable[[str], int]) -> list[int]:
    """How much longer the chosen answers are."""
    return [measure(row["chosen"][-1]["content"]) - measure(row["rejected"][-1]["content"]) for row in rows]


def log_loss(margin: float) -> float:
    """-log sigmoid(margin)."""
    return math.log1p(math.exp(-abs(margin))) + max(0.0, -margin)


def balanced(hits: Sequence[float], longer: Sequence[float]) -> tuple[float, float, float]:
    """Accuracy where the chosen answer is the longer one, where it is the shorter one, and the mean of both."""
    where_longer = [value for value, length in zip(hits, longer, strict=True) if length > 0]
    where_shorter = [value for value, length in zip(hits, longer, strict=True) if length < 0]
    parts = statistics.mean(where_longer), statistics.mean(where_shorter)
    return *parts, statistics.mean(parts)


def judge_table(results: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy and loss of each reward model, and of the length alone, on the held-out pairs."""
    characters = length_differences(rows, len)
    words = length_differences(rows, lambda text: len(text.split()))
    margins = {
        "longer, in characters": [length_advantage(row) for row in rows],
        "longer, in words": [LENGTH_WEIGHT * count for count in words],
    }
    for file in sorted(results.glob("reward-*.json")):
        rewards = json.loads(file.read_text(encoding="utf-8"))["eval"]
        margins[file.stem] = [chosen - rejected for chosen, rejected in rewards]
        pairs = zip(margins[file.stem], rows, strict=True)
        margins[f"{file.stem} and length"] = [margin + length_advantage(row) for margin, row in pairs]
    print("\n| on held-out pairs | accuracy | chosen longer | chosen shorter | balanced | loss | less than by length |")
    print("|---|---|---|---|---|---|---|")
    table = {}
    longest = [win(value) for value in margins["longer, in characters"]]
    length_losses = [log_loss(value) for value in margins["longer, in characters"]]
    for name, values in margins.items():
        hits, losses = [win(value) for value in values], [log_loss(value) for value in values]
        ahead = sum(a > b for a, b in zip(hits, longest, strict=True))
        behind = sum(a < b for a, b in zip(hits, longest, strict=True))
        saved = [before - after for before, after in zip(length_losses, losses, strict=True)]
        table[name] = {
            "accuracy": by_prompt(hits, rows),
            "longer_shorter_balanced": balanced(hits, characters),
            "accuracy_gain": share_difference(ahead, behind, len(hits)),
            "loss": statistics.mean(losses),
            "loss_saved": by_prompt(saved, rows),
        }
        # Of a reward alone, or of words, the scale means nothing, and so the loss.
        has_loss = name == "longer, in characters" or name.endswith("and length")
        end = [f"{statistics.mean(losses):.4f}", shown(table[name]["loss_saved"], 4)] if has_loss else ["", ""]
        parts = [f"{part:.3f}" for part in balanced(hits, characters)]
        print(f"| {name} | " + " | ".join([shown(table[name]["accuracy"]), *parts, *end]) + " |")
    return table


# SFT, DPO, GRPO


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if len(values) < 2:
        return f"{statistics.mean(values):.3f}" if values else "–"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def chosen_perplexity(metrics: dict[str, float]) -> float:
    """The perplexity of the chosen answers; ``rlhf eval`` calls it so only where there is a reference model."""
    return metrics["perplexity/chosen"] if "perplexity/chosen" in metrics else metrics["perplexity"]


def sft_perplexity(run: dict[str, Any]) -> float:
    """The perplexity after SFT. Where it was not computed, it follows from DPO's figures, whose reference it is."""
    if "sft_held_out" in run:
        return chosen_perplexity(run["sft_held_out"]["metrics"])
    found = run["dpo_held_out"]["metrics"]
    tokens = -found["logps/chosen"] / math.log(found["perplexity/chosen"])
    reference = found["logps/chosen"] - found["rewards/chosen"] / DPO["beta"]
    return math.exp(-reference / tokens)


def side_table(sides: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """What each side reached with each seed."""
    table: dict[str, dict[str, list[float]]] = {}
    print("\n| figure | " + " | ".join(sides) + " |\n|---|" + "---|" * len(sides))

    def line(name: str, figure: Callable[[dict[str, Any]], float]) -> None:
        cells = []
        for side, runs in sides.items():
            values: list[float] = []
            for run in runs:
                try:
                    values.append(figure(run))
                except KeyError:  # this stage failed or was stopped
                    continue
            cells.append(spread(values))
            table.setdefault(name, {})[side] = values
        print(f"| {name} | " + " | ".join(cells) + " |")

    for stage in STAGES:
        line(f"{stage}: steps", lambda run, stage=stage: run[stage]["steps"])  # type: ignore[misc]
        line(f"{stage}: seconds", lambda run, stage=stage: run[stage]["seconds"])  # type: ignore[misc]
        line(f"{stage}: seconds on the clock", lambda run, stage=stage: run[stage]["wall_seconds"])  # type: ignore[misc]
    line("sft: held-out perplexity", sft_perplexity)
    line("dpo: held-out perplexity", lambda run: run["dpo_held_out"]["metrics"]["perplexity/chosen"])
    for metric in ("accuracies", "margins"):
        line(f"dpo: held-out reward {metric}", lambda run, m=metric: run["dpo_held_out"]["metrics"][f"rewards/{m}"])  # type: ignore[misc]
    for kind in ("sampled", "greedy"):
        line(
            f"grpo: share of {kind} held-out answers that fit",
            lambda run, k=kind: statistics.mean(a["fits"] for a in run["grpo_answers"] if a["kind"] == k),  # type: ignore[misc]
        )
    return table


# Curves


def curves(results: Path, sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of each line of the logs, against seconds."""

    def points(kind: str, lines: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
        return {
            name: [[line["seconds"], line["step"], round(line[name], 5)] for line in lines if name in line]
            for name in CURVES[kind]
        }

    found: dict[str, Any] = {}
    for side, runs in sides.items():
        for run in runs:
            for stage in STAGES:
                found[f"{stage}-{side}-{run['seed']}"] = points(stage, run.get(stage, {}).get("lines", []))
    for file in sorted(results.glob("reward-*.json")):
        found[file.stem] = points("reward", json.loads(file.read_text(encoding="utf-8"))["lines"])
    if (results / "ppo.json").exists():
        found["ppo"] = points("ppo", json.loads((results / "ppo.json").read_text(encoding="utf-8"))["lines"])
    return found


def main() -> None:
    results, data = Path(sys.argv[1]), Path(sys.argv[2])
    rows = read(data, "eval")
    sides: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for file in sorted(results.glob("side-*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        sides[run["side"]].append(run)
    judges = [file.stem for file in sorted(results.glob("reward-*.json"))]
    summary: dict[str, Any] = {"judges": judge_table(results, rows)}
    summary["sides"] = side_table(sides)
    start_file = results / "start.json"
    start = json.loads(start_file.read_text(encoding="utf-8")) if start_file.exists() else {"answers": []}
    if "held_out" in start:
        summary["start"] = start["held_out"]["metrics"]
        print(f"\nPerplexity before training: {chosen_perplexity(summary['start']):.3f}")
    with_length = [name + WITH_LENGTH for name in judges]
    summary["win_rates"] = side_duels(start["answers"], sides, judges + with_length)
    show_win_rates(summary["win_rates"], judges + with_length)
    ppo_file = results / "ppo.json"
    ppo = json.loads(ppo_file.read_text(encoding="utf-8")) if ppo_file.exists() else {}
    if "before" in ppo:
        # The last one was fitted by mean_state_judge.py, if it has run.
        ppo_judges = [name for name in (*judges, "mean-state") if name in ppo["before"][0]]
        kinds = [(kind, judge) for kind in KINDS for judge in ppo_judges]
        summary["ppo"] = {f"{k}, by {j}": duel(ppo["before"], ppo["after"], j, k) for k, j in kinds}
        show_duels("PPO (after) against its start (before)", summary["ppo"])
    (HERE / "summary.json").write_text(json.dumps(summary, default=vars, indent=1) + "\n", encoding="utf-8")
    (HERE / "curves.json").write_text(json.dumps(curves(results, sides)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
