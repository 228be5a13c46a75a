"""Whether a reward model is right as often as its confidence claims."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 10


def calibration_bins(margins: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sort pairs by confidence :math:`\sigma(|m|)` into ten equal bins between 1/2 and 1.

    Args:
        margins: [S], reward of the chosen answer minus that of the rejected one.

    Returns:
        Two tensors [S, 10]. The first holds correctness (1 or 0; 1/2 for a tie) minus confidence in the bin of each
        pair; the second holds 1 there. Summed over any pairs, they make :func:`calibration_error`.
    """
    confidence = torch.sigmoid(margins.abs())
    # A tie is half right and has confidence 1/2, so it counts as perfectly calibrated.
    correctness = (margins > 0) + 0.5 * (margins == 0)
    scaled_confidence = 2 * (confidence - 0.5)  # from [1/2, 1] to [0, 1]
    # Confidence is exactly 1 in float32 above a margin of about 17: it belongs to the last bin.
    bin_index = (scaled_confidence * BINS).long().clamp(max=BINS - 1)
    in_bin = F.one_hot(bin_index, BINS).to(margins.dtype)
    confidence_gap = correctness - confidence
    return in_bin * confidence_gap[:, None], in_bin


def calibration_error(gaps: Sequence[float], counts: Sequence[float]) -> float:
    r"""Expected calibration error: the mean distance of accuracy from confidence, over pairs.

    .. math:: \sum_b \frac{n_b}{n} \left|\mathrm{acc}_b - \mathrm{conf}_b\right|

    Args:
        gaps: For each bin, the sum of the first result of :func:`calibration_bins`.
        counts: For each bin, the sum of the second.

    Returns:
        In [0, 1]; 0 is perfect; nan for no pairs.

    Source: Naeini et al. 2015; Guo et al., arXiv 1706.04599, eq. 3.
    """
    num_pairs = sum(counts)
    if not num_pairs:
        return float("nan")
    # The sum of gaps in a bin is n_b (acc_b − conf_b). Absolute values come last: first, batches are summed.
    return sum(map(abs, gaps)) / num_pairs
