"""From logits to a token: temperature, truncation, and one uniform number for each token."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rlhf.rollouts.engine import Sampling

BLOCK = 256  # the vocabulary is searched in two steps: first the block, then the token in it
FIRST_CANDIDATES = 512  # top-p sorts this many tokens first, and all of them only if these do not reach it
FLOAT64_MARGIN = 2**-50  # below the rounding of a float64 sum


def uniforms(seed: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """All random numbers of one completion; they do not depend on the rest of the batch.

    Args:
        seed: at least 0.
        prompt: number of the prompt in the request.
        sample: number of the completion of that prompt.
        count: how many, one for each token.
    Returns:
        [count] float64 in [0, 1).
    """
    return np.random.default_rng((seed, prompt, sample)).random(count)


def draw(
    logits: Tensor, uniform: Tensor, sampling: Sampling, *, banned: Tensor | None = None, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row, without a copy to the host (except for top-p on a CPU, where it is free).

    Args:
        logits: [R, V].
        uniform: float64 [R] in [0, 1), the random number of each row.
        sampling: temperature, truncation and penalty.
        banned: int64 [B], tokens of probability 0 (end tokens before ``min_tokens``).
        seen: bool [R, V], the tokens that the repetition penalty applies to.
    Returns:
        The tokens, int64 [R], and their log-probs under the distribution drawn from, float32 [R], nats.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1:
        logits = _penalise(logits, seen, sampling.repetition_penalty)
    if banned is not None:
        logits = logits.index_fill(1, banned, -torch.inf)
    if sampling.temperature == 0:  # the log-prob is that at temperature 1: at 0 it would always be 0
        token = logits.argmax(-1, keepdim=True)
        logp = logits.gather(1, token).squeeze(1) - logits.logsumexp(-1)
        return token.squeeze(1), logp
    if sampling.temperature != 1:
        logits = logits / sampling.temperature

    # min-p alone needs no order of the tokens: a threshold will do.
    only_min_p = sampling.top_p == 1 and not sampling.top_k
    if sampling.truncates and not only_min_p:
        candidates, tokens = _truncate(logits, sampling)
        candidates = _apply_min_p(candidates, sampling.min_p)
        choice, logp = _inverse_cdf(candidates, uniform)
        return tokens.gather(1, choice[:, None]).squeeze(1), logp
    return _inverse_cdf(_apply_min_p(logits, sampling.min_p), uniform)


def _penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely.

    Args:
        logits: [R, V].
        seen: bool [R, V].
        penalty: > 0; positive logits are divided by it, negative ones multiplied.
    Returns:
        [R, V].
    """
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def _apply_min_p(logits: Tensor, min_p: float) -> Tensor:
    """-inf for tokens with less than ``min_p`` of the most likely token's probability."""
    if not min_p:
        return logits
    threshold = logits.amax(-1, keepdim=True) + math.log(min_p)
    return logits.masked_fill(logits < threshold, -torch.inf)


def _truncate(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Apply top-k, then top-p.

    Args:
        logits: [R, V], at the temperature.
        sampling: with one of the two, at least.
    Returns:
        Logits of the candidates in falling order, [R, C], -inf outside top-p; and their tokens, [R, C].
    """
    vocab_size = logits.size(1)
    size = min(sampling.top_k or vocab_size, vocab_size)
    sorts_a_part = not sampling.top_k and not logits.is_cuda
    if sorts_a_part:  # on a CPU a full sort is slow, and reading a result back is free
        size = min(FIRST_CANDIDATES, vocab_size)
    candidates, tokens = logits.topk(size)
    if sampling.top_p == 1:
        return candidates, tokens

    # After top-k, probabilities are those among the candidates.
    log_total = (candidates if sampling.top_k else logits).logsumexp(-1, keepdim=True)
    probs = (candidates - log_total).exp()
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    if sorts_a_part and size < vocab_size and bool((cumulative[:, -1] < sampling.top_p).any()):
        candidates, tokens = logits.sort(-1, descending=True)
        probs = (candidates - log_total).exp()
        cumulative = probs.cumsum(-1, dtype=torch.float64)
    # A token stays if those before it do not reach top_p; so the first always stays.
    mass_before = cumulative - probs
    return candidates.masked_fill(mass_before >= sampling.top_p, -torch.inf), tokens


def _inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the distribution function: the token whose interval of [0, 1) holds ``uniform``, and its log-prob.

    A token of probability 0 has an empty interval and is never drawn.

    Args:
        logits: [R, V].
        uniform: float64 [R] in [0, 1).
    Returns:
        int64 [R] and float32 [R], nats.
    """
    rows, size = logits.shape
    uniform = uniform[:, None]
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest).exp_()
    if size % BLOCK:  # tokens that are added have weight 0, and are never drawn
        weights = functional.pad(weights, (0, -size % BLOCK))

    # Sums of blocks in float64 are cheap and exact enough; a float64 cumulative sum over the vocabulary is neither.
    blocks = weights.view(rows, -1, BLOCK)
    block_sums = blocks.sum(-1).double()
    block_ends = block_sums.cumsum(-1)
    total = block_ends[:, -1:]
    block = _first_above(block_ends, uniform)

    # The position inside the block is a share of it, because the block's float32 sum may differ from the sum of its
    # tokens in the last bit.
    past_block_end = uniform * total - block_ends.gather(1, block)
    share = (past_block_end / block_sums.gather(1, block) + 1).clamp_(min=0)
    chosen_block = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1)
    token_ends = chosen_block.double().cumsum(-1)
    token = (block * BLOCK + _first_above(token_ends, share)).clamp_(max=size - 1)
    logp = logits.gather(1, token) - largest - total.log()
    return token.squeeze(1), logp.squeeze(1).float()


def _first_above(ends: Tensor, share: Tensor) -> Tensor:
    """Find where a cumulative sum passes a share of its total.

    Args:
        ends: float64 [R, C], rising in each row.
        share: float64 [R, 1], of the last entry.
    Returns:
        int64 [R, 1], the index of the first entry above it.
    """
    # With a share of 1 rounding could reach the last entry, and with it entries of weight 0 at the end.
    share = share.clamp(max=1 - FLOAT64_MARGIN)
    index = torch.searchsorted(ends, share * ends[:, -1:], right=True)
    return index.clamp_(max=ends.size(1) - 1)
