"""Each recipe of CONTRIBUTING.md does what it says: its block is run as it stands, on a tiny model."""

import re
from pathlib import Path

import pytest
from conftest import tiny_model

import rlhf.losses

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
REGISTRIES = ("PREFERENCE_LOSSES", "POLICY_LOSSES", "ADVANTAGE_ESTIMATORS", "DIVERGENCES")


def recipes(page):
    """The Python blocks of a page, by the heading that they stand under."""
    blocks, heading = {}, ""
    for part in re.split(r"^(#+ [^\n]+|```python\n.*?^```)$", page, flags=re.DOTALL | re.MULTILINE):
        if part.startswith("#"):
            heading = part.lstrip("# ")
        elif part.startswith("```python"):
            blocks[heading] = part.removeprefix("```python").removesuffix("```")
    return blocks


RECIPES = recipes(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def registries_as_before():
    """What a recipe registers is not known to other tests."""
    before = {name: dict(getattr(rlhf.losses, name)) for name in REGISTRIES}
    yield
    for name, entries in before.items():
        registry = getattr(rlhf.losses, name)
        registry.clear()
        registry.update(entries)


@pytest.mark.parametrize("heading", RECIPES)
def test_the_recipe_runs(heading, tmp_path, monkeypatch, tokenizer, sft_rows, preference_rows):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names = {"model": tiny_model(), "tokenizer": tokenizer, "examples": sft_rows, "pairs": preference_rows}
    exec(compile(RECIPES[heading], f"CONTRIBUTING.md, {heading}", "exec"), names)
    if "trainer" in names:
        assert names["trainer"].state.global_step == 2


def test_there_is_a_recipe_for_each_thing_that_can_be_added():
    assert set(RECIPES) == {
        "A preference loss",
        "Another loss",
        "A policy loss",
        "An advantage estimator",
        "A divergence",
        "A reward",
        "A rollout engine",
        "A data format",
        "A trainer",
    }
