"""Whether a reward model is right as often as it says."""

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 10


def calibration_bins(margins: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sort pairs by confidence :math:`\sigma(|m|)` into ten equal bins between 1/2 and 1.

    Args:
        margins: [S], reward of the chosen answer minus that of the rejected one.
    Returns:
        Two [S, 10]: in the bin of each pair, correctness (1, 0; a tie 1/2) minus confidence; and 1.
        Summed over any pairs, they make :func:`calibration_error`.
    """
    confidence = torch.sigmoid(margins.abs())
    correct = (margins > 0) + 0.5 * (margins == 0)
    index = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    bins = F.one_hot(index, BINS).to(margins.dtype)
    return bins * (correct - confidence)[:, None], bins


def calibration_error(gaps: list[float], counts: list[float]) -> float:
    r"""Expected calibration error: how far accuracy and confidence lie apart, on average over pairs.

    .. math:: \sum_b \frac{n_b}{n} \left|\mathrm{acc}_b - \mathrm{conf}_b\right|

    Args:
        gaps, counts: of each bin, sums of what :func:`calibration_bins` returns.
    Returns:
        In [0, 1]; 0 is perfect; nan for no pairs.

    Source: Naeini et al. 2015; Guo et al., arXiv 1706.04599, eq. 3.
    """
    total = sum(counts)
    return sum(map(abs, gaps)) / total if total else float("nan")
