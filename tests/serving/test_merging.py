"""``rlhf merge`` against PEFT's own merge."""

import json
import stat

import pytest
import torch
from conftest import close, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf.cli.main import main
from rlhf.models import load_model
from rlhf.serving import TOLERANCES, merging

IDS = torch.tensor([[5, 3, 90, 4, 17, 60]])
ALL = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
KINDS = {
    "LoRA": ALL,
    "DoRA": dict(ALL, use_dora=True),
    "rsLoRA": dict(ALL, use_rslora=True, lora_alpha=3),
    "saved head": dict(ALL, modules_to_save=["lm_head"]),
    "on embeddings": dict(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
}


@pytest.fixture
def base_folder(tmp_path, tokenizer):
    folder = tmp_path / "base"
    tiny_model("qwen2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def adapter_on(base_folder, folder, **config):
    adapted = randomised(get_peft_model(load_model(str(base_folder)), LoraConfig(**config)))
    adapted.save_pretrained(folder)
    return folder


def merged_logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=IDS).logits.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_folder_has_the_logits_of_pefts_merge(kind, base_folder, tmp_path):
    adapter = adapter_on(base_folder, tmp_path / "adapter", **KINDS[kind])
    assert main(["merge", str(adapter), "-o", str(tmp_path / "merged")]) == 0
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter).eval()
    close(merged_logits(tmp_path / "merged"), adapted(input_ids=IDS).logits.detach())
    if kind != "on embeddings":  # PEFT's merge would change the tied head too
        close(merged_logits(tmp_path / "merged"), adapted.merge_and_unload()(input_ids=IDS).logits.detach())


def test_an_adapter_on_an_adapter_with_more_tokens(base_folder, tmp_path, tokenizer):
    first = adapter_on(base_folder, tmp_path / "first", **ALL)
    base = load_model(str(first))
    base.resize_token_embeddings(340)
    adapted = randomised(get_peft_model(base, LoraConfig(**ALL, modules_to_save=["embed_tokens", "lm_head"])))
    adapted.peft_config["default"].base_model_name_or_path = str(first)
    adapted.save_pretrained(tmp_path / "second", save_embedding_layers=True)
    assert main(["merge", str(tmp_path / "second"), "-o", str(tmp_path / "merged")]) == 0
    close(merged_logits(tmp_path / "merged"), adapted.eval()(input_ids=IDS).logits.detach())


def test_a_base_of_four_bits_is_dequantised(base_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    four_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantised = load_model(str(base_folder), quantization_config=four_bits)
    quantised.save_pretrained(tmp_path / "quantised")
    adapted = randomised(get_peft_model(quantised, LoraConfig(**ALL)))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "quantised")
    adapted.save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    close(merged_logits(tmp_path / "merged"), adapted.eval()(input_ids=IDS).logits.detach(), torch.bfloat16)


def test_the_folder_is_a_whole_model(base_folder, tmp_path, capsys):
    adapter = adapter_on(base_folder, tmp_path / "adapter", **ALL)
    GenerationConfig(eos_token_id=7).save_pretrained(base_folder)
    out = tmp_path / "merged"
    out.mkdir()  # an empty folder will do
    assert main(["merge", str(adapter), "--output-dir", str(out), "--dtype=bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "in bfloat16, 0 MB" in printed and "(allowed: 0.05)" in printed and f"rlhf chat {out}" in printed
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    # The template's end of a turn ends an answer wherever the model is loaded.
    assert GenerationConfig.from_pretrained(out).eos_token_id == [7, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert "rlhf merge" in (out / "README.md").read_text()
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {
        stat.S_IMODE((out / "config.json").stat().st_mode)
    }
    assert not (tmp_path / ".partial").exists()


def test_a_folder_with_other_logits_is_removed(base_folder, tmp_path, monkeypatch, capsys):
    adapter = adapter_on(base_folder, tmp_path / "adapter", **ALL)
    monkeypatch.setitem(TOLERANCES, torch.float32, -1.0)
    assert main(["merge", str(adapter), "-o", str(tmp_path / "merged")]) == 2
    assert "the folder was removed" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_what_cannot_be_merged_is_told_in_one_line(base_folder, tmp_path, monkeypatch, capsys):
    adapter = adapter_on(base_folder, tmp_path / "adapter", **ALL)
    reward = adapter_on(base_folder, tmp_path / "reward", **ALL)
    config = json.loads((reward / "adapter_config.json").read_text())
    (reward / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    out = str(tmp_path / "out")
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    for words, message in [
        ([base_folder, "-o", out], "a model (Qwen2ForCausalLM), not an adapter: it needs no merge"),
        ([reward, "-o", out], "an adapter of a reward model (LORA)"),
        ([adapter, "-o", base_folder], "not empty"),
        ([adapter, "-o", base_folder / "config.json"], "is a file"),
        ([tmp_path / "gone", "-o", out], "no such model folder"),
        ([adapter, "-o", out], "needs 0.0 GB"),
    ]:
        assert main(["merge", *map(str, words)]) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1, printed
    assert not (tmp_path / "out").exists()
