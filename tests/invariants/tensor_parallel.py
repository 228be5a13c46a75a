"""Run by test_sharded.py under torchrun: a model that transformers divides by layers gives the scores of the whole."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from conftest import close, small_tokenizer, tiny_model
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from rlhf import SFTTrainer
from rlhf.data import Collator
from rlhf.logprobs import TokenLoss
from rlhf.models import Policy

ROWS = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9]}]


def compare_tensor_parallel() -> None:
    """Scores and gradients under ``tp_plan``; and a trainer that refuses such a model."""
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    if dist.get_rank() == 0:
        tiny_model().save_pretrained(folders[0])
    dist.barrier()
    divided = AutoModelForCausalLM.from_pretrained(
        folders[0], distributed_config=DistributedConfig(tp_size=dist.get_world_size())
    )
    batch = Collator(0)(ROWS)
    policies = [Policy(tiny_model()), Policy(divided)]
    losses = []
    for policy in policies:
        loss = policy(batch, TokenLoss(lambda scores: -scores.logps)).loss
        loss.backward()
        losses.append(loss.detach())
    close(losses[1], losses[0])
    for whole, part in zip(*(policy.parameters() for policy in policies), strict=True):
        gradient = part.grad.full_tensor() if hasattr(part.grad, "full_tensor") else part.grad
        torch.testing.assert_close(gradient, whole.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="trainers do not support tensor parallelism"):
        SFTTrainer(divided, train_dataset=[], processing_class=small_tokenizer())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    compare_tensor_parallel()
    dist.destroy_process_group()
