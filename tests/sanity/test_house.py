"""The house stands as planned: floors, documented names, configs that load."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml

from rlhf.cli.commands import COMMANDS
from rlhf.cli.parsing import parse

ROOT = Path(__file__).parents[2]
FLOORS = {
    "losses": 1, "kernels": 1, "logprobs": 2, "data": 3, "models": 4, "rollouts": 5, "rewards": 5,
    "evaluation": 6, "runs": 6, "serving": 6,
    "trainers": 7, "online": 8, "distillation": 8, "planning": 8, "cli": 9,
}  # fmt: skip
PUBLIC = ["rlhf", *(f"rlhf.{room}" for room in FLOORS if room != "cli")]
FILES = sorted((ROOT / "rlhf").rglob("*.py"))


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name in FLOORS], ids=lambda f: f.name)
def test_no_lower_floor_imports_an_upper_one(file):
    room = file.parent.name
    rooms = {name.split(".")[1] for name in imported(file) if name.startswith("rlhf.")}
    # A file beside the rooms, such as rlhf/visible.py, is below them all.
    assert {other for other in rooms if FLOORS.get(other, 0) > FLOORS[room]} == set()


def test_losses_need_torch_alone():
    outside = {n.split(".")[0] for f in FILES if f.parent.name == "losses" for n in imported(f)}
    assert outside - set(sys.stdlib_module_names) == {"torch", "rlhf"}


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, rlhf; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_exist_and_are_documented(module):
    found = importlib.import_module(module)
    assert found.__doc__
    for name in found.__all__:
        thing = getattr(found, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__ and not thing.__doc__.startswith(f"{name}("), f"{module}.{name} has no docstring"


ONLINE = ("ppo", "grpo", "rloo", "online_dpo", "best_of_n")
ADAPTED = ("sft_lora", "sft_qlora", "sft_long", "sft_laptop", "dpo_lora")
CLUSTERS = ("grpo_8", "grpo_64", "grpo_512")
HAS = {
    "configs": ("sft", "distill", "dpo", "kto", "reward", *ONLINE, *ADAPTED),
    "configs/clusters": CLUSTERS,
    "demo": ("sft", "dpo", "ppo", "distill"),
    "docs/runs/smollm2-135m": ("sft", "dpo"),
    "docs/runs/one-sentence": ("ppo", "grpo"),
    "docs/runs/asynchronous": ("grpo",),
    "docs/runs/reward-and-ppo": ("reward", "ppo"),
    "docs/runs/distillation": ("hard", "live", "cached", "gkd"),
}
TRAINING = [ROOT / f"{folder}/{name}.yaml" for folder, names in HAS.items() for name in names]
# Files that are not named after their command.
COMMAND_OF = {
    **{name: name.partition("_")[0] for name in (*ADAPTED, *CLUSTERS)},
    "hard": "sft",
    **dict.fromkeys(("live", "cached", "gkd"), "distill"),
}


@pytest.mark.parametrize("file", TRAINING, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_training_configs_load(file, tmp_path):
    argv = ["--config", str(file), "--output_dir", str(tmp_path)]
    command = COMMAND_OF.get(file.stem, file.stem).replace("_", "-")
    classes = [resolve_name(path) for path in COMMANDS[command].option_classes]
    args = parse(command, classes, argv)[-1]
    values = yaml.safe_load(file.read_text())
    assert args.learning_rate == values["learning_rate"] and args.output_dir == str(tmp_path)


def test_every_yaml_is_known_here():
    elsewhere = {".pre-commit-config.yaml", ".venv", ".venv-oldest", ".venv-wheel", "runs", "site"}
    listed = {f for f in ROOT.rglob("*.yaml") if f.relative_to(ROOT).parts[0] not in elsewhere}
    assert listed == {*TRAINING, *(ROOT / "configs/accelerate").glob("*.yaml")}


@pytest.mark.parametrize("file", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda f: f.stem)
def test_accelerate_configs_load(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes >= 1
    assert (
        file.read_text().splitlines()[1].startswith(f"# accelerate launch --config_file configs/accelerate/{file.name}")
    )


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_configs_are_headed_by_their_command(file):
    command = COMMAND_OF.get(file.stem, file.stem).replace("_", "-")
    assert file.read_text().startswith(f"# rlhf {command} --config configs/{file.name}\n# accelerate launch")
