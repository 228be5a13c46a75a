"""Names of options: known before torch is imported, never out of date, shown once."""

import re
import subprocess
import sys
from dataclasses import fields
from pkgutil import resolve_name

import pytest

from rlhf.cli.commands import COMMANDS, TrainingCommand
from rlhf.cli.field_names import names_of_options
from rlhf.cli.main import main
from rlhf.cli.options import ALIASES, expand_aliases

WITH_OPTIONS = [name for name, command in COMMANDS.items() if command.option_classes]


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_names_read_from_the_source_are_the_fields(name):
    classes = [resolve_name(path) for path in COMMANDS[name].option_classes]
    want = {option.name for cls in classes for option in fields(cls) if option.init}
    assert names_of_options(COMMANDS[name].option_classes) == want


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["dpo", "--nonsense", "1"], "rlhf dpo: unknown option --nonsense"),
        (["grpo", "--epsilom", "4"], "rlhf grpo: unknown option --epsilom; did you mean --epsilon?"),
        (["eval", "--lr", "1"], "rlhf eval: unknown option --lr"),
    ],
)  # fmt: skip
def test_an_unknown_option_is_found_before_torch_is_imported(words, line):
    code = (
        "import sys; from rlhf.cli.main import main; status = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip(), done.stdout.strip()) == (2, line, "[]")


def test_an_unknown_key_is_found_before_torch_is_imported(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-6\n")
    code = "import sys; from rlhf.cli.main import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    argv = [sys.executable, "-c", code, "dpo", "--config", str(tmp_path / "c.yaml")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert "unknown key 'lr'; did you mean learning_rate?" in done.stderr and done.stdout.strip() == "False"


def test_short_names_stand_for_whole_ones():
    known = names_of_options(COMMANDS["dpo"].option_classes)
    words = expand_aliases(["--model", "a", "--data=b", "--lr", "1e-6", "--epochs=2", "--beta", "--model"], known)
    assert words == [
        "--model_name_or_path", "a", "--dataset_name=b", "--learning_rate", "1e-6", "--num_train_epochs=2",
        "--beta", "--model_name_or_path",
    ]  # fmt: skip
    assert set(ALIASES.values()) <= known and not set(ALIASES) & known
    # A command that has no such option has no such short name either.
    assert expand_aliases(["--lr", "1"], names_of_options(COMMANDS["eval"].option_classes)) == ["--lr", "1"]


def test_a_run_by_short_names(tmp_path, model_folder, data_files, capsys):
    argv = ["sft", "--model", str(model_folder), "--data", str(data_files / "sft.jsonl"), "--lr", "1e-3"]
    argv += ["--epochs", "1", "--max_steps", "1", "--output-dir", str(tmp_path / "run"), "--use_cpu"]
    assert main(argv) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_help_shows_each_option_once(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = re.findall(r"^  (--\w+)", capsys.readouterr().out, flags=re.M)
    assert len(shown) == len(set(shown))
    assert {word.removeprefix("--") for word in shown} == names_of_options(COMMANDS[name].option_classes) | {"config"}


def test_the_package_is_a_command():
    done = subprocess.run([sys.executable, "-m", "rlhf", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_row_of_the_table_leads_to_code(command):
    if isinstance(command, TrainingCommand):
        assert callable(resolve_name(command.trainer)) and callable(resolve_name(command.load_model))
        assert all(hasattr(resolve_name(group), "trainer_kwargs") for group in command.groups)
    else:
        assert callable(resolve_name(f"{command.module}:run"))
