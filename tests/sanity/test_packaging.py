"""What is installed is what is imported: every import is declared, and the wheel holds all that is read at run time."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import yaml

import rlhf

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = {"pyyaml": "yaml", "math-verify": "math_verify"}  # named otherwise than their distribution
# Imported late, and an error names the extra; builds of torch for a GPU bring triton.
EXTRA = {"math_verify", "bitsandbytes", "deepspeed", "lm_eval", "triton", "vllm"}


def imported():
    found = set()
    for file in (ROOT / "rlhf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"rlhf"}


def name(requirement):
    return re.match(r"[\w-]+", requirement)[0].lower()


def test_what_is_imported_is_declared_and_no_more():
    declared = {MODULES.get(name(line), name(line)) for line in PROJECT["project"]["dependencies"]}
    assert imported() - EXTRA == declared
    optional = {name(line) for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra}
    assert {MODULES.get(n, n) for n in optional} >= EXTRA


def pins(file):
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return {name(line): line.split("==")[1] for line in lines}


def test_the_oldest_versions_are_those_that_are_tested():
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    for line in PROJECT["project"]["dependencies"]:
        bound = line.split(">=")[1]
        tested = newest if name(line) == "torch" else oldest
        assert tested[name(line)].startswith(bound), f"{line}: tested with {tested[name(line)]}"
        assert name(line) in newest


def test_the_wheel_holds_types_configs_and_one_version():
    assert (ROOT / "rlhf/py.typed").exists()
    build = PROJECT["tool"]["hatch"]
    assert build["build"]["targets"]["wheel"]["force-include"] == {"configs": "rlhf/configs"}
    assert build["version"]["path"] == "rlhf/__init__.py" and "version" not in PROJECT["project"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", rlhf.__version__)
    (script,) = PROJECT["project"]["scripts"].values()
    assert importlib.metadata.EntryPoint("rlhf", script, "console_scripts").load()


def test_the_changelog_begins_with_what_is_unreleased_and_then_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", rlhf.__version__]


def test_hosted_checks_are_the_commands_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    commands = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    assert commands == {"make check", "make docs", "make test", "make test-oldest", "make wheel"}
    assert {command.removeprefix("make ") for command in commands} <= targets
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    recipe = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    for hook in local["hooks"]:  # what runs before a commit is part of `make check`
        assert " ".join(hook["entry"].split()[:2]).removesuffix(" -q") in recipe
