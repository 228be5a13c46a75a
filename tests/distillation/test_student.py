"""Students: the teacher itself where every layer is kept, its layers bit for bit where some are."""

import itertools
import json

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf.cli.main import main
from rlhf.distillation import copy_layers, matched_layers, spread_layers
from rlhf.distillation.student import layer_list

DEEP = 6
IDS = torch.tensor([[5, 3, 9, 200, 17, 4, 8, 1]])


def teacher(name, **changes):
    depth = {"n_layer": DEEP} if name == "gpt2" else {"num_hidden_layers": DEEP}
    # A window that the eight tokens overrun: a layer of the wrong kind of attention would show.
    return tiny_model(name, **depth, **({"sliding_window": 3} if name == "gemma2" else {}), **changes).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_layers_are_spread_evenly():
    assert spread_layers(30, 12) == [0, 3, 5, 8, 11, 13, 16, 18, 21, 24, 26, 29]
    assert spread_layers(7, 7) == list(range(7)) and spread_layers(9, 1) == [0] and spread_layers(9, 2) == [0, 8]
    for total in range(1, 40):
        for count in range(1, total + 1):
            found = spread_layers(total, count)
            gaps = {b - a for a, b in itertools.pairwise(found)}
            assert len(found) == count and found[0] == 0 and max(gaps, default=1) - min(gaps, default=1) <= 1
            assert count == 1 or found[-1] == total - 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_layers_are_the_teacher(name):
    original = teacher(name)
    assert torch.equal(logits(copy_layers(original, range(DEEP))), logits(original))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kept_layers_are_the_teachers_bit_for_bit_and_in_order(name):
    original, kept = teacher(name), [0, 2, 5]
    copied = copy_layers(original, kept)
    ours, theirs = layer_list(copied)[1], layer_list(original)[1]
    assert len(ours) == 3
    for layer, number in zip(ours, kept, strict=True):
        same = theirs[number].state_dict()
        assert layer.state_dict().keys() == same.keys()
        assert all(torch.equal(value, same[key]) for key, value in layer.state_dict().items())
    # The teacher with the other layers skipped is an independent way to the same model.
    layers = layer_list(original)[1]
    for number in set(range(DEEP)) - set(kept):
        layers[number].forward = lambda hidden, *_, **__: hidden
    assert torch.equal(logits(copied), logits(original))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_student_loads_and_generates_with_its_cache(name, tmp_path):
    copied = copy_layers(teacher(name), [1, 3, 4])
    copied.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(copied))
    config = loaded.config
    assert config.num_hidden_layers == 3 and config.copied_layers == {"kept": [1, 3, 4], "of": DEEP}
    assert [getattr(m, "layer_idx", i) for i, m in enumerate(attentions(loaded))] == [0, 1, 2]
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    with_cache, without = (loaded.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)


def attentions(model):
    return [next(m for m in layer.modules() if hasattr(m, "layer_idx")) for layer in layer_list(model)[1]]


def test_kinds_of_layers_go_along():
    original = teacher("gemma2")
    kinds = original.config.layer_types
    assert copy_layers(original, [0, 2, 4]).config.layer_types == [kinds[0]] * 3 != [kinds[0], kinds[1], kinds[0]]
    dense = teacher("qwen3")
    assert copy_layers(dense, [0, 3]).config.layer_types == [dense.config.layer_types[i] for i in (0, 3)]


def test_numbers_of_layers_are_counted_anew():
    sparse = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0, 3])
    original = teacher("llama", model_type="qwen3_moe", head_dim=8, **sparse)
    copied = copy_layers(original, [0, 1, 3])
    assert copied.config.mlp_only_layers == [0, 2]
    assert torch.equal(logits(copy_layers(original, range(DEEP))), logits(original))


