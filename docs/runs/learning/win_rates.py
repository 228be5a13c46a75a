"""Win rates of one model's answers against another's on the same prompts, by the reward models."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rows import LENGTH_WEIGHT
from settings import SIDES

from rlhf.evaluation import Estimate, length_controlled_win_rate, mean_ratio

Answers = list[dict[str, Any]]
KINDS = ("sampled", "greedy")
WITH_LENGTH = " and length"


def shown(estimate: Estimate | None, digits: int = 3) -> str:
    """A figure with its interval."""
    if estimate is None:
        return "–"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def win(difference: float) -> float:
    """1 where the second is ahead, 1/2 for a tie."""
    return (difference > 0) + 0.5 * (difference == 0)


def score(entry: dict[str, Any], judge: str) -> float:
    """The reward of an answer; of a judge "NAME and length" with the log-odds of its length."""
    reward = float(entry[judge.removesuffix(WITH_LENGTH)])
    return reward + LENGTH_WEIGHT * len(entry["text"]) / 1000 if judge.endswith(WITH_LENGTH) else reward


def win_rate(scores: Sequence[float]) -> Estimate | None:
    """The mean score of the prompts, with a t interval and a test against 1/2."""
    found = mean_ratio([value - 0.5 for value in scores], [1] * len(scores))
    return found and replace(found, value=found.value + 0.5, low=found.low + 0.5, high=found.high + 0.5)


def duel(before: Answers, after: Answers, judge: str, kind: str) -> dict[str, Any]:
    """The second model's answers against the first one's, by a judge; prompts are the units."""
    scores: dict[int, list[float]] = {}
    lengths: dict[int, list[float]] = {}
    old, new = ([entry for entry in answers if entry["kind"] == kind] for answers in (before, after))
    for a, b in zip(old, new, strict=True):
        assert a["prompt"] == b["prompt"]
        scores.setdefault(a["prompt"], []).append(win(score(b, judge) - score(a, judge)))
        lengths.setdefault(a["prompt"], []).append(len(b["text"]) - len(a["text"]))
    each = [statistics.mean(values) for values in scores.values()]
    return {
        "win_rate": win_rate(each),
        "at_equal_length": length_controlled_win_rate(each, [statistics.mean(values) for values in lengths.values()]),
        "characters": [statistics.mean(len(entry["text"]) for entry in answers) for answers in (old, new)],
        "tokens": [statistics.mean(entry["tokens"] for entry in answers) for answers in (old, new)],
        "ended": [statistics.mean(entry["ended"] for entry in answers) for answers in (old, new)],
        "rewards": [statistics.mean(score(entry, judge) for entry in answers) for answers in (old, new)],
    }


def show_duels(title: str, duels: dict[str, dict[str, Any]]) -> None:
    """Print a table with a line for each comparison."""
    print(f"\n{title}\n\n| answers | win rate | at equal length | reward | tokens | ended |\n|---|---|---|---|---|---|")
    for name, found in duels.items():
        pairs = [f"{found[key][0]:.2f} → {found[key][1]:.2f}" for key in ("rewards", "tokens", "ended")]
        print(
            f"| {name} | {shown(found['win_rate'])} | {shown(found['at_equal_length'])} | " + " | ".join(pairs) + " |"
        )


def comparisons(start: Answers, runs: dict[str, dict[str, Any]]) -> dict[str, tuple[Answers, Answers]]:
    """What is compared in one seed: the answers before and after, by name.

    Args:
        start: answers of the model before training.
        runs: the results of both sides.
    """
    answers = {
        f"{side} {stage}": run[f"{stage}_answers"]
        for side, run in runs.items()
        for stage in ("sft", "dpo")
        if f"{stage}_answers" in run
    }
    if start:
        answers["start"] = start
    ours, trl = SIDES
    pairs = [(f"{trl} {stage}", f"{ours} {stage}") for stage in ("sft", "dpo")]
    pairs += [("start", f"{side} {stage}") for stage in ("sft", "dpo") for side in SIDES]
    pairs += [(f"{side} sft", f"{side} dpo") for side in SIDES]
    known = [(a, b) for a, b in pairs if a in answers and b in answers]
    return {f"{a} → {b}": (answers[a], answers[b]) for a, b in known}


def side_duels(start: Answers, sides: dict[str, list[dict[str, Any]]], judges: Sequence[str]) -> dict[str, Any]:
    """All comparisons over all seeds: a prompt's score is the mean over the seeds.

    Args:
        start: answers of the model before training, with rewards.
        sides: the results of each side, by seed.
        judges: names of rewards.
    Returns:
        A :func:`duel` for each comparison, kind of answer and judge, with the win rate of each seed.
    """
    seeds = [comparisons(start, dict(zip(sides, runs, strict=True))) for runs in zip(*sides.values(), strict=False)]
    found = {}
    for name in seeds[0] if seeds else []:
        before, after = ([entry for seed in seeds if name in seed for entry in seed[name][i]] for i in (0, 1))
        for kind in KINDS:
            for judge in judges:
                result = duel(before, after, judge, kind)
                rates = [duel(*seed[name], judge, kind)["win_rate"] for seed in seeds if name in seed]
                result["win_rate_by_seed"] = [rate.value for rate in rates if rate]
                found[f"{name}, {kind}, by {judge}"] = result
    return found


def show_win_rates(found: dict[str, Any], judges: Sequence[str]) -> None:
    """Print a line for each comparison and kind of answer, with a column for each judge.

    Args:
        found: of :func:`side_duels`.
        judges: names of rewards.
    """
    heads = [head for judge in judges for head in (judge, "at equal length")]
    print("\nWin rates of the second model against the first\n\n| answers | " + " | ".join(heads) + " | characters |")
    print("|---" * (len(heads) + 2) + "|")
    for name in dict.fromkeys(key.rsplit(", by ", 1)[0] for key in found):
        results = [found[f"{name}, by {judge}"] for judge in judges]
        cells = [shown(result[figure]) for result in results for figure in ("win_rate", "at_equal_length")]
        before, after = results[0]["characters"]
        print(f"| {name} | " + " | ".join(cells) + f" | {before:.0f} → {after:.0f} |")
