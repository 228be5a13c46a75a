"""``rlhf recipes`` and ``rlhf init``: each shipped file is listed with its task, and written once."""

import subprocess
import sys

from rlhf.cli.main import main
from rlhf.cli.recipes import recipes


def test_each_recipe_has_a_command_and_a_task(capsys):
    known = recipes()
    assert {"sft", "sft_lora", "sft_qlora", "sft_long", "sft_laptop", "dpo_lora", "grpo"} <= set(known)
    assert all(recipe.command and recipe.task for recipe in known.values())
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in known) and "GiB" in printed


def test_init_writes_a_recipe_with_its_comments_and_never_twice(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    assert main(["init", "sft-lora", "-o", str(file)]) == 0
    text = file.read_text()
    assert f"# rlhf sft --config {file}" in text and "lora_r: 16" in text
    assert f"rlhf sft --config {file} --dry_run" in capsys.readouterr().out
    file.write_text("mine")
    assert main(["init", "sft_lora", "-o", str(file)]) == 2
    assert file.read_text() == "mine" and "exists already" in capsys.readouterr().err


def test_an_unknown_recipe_is_refused_with_the_nearest_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "sft_lara"]) == 2
    assert "did you mean sft_lora?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_they_do_not_import_torch():
    code = "import sys, rlhf.cli.main, rlhf.cli.init; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
