"""The model's options: the adapter, and fewer bits."""

import json

import pytest

from rlhf.cli.arguments import ModelArguments
from rlhf.cli.parsing import parse


def given(*argv):
    return parse("sft", (ModelArguments,), list(argv))[0]


@pytest.mark.parametrize(
    "words, targets",
    [
        (["all-linear"], "all-linear"),
        (["q_proj,v_proj"], {"q_proj", "v_proj"}),
        (["q_proj,", "v_proj"], {"q_proj", "v_proj"}),
        (["q_proj"], {"q_proj"}),
        ([r".*layers\.[01]\..*q_proj"], r".*layers\.[01]\..*q_proj"),
    ],
)
def test_targets(words, targets):
    """A word, names with blanks or commas, a pattern (huggingface/trl#1488, #3255)."""
    assert given("--use_peft", "--lora_target_modules", *words).peft_config().target_modules == targets


def test_a_file_says_the_same(tmp_path):
    file = tmp_path / "c.yaml"
    for value, targets in (("all-linear", "all-linear"), ("[q_proj, v_proj]", {"q_proj", "v_proj"})):
        file.write_text(f"use_peft: true\nlora_target_modules: {value}\n")
        assert given("--config", str(file)).peft_config().target_modules == targets


def test_every_option_of_the_adapter_arrives():
    config = given(
        "--use_peft", "--use_dora", "--use_rslora", "--lora_r", "3", "--lora_alpha", "5", "--lora_dropout", "0.1",
        "--lora_modules_to_save", "lm_head", "--lora_target_parameters", "experts.down_proj",
    ).peft_config()  # fmt: skip
    assert (config.use_dora, config.use_rslora, config.r, config.lora_alpha, config.lora_dropout) == (
        True, True, 3, 5, 0.1
    )  # fmt: skip
    assert config.modules_to_save == ["lm_head"] and config.target_parameters == ["experts.down_proj"]


def test_a_revision_is_kept_in_the_adapters_config():
    assert given("--use_peft", "--model_revision", "v2").peft_config().revision == "v2"
    assert given("--use_peft").peft_config().revision is None


@pytest.mark.parametrize("option", [["--lora_r", "8"], ["--use_dora"], ["--lora_target_modules", "q_proj"]])
def test_an_option_of_an_adapter_needs_one(option):
    with pytest.raises(ValueError, match=f"{option[0]} is of an adapter: add --use_peft"):
        given(*option)


def test_bits():
    with pytest.raises(ValueError, match="exclude each other"):
        given("--load_in_4bit", "--load_in_8bit")
    config = given("--load_in_4bit", "--bnb_4bit_quant_type", "fp4", "--dtype", "bfloat16").load_kwargs()
    config = config["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "fp4" and config["bnb_4bit_compute_dtype"] == "bfloat16"
    assert json.dumps(config)  # goes into the saved arguments
    assert "quantization_config" not in given().load_kwargs()
