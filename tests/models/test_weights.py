"""A folder with damaged files is refused in one line that names the file, and nothing is drawn at random."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from rlhf.models import load_model, load_reward_model, load_tokenizer
from rlhf.models.weights import load_whole


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def change_weights(folder, change, file="model.safetensors"):
    weights = load_file(folder / file)
    save_file(change(weights), folder / file, metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"


def test_a_missing_weight_is_refused_and_not_drawn(folder):
    change_weights(folder, lambda weights: {name.replace("layers.1.", "layers.9."): weights[name] for name in weights})
    with pytest.raises(ValueError, match=r"model: .*weights are missing: model.layers.1.* and 6 more, and it has"):
        load_model(str(folder))
    with pytest.raises(ValueError, match="weights are missing: "):
        load_reward_model(str(folder))


def test_a_trained_head_must_be_there(folder):
    load_reward_model(str(folder)).model.save_pretrained(folder)  # a base gets a head of zeros
    change_weights(folder, lambda weights: {name: weights[name] for name in weights if name != "score.weight"})
    with pytest.raises(ValueError, match=r"weights are missing: score.weight;"):
        load_reward_model(str(folder))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad, folder):
    change_weights(folder, lambda weights: {**weights, NORM: weights[NORM].fill_(bad)})
    with pytest.raises(ValueError, match=f"its weight {NORM} holds (NaN|infinity)"):
        load_model(str(folder))


def test_integers_are_no_weights(folder):
    change_weights(folder, lambda weights: {**weights, NORM: weights[NORM].to(torch.int32)})
    with pytest.raises(ValueError, match=f"model.safetensors: {NORM} is of type I32, expected a float"):
        load_model(str(folder))


def test_large_weights_of_half_precision_are_finite(folder):
    change_weights(folder, lambda weights: {name: torch.full_like(weights[name], 6e4).half() for name in weights})
    assert load_model(str(folder), dtype="float16").dtype == torch.float16


@pytest.fixture
def adapter(model_folder, tmp_path):
    adapted = get_peft_model(load_model(str(model_folder)), LoraConfig(task_type="CAUSAL_LM", r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_whole_and_finite(adapter):
    file = "adapter_model.safetensors"
    whole = load_file(adapter / file)
    change_weights(adapter, lambda weights: {name: weights[name].fill_(torch.nan) for name in weights}, file)
    with pytest.raises(ValueError, match=r"adapter: .*its weight .*lora_A.* holds NaN"):
        load_model(str(adapter))
    save_file({name: whole[name] for name in list(whole)[1:]}, adapter / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"adapter: .*weights are missing: .*lora_"):
        load_model(str(adapter))
    integers = {name: weight.to(torch.int32) for name, weight in whole.items()}
    save_file(integers, adapter / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"adapter: .*lora_.* is of type I32, expected a float"):
        load_model(str(adapter))


FILES = {
    "special_tokens_map.json": ('{"a": NaN}', r"special_tokens_map.json: not valid JSON \(it holds NaN\)"),
    "config.json": ("[]", "config.json: expected a JSON object, got a list"),
    "generation_config.json": ("{", "generation_config.json: not valid JSON"),
    "tokenizer_config.json": ("[" * 9000, "tokenizer_config.json: not valid JSON"),
    "tokenizer.json": ("null", "tokenizer.json: expected a JSON object, got a NoneType"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_broken_file_is_named(file, folder):
    text, said = FILES[file]
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=said):
        load_tokenizer(str(folder))


def test_values_that_the_libraries_refuse(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": [1]}))
    with pytest.raises(ValueError, match="model: its tokenizer cannot be loaded"):
        load_tokenizer(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": {}}))
    with pytest.raises(ValueError, match=r"cannot be loaded as a causal LM \(.*vocab_size"):
        load_model(str(folder))


def test_weights_of_a_new_head_may_be_missing(model_folder):
    from transformers import AutoModelForSequenceClassification

    assert load_whole(AutoModelForSequenceClassification, str(model_folder), new_head="score", num_labels=1).score
