"""Adapters on weights of 4 and 8 bits (QLoRA).

Reported: hiyouga/LLaMA-Factory#1160, huggingface/trl#402, unslothai/unsloth#1110.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM

from rlhf.cli.main import main
from rlhf.models import load_model
from rlhf.trainers.sharding import check_packed_weights, leave_out_scales

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("model")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(path)  # a block of 4 bits is 64 wide
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def run(tmp_path, folder, data_files):
    def run(command, model=folder, out=tmp_path / "run", **options):
        rows = data_files / ("preferences.jsonl" if command in ("dpo", "reward") else "sft.jsonl")
        options = dict(
            model_name_or_path=model, dataset_name=rows, output_dir=out, max_steps=2, learning_rate=0.01, use_cpu=True,
            logging_steps=1, report_to="none", disable_tqdm=True, use_peft=True, load_in_4bit=True,
        ) | options  # fmt: skip
        argv = [command]
        for name, value in options.items():
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return main(argv)

    return run


OWN = {
    "sft": {},
    "dpo": {},
    "reward": {},
    "distill": {},
    "grpo": dict(reward_funcs="length_reward(target=5)", max_completion_length=4, max_length=64, beta=0.1),
}


@pytest.mark.parametrize("command, bits", [*((command, 4) for command in OWN), ("dpo", 8)])
def test_it_trains_on_few_bits(command, bits, run, tmp_path, capsys):
    assert run(command, **OWN[command], load_in_4bit=bits == 4, load_in_8bit=bits == 8) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    if command == "dpo":
        assert "loss 0.693" in said.out
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_second_stage(run, tmp_path, folder):
    """The first adapter is merged into the few bits, which are saved, as whole weights, beside the second."""
    assert run("sft", out=tmp_path / "first", max_steps=4, bnb_4bit_quant_type="nf4", use_bnb_nested_quant=True) == 0
    assert run("dpo", model=tmp_path / "first", out=tmp_path / "second") == 0
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours = load_model(str(tmp_path / "second"))(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "second")(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_few_bits_alone_are_refused(run, capsys):
    assert run("sft", use_peft=False) == 2
    assert "rlhf sft: --load_in_4bit: weights of 4 bits are not trained, add --use_peft" in capsys.readouterr().err


def test_a_missing_package_is_named(run, capsys, monkeypatch):
    import transformers.quantizers.quantizer_bnb_4bit as quantizer

    monkeypatch.setattr(quantizer, "is_bitsandbytes_available", lambda: False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert run("sft") == 2
    assert "4 and 8 bits need bitsandbytes: install the extra `quant`" in capsys.readouterr().err


def test_fsdp2_can_gather_weights_of_4_bits(folder):
    """In a float type they are sharded: their bits are no numbers, and may read as NaN. FSDP-QLoRA needs that type."""
    few_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "float32"}
    model = load_model(str(folder), quantization_config=few_bits)
    assert any(name.endswith("weight.absmax") for name in model.state_dict())
    leave_out_scales(model, SimpleNamespace(is_fsdp2=True))
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("few_bits", "bf16", "message"),
    [
        (dict(load_in_4bit=True), True, None),  # whole numbers: not sharded, and not rounded
        (dict(load_in_4bit=True, bnb_4bit_quant_storage="float32"), False, None),
        (dict(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"), True, None),
        (dict(load_in_4bit=True, bnb_4bit_quant_storage=torch.float32), True, "pass --bnb_4bit_quant_storage bfloat16"),
        (dict(load_in_8bit=True), True, "weights of 8 bits do not go with FSDP2"),
    ],
)
def test_few_bits_that_fsdp2_would_change_are_refused(few_bits, bf16, message):
    args = SimpleNamespace(fsdp="full_shard", bf16=bf16, fp16=False)
    if message is None:
        return check_packed_weights(few_bits, args)
    with pytest.raises(ValueError, match=message):
        check_packed_weights(few_bits, args)
    args.fsdp = ""
    check_packed_weights(few_bits, args)
