"""Weights of the tokens of pairs (LD-DPO), and of pairs (WPO)."""

from typing import Any

import torch
from torch import Tensor

from rlhf.data import Batch
from rlhf.logprobs import Predictions, Targets


def tail_weights(targets: Targets, alpha: float) -> Tensor:
    """Weigh less the tokens that only the longer answer of a pair has.

    Args:
        targets: N scored tokens of pairs, whose two sequences are neighbours.
        alpha: the weight of those tokens, in [0, 1].
    Returns:
        [N], 1 up to the length of the shorter answer of the pair, ``alpha`` beyond.

    Source: LD-DPO, arXiv 2409.06411.
    """
    lengths = targets.counts()
    starts = lengths.cumsum(0) - lengths  # of each sequence among the tokens
    position = torch.arange(len(targets), device=lengths.device) - starts[targets.sequence]
    shorter_lengths = lengths.view(-1, 2).amin(1).repeat_interleave(2)
    return torch.where(position < shorter_lengths[targets.sequence], 1.0, alpha)


@torch.no_grad()
def wpo_weights(policy: Any, batch: Batch, logps: Tensor) -> Tensor:
    """Weigh pairs by how likely their answers are for the policy, as if it had sampled them.

    Args:
        policy: the trained policy, without what accelerate wraps around it.
        batch: pairs.
        logps: [N], log-probabilities of the scored tokens under the policy, in nats.
    Returns:
        [pairs], the product over both answers of the geometric mean of p(token) / sum p^2 over their tokens.

    Source: WPO, arXiv 2406.11827, eq. 2, with its alignment to the policy's own answers.
    """
    # Less the log of the mean probability of tokens that the policy samples itself: about 0 for such tokens.
    aligned = logps - log_sum_squared_probs(policy.predictions(batch))
    means = batch.targets.sum(aligned) / batch.targets.counts().clamp(min=1)
    return means.exp().view(-1, 2).prod(1)


def log_sum_squared_probs(predictions: Predictions, chunk_size: int = 256) -> Tensor:
    """The log of the sum over the vocabulary of squared probabilities.

    Args:
        predictions: N rows of hidden states, and the head.
        chunk_size: tokens whose logits are in memory at a time.
    Returns:
        [N], float32.
    """
    chunks = []
    # Logits of all tokens would need [N, vocabulary] in memory.
    for rows in predictions.rows.split(chunk_size):
        logits = predictions._replace(rows=rows).logits(torch.float32)
        # log p^2 = 2 log p, summed in the log domain: p^2 of unlikely tokens underflows.
        chunks.append((2 * logits.log_softmax(-1)).logsumexp(-1))
    return torch.cat(chunks) if chunks else predictions.rows.new_zeros(0)
