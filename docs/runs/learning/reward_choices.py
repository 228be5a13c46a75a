"""Can a reward model beat "the longer answer"? Pooled states of frozen layers, and other measures of the length.

python reward_choices.py MODEL DATA OUT

Five folds of the training prompts choose the states, the shape of the length and the penalty. Nothing here looks at the
held-out pairs before all choices are made. The states are those of frozen_reward.py.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from frozen_reward import FOLDS, all_states, fit, folds_of
from rows import length_advantage, question, read
from settings import REWARD_LAYERS
from summary import by_prompt
from torch import Tensor
from torch.nn.functional import softplus
from win_rates import shown, win

PENALTIES = (0.1, 0.3, 1.0)
# [pairs, answer, layer, pooling, width] -> [pairs, answer, features]; the poolings are the mean and the last token.
POOLED: dict[str, Callable[[Tensor], Tensor]] = {
    "last token, layer 6": lambda states: states[:, :, 2, 1],
    "mean, layer 6": lambda states: states[:, :, 2, 0],
    "mean and last token, layer 6": lambda states: states[:, :, 2].flatten(2),
    "last token, mean of layers": lambda states: states[:, :, :, 1].mean(2),
    "mean and last token, mean of layers": lambda states: states.mean(2).flatten(2),
    "mean and last token, all layers": lambda states: states.flatten(2),
}
LENGTHS = {"linear": [0], "log": [1], "relative": [2], "all three": [0, 1, 2]}


def lengths(rows: Sequence[dict[str, Any]]) -> Tensor:
    """How much longer the chosen answers are.

    Returns:
        For each pair the difference in 1,000 characters, that of the logarithms, and that in means of the prompt.
    """
    sizes = [[len(row[name][-1]["content"]) for name in ("chosen", "rejected")] for row in rows]
    by_question: dict[str, list[int]] = {}
    for row, pair in zip(rows, sizes, strict=True):
        by_question.setdefault(question(row), []).extend(pair)
    columns = []
    for row, (chosen, rejected) in zip(rows, sizes, strict=True):
        others = by_question[question(row)]
        relative = (chosen - rejected) * len(others) / sum(others)
        columns.append([(chosen - rejected) / 1000, math.log((chosen + 1) / (rejected + 1)), relative])
    return torch.tensor(columns, dtype=torch.float64)


def differences(states: Tensor, pooled: str) -> Tensor:
    """Chosen less rejected."""
    features = POOLED[pooled](states.double())
    return features[:, 0] - features[:, 1]


def margins(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], penalty: float) -> tuple[Tensor, Tensor]:
    """The log-odds of the test pairs: by the reward, and by the length that it was fitted on top of.

    Args:
        train: differences of the states and of the lengths.
        test: the same of other pairs.
        penalty: of the reward's weights; the length has none.
    """
    length_weights = fit(train[1], torch.zeros(len(train[1]), dtype=torch.float64), 0.0)
    weights = fit(train[0], train[1] @ length_weights, penalty)
    return test[0] @ weights, test[1] @ length_weights


def folded(states: Tensor, length: Tensor, folds: Tensor, penalty: float) -> Tensor:
    """The log-odds of the pairs of each fold under a fit to the others."""
    total = torch.zeros(len(folds), dtype=torch.float64)
    for fold in range(FOLDS):
        kept = folds != fold
        by_reward, by_length = margins((states[kept], length[kept]), (states[~kept], length[~kept]), penalty)
        total[~kept] = by_reward + by_length
    return total


def loss_of(log_odds: Tensor) -> float:
    """The mean loss of pairs."""
    return float(softplus(-log_odds).mean())


def choose(states: Tensor, length: Tensor, folds: Tensor) -> tuple[str, float, Tensor]:
    """The states and the penalty with the lowest loss.

    Returns:
        The name of the states, the penalty, and the log-odds of each pair under a fit to other prompts.
    """
    found: dict[tuple[str, float], Tensor] = {}
    for name in POOLED:
        features = differences(states, name)
        features /= features.std(0) + 1e-6
        for penalty in PENALTIES:
            log_odds = found[name, penalty] = folded(features, length, folds, penalty)
            accuracy = float((log_odds > 0).double().mean())
            print(f"  {name}, penalty {penalty}: loss {loss_of(log_odds):.4f}, accuracy {accuracy:.4f}", flush=True)
    name, penalty = min(found, key=lambda candidate: loss_of(found[candidate]))
    return name, penalty, found[name, penalty]


def main() -> None:
    source, data, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    rows = {part: read(data, part) for part in ("train", "eval")}
    states = all_states(source, REWARD_LAYERS, rows, out / "states.pt")
    train, folds = lengths(rows["train"]), folds_of(rows["train"])
    none = torch.zeros(len(train), 1, dtype=torch.float64)
    shapes = {}
    for name, columns in LENGTHS.items():
        shapes[name] = loss_of(folded(none, train[:, columns], folds, 1.0))
        print(f"length {name}: loss {shapes[name]:.4f}", flush=True)
    shape = min(shapes, key=shapes.__getitem__)
    candidates = {"pooled states, linear length": "linear", f"pooled states, length {shape}": shape}
    chosen = {
        title: (name, *choose(states["train"], train[:, LENGTHS[name]], folds)) for title, name in candidates.items()
    }
    report(
        "training pairs, fitted to other prompts", {title: best[-1] for title, best in chosen.items()}, rows["train"]
    )

    # All choices are made. From here on the held-out pairs are seen.
    held_out, found = lengths(rows["eval"]), {}
    for title, (name, pooled, penalty, _) in chosen.items():
        scale = differences(states["train"], pooled).std(0) + 1e-6
        parts = [differences(states[part], pooled) / scale for part in ("train", "eval")]
        columns = LENGTHS[name]
        found[title] = sum(margins((parts[0], train[:, columns]), (parts[1], held_out[:, columns]), penalty))
    files = [out / f"reward-{name}.json" for name in ("frozen", "tuned")]
    both = [json.loads(file.read_text(encoding="utf-8"))["eval"] for file in files]
    rewards = torch.tensor(both, dtype=torch.float64).mean(0)
    length_alone = torch.tensor([length_advantage(row) for row in rows["eval"]], dtype=torch.float64)
    found["mean of the frozen and the fine-tuned rewards, linear length"] = rewards[:, 0] - rewards[:, 1] + length_alone
    report("held-out pairs", found, rows["eval"])


def report(pairs: str, found: dict[str, Tensor], rows: Sequence[dict[str, Any]]) -> None:
    """Print accuracy and loss of each, and what they gain against the longer answer.

    Args:
        pairs: what the rows are.
        found: log-odds of each pair, by name.
        rows: the pairs.
    """
    length_alone = torch.tensor([length_advantage(row) for row in rows], dtype=torch.float64)
    longest = [win(value) for value in length_alone.tolist()]
    length_loss = softplus(-length_alone)
    print(f"\n| on {pairs} | accuracy | gained, lost | more than the longer answer | loss | less than by length |")
    print("|---|---|---|---|---|---|")
    for title, values in found.items():
        hits = [win(value) for value in values.tolist()]
        gains = [hit - other for hit, other in zip(hits, longest, strict=True)]
        saved = by_prompt((length_loss - softplus(-values)).tolist(), rows)
        cells = [shown(by_prompt(hits, rows)), f"{sum(gain > 0 for gain in gains)}, {sum(gain < 0 for gain in gains)}"]
        cells += [shown(by_prompt(gains, rows), 4), f"{loss_of(values):.4f}", shown(saved, 4)]
        print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
