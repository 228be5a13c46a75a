"""The weights that another process is sent: names and values of a checkpoint, whatever the model and its adapter."""

import pytest
import torch
from conftest import close, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from rlhf.rollouts.policy_weights import merged_weights, unties_head, whole_model_reason

EXPERTS = dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])


def adapted(model, **changes):
    """A model with an adapter that does something."""
    adapter = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **changes})
    peft_model = get_peft_model(model, adapter)
    torch.manual_seed(1)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft_model


def checkpoint_of(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_each_expert_has_the_name_of_its_file(name, tmp_path):
    model = tiny_model(name)
    sent, saved = merged_weights(model, model.state_dict()), checkpoint_of(model, tmp_path)
    assert sent.keys() == saved.keys()
    for key, weight in saved.items():
        assert torch.equal(sent[key], weight), key


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3_moe", EXPERTS),
        ("qwen2", dict(lora_bias=True)),  # its q_proj has a bias
        ("llama", dict(use_rslora=True, target_modules=["q_proj", "lm_head"], modules_to_save=["norm"])),
    ],
)
def test_a_merged_adapter_is_what_peft_merges(name, options, tmp_path):
    model = adapted(tiny_model(name, tie_word_embeddings=False), **options)
    sent = merged_weights(model, model.state_dict())
    saved = checkpoint_of(model.merge_and_unload(), tmp_path)
    assert sent.keys() == saved.keys()
    for key, weight in saved.items():
        close(sent[key], weight)


def test_wrappers_of_activation_checkpointing_are_no_part_of_a_name():
    model = adapted(tiny_model())
    want = merged_weights(model, model.state_dict())
    layers = model.get_base_model().model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    sent = merged_weights(model, model.state_dict())
    assert sent.keys() == want.keys() and all(torch.equal(sent[key], want[key]) for key in want)


def test_a_process_without_the_state_takes_part():
    assert merged_weights(adapted(tiny_model()), {}) == {}


def test_a_bias_that_the_model_lacks_is_refused():
    model = adapted(tiny_model(), lora_bias=True)
    assert whole_model_reason(model) == "has biases"
    with pytest.raises(ValueError, match="q_proj: the adapter changes its bias, and the model under it has none"):
        merged_weights(model, model.state_dict())


@pytest.mark.parametrize("packed", [torch.zeros(512, 1, dtype=torch.uint8), torch.zeros(32, 32, dtype=torch.int8)])
def test_quantised_weights_are_refused(packed):
    model = adapted(tiny_model())
    state = model.state_dict()
    # As bitsandbytes keeps them: two numbers in a byte, or one.
    state["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"] = packed
    with pytest.raises(ValueError, match=r"q_proj: its weights are quantised, .* start vLLM with --enable-lora"):
        merged_weights(model, state)


@pytest.mark.parametrize(
    ("options", "is_untied"),
    [
        (dict(), False),
        (dict(target_modules=["q_proj", "lm_head"]), True),
        (dict(modules_to_save=["embed_tokens"]), True),
        (dict(modules_to_save=["embed_tokens", "lm_head"]), True),
        (dict(modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True), False),
    ],
)
def test_a_head_that_is_no_longer_the_embedding(options, is_untied):
    assert unties_head(adapted(tiny_model(tie_word_embeddings=True), **options)) == is_untied
    assert not unties_head(adapted(tiny_model(tie_word_embeddings=False), **options))
