"""Parameters that no text reaches, and what a run of several processes does with them."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from torch import nn
from world.families import tiny_family

from rlhf.models import Policy, RewardModel, add_scalar_head
from rlhf.models.unreached import unreached_parameters, unreached_parts
from rlhf.trainers.unused_parameters import settle_unused_parameters


def run_of(processes):
    """What is read of an accelerator."""
    state = SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=None)
    handler = SimpleNamespace(find_unused_parameters=False)
    return SimpleNamespace(state=state, ddp_handler=handler, num_processes=processes, is_main_process=True)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_text_reaches_all_parameters_of_a_language_model(name):
    assert unreached_parameters(Policy(tiny_model(name))) == []


def test_text_reaches_all_parameters_of_a_reward_model():
    assert unreached_parameters(RewardModel(add_scalar_head(tiny_model()))) == []


def test_a_vision_tower_is_frozen_under_ddp(caplog):
    policy = Policy(tiny_family("gemma3"))
    names = unreached_parameters(policy)
    assert set(unreached_parts(policy.model, names)) == {"model.vision_tower", "model.multi_modal_projector"}
    settle_unused_parameters(policy, run_of(1), is_decided=False)
    assert all(parameter.requires_grad for parameter in policy.parameters())
    run = run_of(2)
    settle_unused_parameters(policy, run, is_decided=False)
    frozen = [name for name, parameter in policy.model.named_parameters() if not parameter.requires_grad]
    assert frozen == names
    assert not run.ddp_handler.find_unused_parameters
    assert [record.getMessage() for record in caplog.records if "frozen" in record.getMessage()] == [
        "frozen, because text never reaches them: model.vision_tower, model.multi_modal_projector"
    ]


class ChosenExpert(nn.Module):
    """A layer of two experts, of which every token of the trial chooses the first."""

    def __init__(self, size):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(2))

    def forward(self, hidden):
        return self.experts[0](hidden)


@pytest.mark.parametrize("is_decided", [False, True])
def test_ddp_looks_for_experts_that_were_not_chosen(is_decided, caplog):
    model = tiny_model()
    model.model.layers[1].mlp = ChosenExpert(32)
    policy, run = Policy(model), run_of(2)
    assert unreached_parameters(policy) == [f"model.layers.1.mlp.experts.1.{part}" for part in ("weight", "bias")]
    settle_unused_parameters(policy, run, is_decided)
    assert run.ddp_handler.find_unused_parameters is not is_decided
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert ("missed model.layers.1.mlp.experts.1.weight and 1 more" in caplog.text) is not is_decided


def test_the_trial_leaves_no_gradient_and_no_random_number_behind():
    policy = Policy(tiny_model()).train()
    before = torch.random.get_rng_state()
    unreached_parameters(policy)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert policy.training and all(parameter.grad is None for parameter in policy.parameters())
