"""KL to the reference, token by token, for preference losses that read its sums over sequences (TDPO)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.logprobs import ChunkResult, Comparison, HeadObjective, Predictions, Scores, Step
from rlhf.logprobs.chunk_scores import ChunkPredictions, dot
from rlhf.logprobs.chunks import ChunkedHead


@dataclass(frozen=True)
class WeightedKL(HeadObjective):
    r"""A weighted sum of log-probs and of KLs from the reference.

    .. math:: \sum_t a_t\log\pi(y_t) + b_t\,\mathrm{KL}(\pi_{ref}\,\|\,\pi)_t

    With the derivatives of a loss as weights, it has the gradient of that loss, whatever it makes of the sums over
    sequences. With weights of 0 it is a way to the numbers that those derivatives are taken at.

    Args:
        reference: predictions of the same tokens; constants.
        logp_weight: [N], a.
        kl_weight: [N], b.
    """

    reference: Predictions
    logp_weight: Tensor
    kl_weight: Tensor

    def logits_per_token(self, vocabulary: int) -> int:
        return 2 * vocabulary  # logits of two models live at a time

    def begin(self, token: Tensor, chunk_size: int, with_grad: bool, entropy: bool) -> Step:
        reference = ChunkedHead(self.reference, chunk_size)

        def step(chunk: slice, predictions: ChunkPredictions) -> ChunkResult:
            log_q = predictions.log_probs()
            log_p = reference.log_probs(chunk)[0].to(log_q.dtype)
            labels = token[chunk, None]
            logps, ref_logps = log_q.gather(1, labels), log_p.gather(1, labels)
            probs = log_p.exp()
            kl = dot(probs, log_p - log_q)
            logp_weight, kl_weight = self.logp_weight[chunk, None], self.kl_weight[chunk, None]
            loss = (logp_weight * logps).sum() + (kl_weight.squeeze(1) * kl).sum()
            # With respect to the logits: a (1_y - q) + b (q - p). At the label 1 - q is -expm1(log q), which is exact
            # for confident tokens.
            at_label = kl_weight * (logps.exp() - ref_logps.exp()) - logp_weight * logps.expm1()
            gradient = log_q.exp_().mul_(kl_weight - logp_weight).sub_(probs.mul_(kl_weight))
            gradient.scatter_(1, labels, at_label)
            return ChunkResult(torch.stack([logps.squeeze(1), ref_logps.squeeze(1), kl]), loss, gradient)

        return step

    def scores(self, per_token: Tensor, loss: Tensor) -> Scores:
        logps, ref_logps, kl = per_token.unbind()
        return Scores(logps, loss=loss, teacher=Comparison(kl, kl=kl, logps=ref_logps))
