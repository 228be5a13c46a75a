"""Rare positives: what weights and focal loss change, beside plain binary cross-entropy. Needs scikit-learn.

    python benchmarks/imbalance.py            # prints the tables of docs/imbalance.md
    python benchmarks/imbalance.py --json docs/benchmarks/imbalance.json

5 % of the rows are positive. Each seed is another problem. Each loss trains a logistic regression and a small network
on the same rows, from the same first weights. Each trained model is measured on test rows: ranking (AUC, average
precision), probabilities (Brier score, calibration error), and decisions, at a threshold of 0.5 and at the one that has
the best F1 on validation rows. A second problem has several classes, of which each is half as frequent as the one
before.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import make_classification
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    f1_score,
    log_loss,
    precision_recall_curve,
    precision_score,
    recall_score,
    roc_auc_score,
)
from torch import Tensor, nn

from rlhf import losses

POSITIVES, FEATURES = 0.05, 20
TRAIN, VALIDATION, TEST = 4000, 2000, 20_000
EPOCHS, BATCH, CHECK_EVERY = 60, 256, 4
RATIO = (1 - POSITIVES) / POSITIVES  # negatives for each positive
Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "BCE": losses.bce_with_logits_loss,
    f"BCE, pos_weight={RATIO:.0f}": lambda z, y: losses.bce_with_logits_loss(z, y, pos_weight=RATIO),
    "focal, gamma=2, alpha=0.25 (default)": losses.focal_loss,
    "focal, gamma=2, alpha=None": lambda z, y: losses.focal_loss(z, y, alpha=None),
    "focal, gamma=2, alpha=0.95": lambda z, y: losses.focal_loss(z, y, alpha=1 - POSITIVES),
}
# Few enough for a page; the other figures are in the JSON file.
COLUMNS = {
    "ap": "AP",
    "brier": "Brier",
    "ece": "ECE",
    "recall": "recall at 0.5",
    "precision": "precision at 0.5",
    "f1_tuned": "F1, threshold chosen",
}
CLASSES = 6
# Each class is half as frequent as the one before; the rarest has 1.6 % of the rows.
SHARES = torch.tensor([0.5**index for index in range(CLASSES)]) / sum(0.5**index for index in range(CLASSES))
BALANCED, EFFECTIVE = losses.class_weights(SHARES * TRAIN), losses.class_weights(SHARES * TRAIN, "effective")
CLASS_LOSSES: dict[str, Loss] = {
    "cross-entropy": losses.cross_entropy_loss,
    "cross-entropy, balanced weights": lambda z, y: losses.cross_entropy_loss(z, y, class_weights=BALANCED),
    "cross-entropy, effective weights": lambda z, y: losses.cross_entropy_loss(z, y, class_weights=EFFECTIVE),
    "focal, gamma=2": losses.multiclass_focal_loss,
    "focal, gamma=2, effective weights": lambda z, y: losses.multiclass_focal_loss(z, y, class_weights=EFFECTIVE),
}
CLASS_COLUMNS = {
    "ap": "mean AP of the classes",
    "log_loss": "log loss",
    "ece": "ECE",
    "accuracy": "accuracy",
    "recall": "mean recall of the classes",
    "rarest": "recall of the rarest",
}
Split = tuple[Tensor, Tensor]


def data(seed: int, class_sep: float) -> list[Split]:
    """Training, validation and test rows of one problem; each seed is another problem."""
    rows = TRAIN + VALIDATION + TEST
    x, y = make_classification(
        rows,
        FEATURES,
        n_informative=6,
        n_redundant=4,
        n_clusters_per_class=2,
        weights=[1 - POSITIVES],
        flip_y=0,
        class_sep=class_sep,
        random_state=seed,
    )
    inputs, targets = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32)
    sizes = (TRAIN, VALIDATION, TEST)
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def class_data(seed: int, class_sep: float) -> list[Split]:
    """As :func:`data`, with several classes."""
    x, y = make_classification(
        TRAIN + VALIDATION + TEST,
        FEATURES,
        n_informative=8,
        n_redundant=4,
        n_classes=CLASSES,
        n_clusters_per_class=2,
        weights=SHARES.tolist(),
        flip_y=0,
        class_sep=class_sep,
        random_state=seed,
    )
    inputs, targets = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)
    sizes = (TRAIN, VALIDATION, TEST)
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def model(kind: str, outputs: int = 1) -> nn.Sequential:
    """A logistic regression, or a network with two hidden layers; one output is a scalar for each row."""
    last = nn.Flatten(0) if outputs == 1 else nn.Identity()
    if kind == "logistic regression":
        return nn.Sequential(nn.Linear(FEATURES, outputs), last)
    hidden = [nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(64, outputs), last)


def train(network: nn.Module, loss: Loss, train_rows: Split, validation_rows: Split, seed: int) -> nn.Module:
    """Adam; the weights with the smallest loss on the validation rows, each loss by its own measure."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2 if len(list(network.parameters())) == 2 else 1e-3)
    inputs, targets = train_rows
    best_loss, best_state = math.inf, {}
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(inputs), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss(network(inputs[batch]), targets[batch]).backward()
            optimizer.step()
        if epoch % CHECK_EVERY == CHECK_EVERY - 1:
            with torch.no_grad():
                value = float(loss(network(validation_rows[0]), validation_rows[1]))
            if value < best_loss:
                best_loss, best_state = value, {name: weight.clone() for name, weight in network.state_dict().items()}
    network.load_state_dict(best_state)
    return network


