"""``rlhf export``: a Modelfile, the command of vLLM, and llama.cpp's converter, which is a stand-in here."""

import json
import shlex

import pytest
from conftest import tiny_model
from kinds import FAMILIES, KINDS
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from rlhf.cli.main import main
from rlhf.data import Dialogue
from rlhf.data.templates import ChatTemplate
from rlhf.models import load_model
from rlhf.serving.model_folder import served_model
from rlhf.serving.ollama import modelfile, template_pieces
from rlhf.serving.vllm import vllm_command

CHAT = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c\nd"), ("assistant", "e"), ("user", "f")]


@pytest.fixture
def folder(tmp_path, tokenizer):
    folder = tmp_path / "My model"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter_on(base, folder, **config):
    config = {"r": 12, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | config
    get_peft_model(load_model(str(base)), LoraConfig(**config)).save_pretrained(folder)
    return folder


def go_rendered(template, messages):
    """What Go makes of the few words that a Modelfile uses here."""
    body = {"system": "", "user": "", "assistant": ""}
    first, _, loop = template.partition("{{ range .Messages }}")
    with_system, _, without = first.removeprefix("{{ if .System }}").partition("{{ else }}")
    asked, _, answered = loop.partition('{{ else if eq .Role "assistant" }}')
    body["user"] = asked.removeprefix('{{ if eq .Role "user" }}')
    body["assistant"] = answered.removesuffix("{{ end }}{{ end }}")
    system = next((message["content"] for message in messages if message["role"] == "system"), None)
    text = without.removesuffix("{{ end }}") if system is None else with_system.replace("{{ .System }}", system)
    return text + "".join(body[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages)


DERIVED = ("ChatML", "ChatML without a generation prompt", "Llama 3", "Zephyr", "Phi-3")


@pytest.mark.parametrize("family", DERIVED)
@pytest.mark.parametrize("start", [0, 1])
def test_a_derived_template_writes_what_the_chat_template_writes(family, start):
    tokenizer = KINDS["byte-level"]()
    tokenizer.chat_template = FAMILIES[family].template
    messages = [{"role": role, "content": content} for role, content in CHAT[start:]]
    expected = ChatTemplate.of(tokenizer, Dialogue([])).render_prompt(messages)
    rendered = go_rendered(template_pieces(tokenizer).go(), messages)
    assert rendered == expected.removeprefix("<s>")  # the server adds BOS, as the tokenizer does


@pytest.mark.parametrize("family", ["Mistral", "DeepSeek-R1", "gpt-oss"])
def test_a_template_that_is_not_made_of_pieces_is_left_out(family):
    tokenizer = KINDS["byte-level"]()
    tokenizer.chat_template = FAMILIES[family].template
    assert template_pieces(tokenizer) is None


def test_a_modelfile(folder, capsys):
    assert main(["export", str(folder), "--to", "ollama", "--system", "Be brief."]) == 0
    text = (folder / "Modelfile").read_text()
    assert text.startswith('FROM .\nTEMPLATE """{{ if .System }}<|im_start|>system\n')
    assert text.endswith('PARAMETER stop "<|im_end|>"\nSYSTEM """Be brief."""\n')
    assert f"ollama create 'my model' -f '{folder}/Modelfile'" in capsys.readouterr().out
    assert main(["export", str(folder), "--to", "ollama"]) == 2
    assert "exists already, with other content" in capsys.readouterr().err


def test_an_adapter_is_merged_for_ollama(folder, tmp_path, capsys):
    adapter = adapter_on(folder, tmp_path / "adapter")
    assert main(["export", str(adapter), "--to", "ollama"]) == 2
    assert "name the folder that it is merged into" in capsys.readouterr().err
    assert main(["export", str(adapter), "--to", "ollama", "-o", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged/Modelfile").exists() and (tmp_path / "merged/model.safetensors").exists()


def test_the_command_of_vllm(folder, tmp_path):
    command = shlex.split(vllm_command(str(folder)))
    assert command == ["vllm", "serve", str(folder), "--served-model-name", "My model", "--dtype", "bfloat16"]
    adapter = adapter_on(folder, tmp_path / "adapter")
    assert shlex.split(vllm_command(str(adapter))) == [
        "vllm", "serve", str(folder), "--dtype", "bfloat16", "--enable-lora", "--max-lora-rank", "16",
        "--lora-modules", f"adapter={adapter}",
    ]  # fmt: skip


def test_what_vllm_could_not_serve_is_told(folder, tmp_path, tokenizer):
    for name, config, message in [
        ("dora", {"use_dora": True}, "is DoRA; merge it first"),
        ("head", {"modules_to_save": ["lm_head"]}, "layers that were trained whole"),
        ("large", {"r": 600}, "rank 600 is more than vLLM's largest"),
    ]:
        adapter = adapter_on(folder, tmp_path / name, **config)
        with pytest.raises(ValueError, match=message):
            vllm_command(str(adapter))
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | {"eos_token": "<|im_start|>"}))
    GenerationConfig(eos_token_id=5).save_pretrained(folder)
    with pytest.raises(ValueError, match=r'answers end with <\|im_end\|>.*write "eos_token_id": \[1, 5, 0\]'):
        vllm_command(str(folder))
    assert 'stop "<|im_end|>"' in modelfile(served_model(str(folder)))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        vllm_command(str(folder))


@pytest.fixture
def llama_cpp(tmp_path, monkeypatch):
    """A folder with a script that writes its arguments."""
    script = tmp_path / "llama.cpp/convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text(
        "import os, sys\n"
        "folder, _, file, _, outtype = sys.argv[1:]\n"
        "sys.exit('no such type') if outtype == 'f32' else None\n"
        "open(file, 'w').write(f'GGUF {outtype} {sorted(os.listdir(folder))}')\n"
    )
    monkeypatch.setenv("LLAMA_CPP", str(script.parent))


def test_gguf_is_written_by_the_converter(folder, tmp_path, llama_cpp, capsys):
    assert main(["export", str(folder), "--to", "gguf"]) == 0
    assert (folder / "My model.gguf").read_text().startswith("GGUF auto ")
    assert "llama-server -m" in capsys.readouterr().out
    adapter = adapter_on(folder, tmp_path / "adapter")
    file = tmp_path / "out/a.gguf"
    assert main(["export", str(adapter), "--to", "gguf", "--outtype", "q8_0", "-o", str(file)]) == 0
    # The converter saw a merged model, and nothing but the file is left.
    assert "GGUF q8_0" in file.read_text() and "'model.safetensors'" in file.read_text()
    assert list(file.parent.iterdir()) == [file]


def test_what_keeps_gguf_from_being_written_is_told(folder, llama_cpp, monkeypatch, capsys):
    words = ["export", str(folder), "--to"]
    for more, message in [
        (["gguf", "--outtype", "f32"], "converter ended with status 1: no such type"),
        (["gguf", "--system", "x"], "--system is of --to ollama"),
        (["vllm", "--outtype", "f16"], "--outtype is of --to gguf"),
    ]:
        assert main([*words, *more]) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1, printed
    monkeypatch.delenv("LLAMA_CPP")
    monkeypatch.setenv("PATH", "")
    assert main([*words, "gguf"]) == 2
    assert "git clone https://github.com/ggml-org/llama.cpp" in capsys.readouterr().err
    assert not list(folder.glob("*.gguf")) and not list(folder.glob(".*"))
