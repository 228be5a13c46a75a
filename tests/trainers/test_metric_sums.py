"""Sums of metrics against plain sums, without a trainer."""

import math

import pytest
import torch
from accelerate import Accelerator

from rlhf.trainers.metric_sums import MetricSums, known, means


def test_sums_are_those_of_all_batches_and_begin_anew():
    sums = MetricSums()
    assert not sums
    sums.add({"loss": (torch.tensor([1.0, 2.0]), torch.tensor([3, 4]))})
    sums.add({"loss": (torch.tensor([4.0]), torch.tensor([1])), "kl": (torch.tensor(0.5), torch.tensor(2))})
    assert sums
    accelerator = Accelerator(cpu=True)
    assert sums.reduce(accelerator) == {"kl": (0.5, 2.0), "loss": (7.0, 8.0)}
    assert not sums
    sums.add({"kl": (torch.tensor(1.0), torch.tensor(1))})
    assert sums.reduce(accelerator) == {"kl": (1.0, 1.0)}


def test_small_terms_are_not_lost_beside_a_large_sum():
    sums = MetricSums()
    for value in (2.0**25, 1.0, 1.0, 1.0):
        sums.add({"num_tokens": (torch.tensor(value), torch.tensor(1))})
    assert sums.reduce(Accelerator(cpu=True))["num_tokens"] == (2.0**25 + 3, 4.0)


def test_a_sum_carries_no_gradient():
    sums = MetricSums()
    sums.add({"loss": (torch.ones(2, requires_grad=True).exp(), torch.ones(2))})
    assert not sums._sums["loss"].requires_grad


def test_means():
    values = means(
        {"loss": (6.0, 4.0), "perplexity": (6.0, 4.0), "kl": (0.0, 0.0), "huge": (2000.0, 1.0)}, {"perplexity", "huge"}
    )
    assert values["loss"] == 1.5 and values["perplexity"] == pytest.approx(math.exp(1.5))
    assert math.isnan(values["kl"]) and math.isfinite(values["huge"])


def test_a_line_of_the_log_has_no_metric_of_nothing():
    sums = {"loss": (6.0, 4.0), "margins": (0.0, 0.0), "kl": (math.nan, 2.0)}
    values = {**means(sums, set()), "derived": math.nan}
    logged = known(values, sums)
    assert logged.keys() == {"loss", "kl"}  # what was counted is shown, NaN or not