def calibration_error(probabilities: np.ndarray, targets: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over bins of equal width."""
    indices = np.minimum((probabilities * bins).astype(int), bins - 1)
    total = 0.0
    for index in range(bins):
        inside = indices == index
        if inside.any():
            total += abs(probabilities[inside].mean() - targets[inside].mean()) * inside.mean()
    return float(total)


def measure(logits: Tensor, targets: Tensor, validation_logits: Tensor, validation_targets: Tensor) -> dict[str, float]:
    """All figures of a trained model on the test rows."""
    p, y = logits.double().sigmoid().numpy(), targets.numpy()
    precision, recall, thresholds = precision_recall_curve(
        validation_targets.numpy(), validation_logits.double().sigmoid().numpy()
    )
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    threshold = float(thresholds[f1[:-1].argmax()])
    return {
        "auc": float(roc_auc_score(y, p)),
        "ap": float(average_precision_score(y, p)),
        "brier": float(brier_score_loss(y, p)),
        "ece": calibration_error(p, y),
        "mean_probability": float(p.mean()),
        "recall": float(recall_score(y, p > 0.5)),
        "precision": float(precision_score(y, p > 0.5, zero_division=0)),
        "f1": float(f1_score(y, p > 0.5)),
        "threshold": threshold,
        "f1_tuned": float(f1_score(y, p >= threshold)),
    }


def measure_classes(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """All figures of a model of several classes on the test rows."""
    p, y = logits.double().softmax(-1).numpy(), targets.numpy()
    recalls = recall_score(y, p.argmax(-1), average=None, labels=range(CLASSES))
    return {
        "ap": float(np.mean([average_precision_score(y == index, p[:, index]) for index in range(CLASSES)])),
        "log_loss": float(log_loss(y, p, labels=range(CLASSES))),
        "ece": calibration_error(p.max(-1), p.argmax(-1) == y),
        "accuracy": float((p.argmax(-1) == y).mean()),
        "recall": float(recalls.mean()),
        "rarest": float(recalls[-1]),
    }


def run_classes(seeds: int, class_sep: float) -> dict[str, list[dict[str, float]]]:
    """Figures of each seed of the network on several classes, by loss."""
    by_loss: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        train_rows, validation_rows, test_rows = class_data(seed, class_sep)
        for name, loss in CLASS_LOSSES.items():
            torch.manual_seed(seed)
            network = train(model("network", CLASSES), loss, train_rows, validation_rows, seed)
            with torch.no_grad():
                logits = network(test_rows[0])
            by_loss.setdefault(name, []).append(measure_classes(logits, test_rows[1]))
            if "balanced" in name:
                # A class weight multiplies the odds of its class by itself.
                corrected = measure_classes(logits - BALANCED.log(), test_rows[1])
                by_loss.setdefault(f"{name}, logits - log weights", []).append(corrected)
    return by_loss


def run(seeds: int, class_sep: float) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Figures of each seed, by model and by loss."""
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for kind in ("logistic regression", "network"):
        by_loss = results.setdefault(kind, {})
        for seed in range(seeds):
            train_rows, validation_rows, test_rows = data(seed, class_sep)
            for name, loss in LOSSES.items():
                torch.manual_seed(seed)  # the same first weights for each loss
                network = train(model(kind), loss, train_rows, validation_rows, seed)
                with torch.no_grad():
                    logits, validation_logits = (network(x) for x in (test_rows[0], validation_rows[0]))
                figures = measure(logits, test_rows[1], validation_logits, validation_rows[1])
                by_loss.setdefault(name, []).append(figures)
                if "pos_weight" in name:
                    # pos_weight multiplies the odds by itself, so its logarithm is subtracted from the logits.
                    shift = math.log(RATIO)
                    figures = measure(logits - shift, test_rows[1], validation_logits - shift, validation_rows[1])
                    by_loss.setdefault(f"{name}, logits - log {RATIO:.0f}", []).append(figures)
    return results


def table(by_loss: dict[str, list[dict[str, float]]], columns: dict[str, str]) -> str:
    """In Markdown: means over the seeds, and the difference of AP to the first loss with its standard error."""
    first = next(iter(by_loss))
    plain = np.array([figures["ap"] for figures in by_loss[first]])
    headings = ["loss", *columns.values(), f"AP minus that of {first}"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name, seeds in by_loss.items():
        cells = [f"{np.mean([figures[metric] for figures in seeds]):.3f}" for metric in columns]
        difference = np.array([figures["ap"] for figures in seeds]) - plain
        error = difference.std(ddof=1) / math.sqrt(len(difference))
        cells.append(f"{difference.mean():+.3f} ± {error:.3f}" if difference.any() else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rounded(by_loss: dict[str, list[dict[str, float]]]) -> dict[str, list[dict[str, float]]]:
    """Enough digits for the tables, and for those who compute with them."""
    return {
        name: [{metric: round(value, 5) for metric, value in figures.items()} for figures in seeds]
        for name, seeds in by_loss.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--class_sep", type=float, default=0.8, help="distance of the classes, as in make_classification"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures of each seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, list[dict[str, float]]]] = run(arguments.seeds, arguments.class_sep)
    for kind, by_loss in results.items():
        print(f"\n{kind}, {arguments.seeds} seeds\n\n{table(by_loss, COLUMNS)}")
    classes = run_classes(arguments.seeds, arguments.class_sep)
    print(f"\nnetwork, {CLASSES} classes, {arguments.seeds} seeds\n\n{table(classes, CLASS_COLUMNS)}")
    results[f"network, {CLASSES} classes"] = classes
    if arguments.json:
        lines = [f'"{kind}": {json.dumps(rounded(by_loss))}' for kind, by_loss in results.items()]
        arguments.json.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