def test_layers_that_depend_on_their_place_are_refused():
    original = teacher("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match=r"layer 2 would not be the same as layer 1 \(attn.scaling is"):
        copy_layers(original, [0, 2])
    assert len(layer_list(copy_layers(original, [0, 1]))[1]) == 2


def test_the_teacher_is_left_alone():
    original = teacher("llama")
    before, weights = logits(original), {k: v.clone() for k, v in original.state_dict().items()}
    copied = copy_layers(original, [0, 5])
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert torch.equal(logits(original), before) and original.config.num_hidden_layers == DEEP
    assert all(torch.equal(v, weights[k]) for k, v in original.state_dict().items())


def test_half_precision_stays():
    original = teacher("llama").bfloat16()
    copied = copy_layers(original, [0, 5])
    assert copied.dtype == torch.bfloat16
    assert torch.equal(copied.lm_head.weight, original.lm_head.weight)


def test_matching_follows_the_copy():
    original = teacher("llama")
    copied = copy_layers(original, [0, 1, 5])
    assert matched_layers(copied.config, original.config) == [0, 1, 5]
    assert matched_layers(copied.config, tiny_model(num_hidden_layers=12).config) == [0, 6, 11]  # of another teacher
    assert matched_layers(tiny_model(num_hidden_layers=3).config, original.config) == [0, 3, 5]
    with pytest.raises(ValueError, match="layers must be between 1 and 3"):
        matched_layers(original.config, copied.config)


@pytest.mark.parametrize("kept", [[], [0, 6], [-1, 2], [2, 1], [1, 1]])
def test_layers_that_are_not_there(kept):
    with pytest.raises(ValueError, match="increasing layer numbers from 0 to 5; got"):
        copy_layers(teacher("llama"), kept)


def test_a_model_without_one_list_of_layers():
    model = teacher("llama")
    model.twin = nn.ModuleList(nn.Identity() for _ in range(DEEP))
    with pytest.raises(ValueError, match=r"not one list of 6 modules \(found model.layers, twin\)"):
        layer_list(model)
    model.config.num_hidden_layers = 4
    with pytest.raises(ValueError, match=r"not one list of 4 modules \(found none\)"):
        layer_list(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("teacher")
    model = teacher("llama")
    model.generation_config.update(do_sample=True, top_k=7)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make(folder, out, *argv):
    return main(["student", "--from", str(folder), "--output_dir", str(out), *map(str, argv)])


def test_the_command_copies(folder, tmp_path, capsys, tokenizer):
    assert make(folder, tmp_path / "s", "--layers", 3) == 0
    printed = capsys.readouterr().out
    assert "copied layers 0, 3, 5" in printed and f"saved {tmp_path / 's'}" in printed.replace("\n", "")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    assert student.config.num_hidden_layers == 3 and student.generation_config.top_k == 7
    loaded = AutoTokenizer.from_pretrained(tmp_path / "s")
    assert loaded.chat_template == tokenizer.chat_template and loaded("the cat") == tokenizer("the cat")
    assert make(folder, tmp_path / "k", "--keep", "0,4") == 0
    assert AutoConfig.from_pretrained(tmp_path / "k").copied_layers == {"kept": [0, 4], "of": DEEP}


def test_the_command_draws_from_a_configuration(folder, tmp_path):
    config = tiny_model("qwen2", num_hidden_layers=1, eos_token_id=7).config
    config.save_pretrained(tmp_path / "c")
    for name in ("a", "b"):
        assert make(folder, tmp_path / name, "--config", tmp_path / "c", "--seed", 3) == 0
    assert make(folder, tmp_path / "file", "--config", tmp_path / "c" / "config.json") == 0
    a, b, other = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("a", "b", "file"))
    assert a.config.model_type == "qwen2" and a.config.eos_token_id == 0  # as the teacher's tokenizer ends
    assert torch.equal(logits(a), logits(b)) and not torch.equal(logits(a), logits(other))


BAD = {
    "more layers": (["--layers", "7"], "layers must be between 1 and 6, as many as the teacher has; got 7"),
    "no layers": (["--layers", "0"], "layers must be between 1 and 6"),
    "no number": (["--keep", "0,x"], "'0,x' is no list of layer numbers"),
    "a layer that is not there": (["--keep", "0,9"], "increasing layer numbers from 0 to 5; got [0, 9]"),
    "nothing said": ([], "one of the arguments --layers --keep --config is required"),
    "both": (["--layers", "2", "--keep", "0"], "not allowed with argument"),
    "no configuration": (["--config", "./none"], "./none"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, folder, tmp_path, capsys):
    argv, said = BAD[case]
    assert make(folder, tmp_path / "out", *argv) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("rlhf student: ")]
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_and_a_small_vocabulary(folder, tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    assert make(folder, tmp_path, "--layers", 2) == 2
    assert "not empty; choose another --output_dir" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]
    assert make(folder, tmp_path / "notes", "--layers", 2) == 2
    assert "output_dir is a file" in capsys.readouterr().err
    config = {**tiny_model().config.to_dict(), "vocab_size": 100}
    (tmp_path / "small.json").write_text(json.dumps(config))
    assert make(folder, tmp_path / "out", "--config", tmp_path / "small.json") == 2
    assert "has a vocabulary of 100, the teacher's tokenizer 330 tokens" in capsys.readouterr().err
