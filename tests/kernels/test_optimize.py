"""The switch over the faster modules: off leaves a model alone, on moves no result."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import close, tiny_model
from peft import LoraConfig, get_peft_model

from rlhf import SFTConfig, SFTTrainer
from rlhf.data import Collator
from rlhf.kernels import optimize

ROWS = [{"input_ids": [5, 3, 4, 9, 6, 7], "labels": [-100, -100, 4, 9, 6, 7]}]


def replaced(model):
    return [type(module).__name__ for module in model.modules() if "forward" in vars(module)]


@pytest.fixture
def make(tmp_path, tokenizer, sft_rows):
    def make(model, **options):
        args = SFTConfig(str(tmp_path / "run"), max_steps=2, report_to="none", use_cpu=True, **options)
        return SFTTrainer(model, args, train_dataset=sft_rows, processing_class=tokenizer)

    return make


def test_off_leaves_every_forward_as_it_was(make):
    model = tiny_model()
    make(model, optimize_model=False).train()
    assert replaced(model) == []


def test_a_trainer_optimizes_by_default(make):
    model = tiny_model()
    make(model)
    assert "LlamaRMSNorm" in replaced(model) and "LlamaMLP" in replaced(model)


@pytest.mark.parametrize("peft", [False, True])
def test_losses_and_gradients_agree(peft, make):
    plain = tiny_model()
    if peft:
        plain = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    faster = copy.deepcopy(plain)
    batch = Collator()(ROWS)
    trainers = [make(plain, optimize_model=False), make(faster)]
    losses = [trainer.compute_loss(trainer.model, batch) for trainer in trainers]
    assert replaced(plain) == [] and replaced(faster) != []
    close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    want = {name: weight.grad for name, weight in plain.named_parameters() if weight.grad is not None}
    assert want
    for name, weight in faster.named_parameters():
        if name in want:
            close(weight.grad, want[name])


def test_twice_is_as_once():
    model = tiny_model()
    ids = torch.arange(1, 9)[None]
    optimize(model)
    once = model(input_ids=ids).logits
    optimize(model)
    assert torch.equal(model(input_ids=ids).logits, once)


def test_a_forward_that_somebody_else_replaced_stays():
    """accelerate's ``device_map`` moves the inputs of a module in it, hub kernels compute in it."""
    model, calls = tiny_model(), []
    layer = model.model.layers[0]
    hooked = [model.model.norm, layer.mlp, layer.self_attn.q_proj, model.lm_head]

    class Noting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    for module in hooked:
        add_hook_to_module(module, Noting())
    optimize(model)
    model(input_ids=torch.arange(1, 9)[None])
    assert {id(module) for module in calls} == {id(module) for module in hooked}
