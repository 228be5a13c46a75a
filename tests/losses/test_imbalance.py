"""What docs/imbalance.md says: its tables are those of the recorded figures, and its correction is exact."""

import importlib.util
import json
import math
from pathlib import Path

import torch

from rlhf import losses

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_tables_of_the_recorded_figures():
    spec = importlib.util.spec_from_file_location("imbalance", ROOT / "benchmarks/imbalance.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    page = (ROOT / "docs/imbalance.md").read_text()
    recorded = json.loads((ROOT / "docs/benchmarks/imbalance.json").read_text())
    assert len(recorded) == 3
    for kind, by_loss in recorded.items():
        columns = benchmark.CLASS_COLUMNS if "classes" in kind else benchmark.COLUMNS
        assert benchmark.table(by_loss, columns) in page, kind


def test_pos_weight_adds_its_logarithm_to_the_log_odds():
    targets = torch.tensor([1.0] + [0.0] * 19, dtype=torch.float64)
    log_odds = math.log(0.05 / 0.95)
    for weight in (1.0, 19.0, 100.0):
        # One logit for all rows: its minimum is where the derivative is 0.
        logit = torch.tensor(log_odds + math.log(weight), dtype=torch.float64, requires_grad=True)
        losses.bce_with_logits_loss(logit.expand(20), targets, pos_weight=weight).backward()
        assert abs(logit.grad) < 1e-15


def test_class_weights_add_their_logarithm_to_the_logits():
    labels = torch.tensor([0] * 12 + [1] * 6 + [2] * 2)
    counts = labels.bincount().double()
    weights = losses.class_weights(counts)
    logits = (counts.log() + weights.log()).requires_grad_()
    losses.cross_entropy_loss(logits.expand(20, 3), labels, class_weights=weights).backward()
    assert logits.grad.abs().max() < 1e-15
