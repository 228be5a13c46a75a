"""Called by sharded_training.py: two processes that share each batch must give the scores and gradients of one."""

import torch
import torch.distributed as dist
from conftest import close, tiny_model
from torch import nn

from rlhf.data import Batch, Collator
from rlhf.logprobs import Scores, TokenLoss
from rlhf.models import Policy, balancing_of, routing, use_segments
from rlhf.models.context_parallel import ContextParallel

TEXTS = [
    {"input_ids": [5, 6, 7, 8, 9, 3, 2, 11, 4], "labels": [-100, 6, 7, 8, 9, 3, -100, 11, 4]},
    {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]},
    {"input_ids": [7, 2, 5, 9, 9], "labels": [-100, 2, 5, 9, 9]},
]
PAIRS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 3, 2], "rejected_ids": [11, 4, 7, 7, 2]},
    {"prompt_ids": [9], "chosen_ids": [3, 2, 8], "rejected_ids": [4]},
]
MODELS = {
    "llama": {},
    "qwen2": {},  # a tied head
    "gemma2": dict(sliding_window=3, attn_logit_softcapping=2.0),
    "mixtral": {},
}


def token_loss(batch: Batch, scores: Scores) -> torch.Tensor:
    """Of pairs: any function that couples the tokens of a batch."""
    sums = batch.targets.sum(scores.logps)
    return (sums[0::2] - sums[1::2]).tanh().sum() - scores.entropy.sum()


def gradients(policy: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    """Averaged over processes, as trainers average them."""
    found = torch.autograd.grad(loss, list(policy.parameters()))
    for gradient in found:
        dist.all_reduce(gradient)
    return [gradient / dist.get_world_size() for gradient in found]


def compare_context_parallel() -> None:
    group = dist.group.WORLD
    collate = Collator(0, layout="segments")
    for name, changes in MODELS.items():
        model = tiny_model(name, **changes)
        assert use_segments(model) is None, name
        whole, shared = Policy(model), Policy(model)
        shared.context_parallel = ContextParallel(group)
        for policy in (whole, shared):
            policy.balancing = balancing_of(model, 0.1 if name == "mixtral" else None)
        # A single token is fewer than the processes have pieces.
        for rows in (TEXTS, TEXTS[1:2]):
            batch = collate(rows)
            losses = [policy(batch, TokenLoss(lambda scores: -scores.logps)) for policy in (whole, shared)]
            close(losses[1].loss.detach(), losses[0].loss.detach())
            close(losses[1].logps, losses[0].logps)
            for got, want in zip(gradients(whole, losses[1].loss), gradients(whole, losses[0].loss), strict=True):
                close(got, want)
        batch = collate(PAIRS)
        scores = [policy(batch, entropy=True) for policy in (whole, shared)]
        close(scores[1].logps.detach(), scores[0].logps.detach())
        values = [token_loss(batch, result) for result in scores]
        if name == "mixtral":
            parts = [routing(result.router_logits, batch, top_k=2).loss() for result in scores]
            values = [value + part for value, part in zip(values, parts, strict=True)]
        close(values[1].detach(), values[0].detach())
        for got, want in zip(gradients(whole, values[1]), gradients(whole, values[0]), strict=True):
            close(got, want)
