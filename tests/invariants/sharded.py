"""Called by sharded_training.py: whole and sharded (FSDP2) models must give the same scores and gradients."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from conftest import close, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlhf.data import Collator
from rlhf.distillation.matching import MatchingPolicy, MatchingWeights
from rlhf.distillation.objectives import TeacherObjective
from rlhf.logprobs import Divergence
from rlhf.models import Policy, RewardModel, add_scalar_head


def compare() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9]},
        {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]},
    ]
    batch = Collator(0)(rows)
    for name in ("llama", "qwen2", "gemma2"):  # a separate head, a tied one, a capped one
        whole, sharded = Policy(tiny_model(name)), Policy(tiny_model(name))
        for layer in sharded.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        logps = [policy(batch).logps for policy in (whole, sharded)]
        close(logps[1].detach(), logps[0].detach())
        for scores in logps:
            scores.sum().backward()
        for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
            close(other.grad.full_tensor(), one.grad)
        with torch.no_grad():
            close(sharded(batch).logps, logps[0].detach())
    whole, sharded = (RewardModel(add_scalar_head(tiny_model())) for _ in range(2))
    for model in (whole, sharded):
        torch.nn.init.ones_(model.model.score.weight)
    for layer in sharded.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    rewards = [model(batch) for model in (whole, sharded)]
    close(rewards[1].detach(), rewards[0].detach())
    for values in rewards:
        values.pow(2).sum().backward()
    for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
        close(other.grad.full_tensor(), one.grad)
    teacher = Policy(tiny_model("qwen2", seed=1, num_hidden_layers=3)).requires_grad_(False)
    whole, sharded = (MatchingPolicy(tiny_model(hidden_size=16)) for _ in range(2))
    for model in (whole, sharded):
        model.match(teacher.model, MatchingWeights(hidden_states=1.0), seed=0)
    for layer in sharded.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert len(whole.projections) == 2
    losses = [
        model(batch, TeacherObjective(lambda student: nullcontext(teacher), Divergence())).loss
        for model in (whole, sharded)
    ]
    close(losses[1].detach(), losses[0].detach())
    for loss in losses:
        loss.backward()
    for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
        close(other.grad.full_tensor(), one.grad)
