"""The page of each trainer: its options and figures exist, and its defaults are the configuration's."""

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

from rlhf.cli.commands import COMMANDS, TrainingCommand
from rlhf.cli.field_names import names_of_options

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"`[^`]+`")
PAGES = sorted((ROOT / "docs/trainers").glob("*.md"))


def commands_of(text):
    names = set(re.findall(r"\brlhf ([a-z-]+)", text))
    return [name for name in names if isinstance(COMMANDS.get(name), TrainingCommand)]


def options_in(text):
    # An option of a command that trains nothing stands in a sentence with its name.
    sentences = [
        part for part in re.split(r"(?<=[.:])\s|\n\n", text) if not re.search(r"rlhf (data|eval|student)", part)
    ]
    return set(re.findall(r"--([a-z_]+)", "\n".join(sentences)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_and_figures_exist(page):
    text = page.read_text()
    known = set().union(*(names_of_options(COMMANDS[name].option_classes) for name in commands_of(text)))
    assert options_in(text) - known - {"from", "layers", "dry_run"} == set()
    figures = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*)`", text.partition("## Figures")[2].partition("\n## ")[0]))
    metrics = (ROOT / "docs/metrics.md").read_text()
    assert figures, "a page has figures"
    assert {
        name for name in figures if not {f"`{name}`", f"`{name.removeprefix('eval_')}`"} & set(NAME.findall(metrics))
    } <= {
        "sft"  # a loss
    }


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_defaults_are_those_of_the_configuration(name, tmp_path):
    config = resolve_name(COMMANDS[name].config)(str(tmp_path), use_cpu=True)
    table = (ROOT / f"docs/trainers/{name}.md").read_text().partition("## Options that matter")[2]
    rows = re.findall(r"^\| `--([a-z_]+)` \| ([\d.e-]+|`[a-z]+`) \|", table, re.MULTILINE)
    assert len(rows) >= 3
    for option, value in rows:
        default = getattr(config, option)
        assert value.strip("`") == str(default) or float(value) == default, option
