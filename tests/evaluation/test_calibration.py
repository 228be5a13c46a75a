"""Calibration against scikit-learn's curve."""

import math

import numpy as np
import torch
from conftest import close
from sklearn.calibration import calibration_curve

from rlhf.evaluation import calibration_bins, calibration_error


def error(margins, parts=1):
    """Summed over parts of the data, as a trainer does."""
    sums = [[t.sum(0) for t in calibration_bins(part)] for part in margins.chunk(parts)]
    gaps, counts = (torch.stack(column).sum(0).tolist() for column in zip(*sums, strict=True))
    return calibration_error(gaps, counts)


def oracle(margins):
    """Each pair in both orders, so that the label is not always 1; twenty bins over [0, 1]."""
    p = 1 / (1 + np.exp(-np.concatenate([margins, -margins])))
    y = np.repeat([1, 0], len(margins))
    share, confidence = calibration_curve(y, p, n_bins=20)
    count = np.histogram(p, bins=20, range=(0, 1))[0]
    return float((count[count > 0] / len(p) * np.abs(share - confidence)).sum())


def test_against_scikit_learn():
    margins = 1.5 * torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    close(error(margins), oracle(margins.numpy()), torch.float64)
    close(error(margins, parts=7), error(margins), torch.float64)


def test_by_hand():
    """Sure and right three times of four: off by a quarter; a coin that says so is calibrated."""
    close(error(torch.tensor([50.0, 50.0, 50.0, -50.0])), 0.25)
    assert error(torch.zeros(3)) == 0.0
    close(error(torch.tensor([math.log(3), math.log(3), math.log(3), -math.log(3)])), 0.0)
    assert math.isnan(calibration_error([0.0], [0.0]))
