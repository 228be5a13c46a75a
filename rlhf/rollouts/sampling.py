"""From logits to a token: temperature, truncation, and one uniform number a token."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlhf.rollouts.engine import Sampling

BLOCK = 256  # the vocabulary is searched in two steps: which block, then which token of it
FIRST = 512  # candidates for top-p; all are sorted only where these do not reach it


def uniforms(seed: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1): all the randomness of one completion, whatever else is sampled beside it."""
    return np.random.default_rng((seed, prompt, sample)).random(count)


def draw(
    logits: Tensor, u: Tensor, sampling: Sampling, banned: Sequence[int] = (), seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A token for each row and its log-prob, without a word to the host (top-p alone asks it, on the CPU).

    Args:
        logits: [R, V]. u: float64 [R] in [0, 1).
        banned: tokens of probability 0 (end tokens, before ``min_tokens``).
        seen: bool [R, V], the tokens that the repetition penalty is for.
    Returns:
        int64 [R] and float32 [R], nats, of the distribution that was drawn from.
    """
    z = logits.float()
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        z = torch.where(seen, torch.where(z > 0, z / penalty, z * penalty), z)
    if banned:
        z = z.index_fill(1, torch.tensor(banned, device=z.device), -torch.inf)
    if sampling.temperature == 0:
        token = z.argmax(-1)
        return token, z.gather(1, token[:, None]).squeeze(1) - z.logsumexp(-1)
    if sampling.temperature != 1:
        z = z / sampling.temperature
    if sampling.min_p and sampling.top_p == 1 and not sampling.top_k:
        z = _without_unlikely(z, sampling.min_p)
    elif sampling.truncates:
        kept, tokens = _truncate(z, sampling)
        choice, logp = _inverse_cdf(_without_unlikely(kept, sampling.min_p), u)
        return tokens.gather(1, choice[:, None]).squeeze(1), logp
    return _inverse_cdf(z, u)


def _without_unlikely(z: Tensor, min_p: float) -> Tensor:
    """-inf where a token has less than ``min_p`` of the likeliest one's probability."""
    return z.masked_fill(z < z.amax(-1, keepdim=True) + math.log(min_p), -torch.inf) if min_p else z


def _truncate(z: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Candidates in falling order, [R, C], -inf where top-p cuts them; and their tokens. Top-k comes first."""
    vocab = z.size(1)
    size = min(sampling.top_k or vocab, vocab)
    if not sampling.top_k and not z.is_cuda:  # a full sort is slow on a CPU, and asking the host is free
        size = min(FIRST, vocab)
    kept, tokens = z.topk(size)
    if sampling.top_p == 1:
        return kept, tokens
    total = (kept if sampling.top_k else z).logsumexp(-1, keepdim=True)
    p = (kept - total).exp()
    reached = p.cumsum(-1, dtype=torch.float64)
    if size < vocab and not sampling.top_k and bool((reached[:, -1] < sampling.top_p).any()):
        kept, tokens = z.sort(-1, descending=True)
        p = (kept - total).exp()
        reached = p.cumsum(-1, dtype=torch.float64)
    # A token stays if those before it fall short; the first always stays.
    return kept.masked_fill(reached - p >= sampling.top_p, -torch.inf), tokens


def _inverse_cdf(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The token in whose share of [0, 1) ``u`` lies, and its log-prob; a token of probability 0 is never it."""
    rows, size = z.shape
    top = z.amax(-1, keepdim=True)
    weights = (z - top).exp_()
    if size % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -size % BLOCK))
    blocks = weights.view(rows, -1, BLOCK)
    sums = blocks.sum(-1).double()
    ends = sums.cumsum(-1)
    total = ends[:, -1:]
    block = _search(ends, u[:, None])
    # Where u lies in its block, as a share: the block's float32 sum need not be the sum of its tokens to the last bit.
    share = ((u[:, None] * total - ends.gather(1, block)) / sums.gather(1, block) + 1).clamp_(min=0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    token = (block * BLOCK + _search(inside, share)).clamp_(max=size - 1)
    logp = z.gather(1, token) - top - total.log()
    return token.squeeze(1), logp.squeeze(1).float()


def _search(ends: Tensor, share: Tensor) -> Tensor:
    """Index of the first entry of ``ends`` [R, C] that lies above ``share`` [R, 1] of the last: [R, 1]."""
    share = share.clamp(max=1 - 2**-50)  # or rounding could reach the last, and entries that add nothing behind it
    return torch.searchsorted(ends, share * ends[:, -1:], right=True).clamp_(max=ends.size(1) - 1)
