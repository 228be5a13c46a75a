"""The structure of the package: no circles of imports, no private names across folders, nothing too long to read."""

import ast
import importlib.util
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "rlhf").rglob("*.py"))
LIMITS = {"file": 400, "class": 250, "function": 60}  # lines of code
# Over a limit, with the reason. An entry that no longer needs to be here fails the test.
EXCEPTIONS = {
    "rlhf/online/trainer.py:PPOTrainer": "the order of a rollout and the loss are one class",
}


def load_readability():
    spec = importlib.util.spec_from_file_location("readability", ROOT / "scripts/readability.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in FILES}


def imports_of(file: Path) -> set[tuple[str, str]]:
    """Pairs (module, name) of all that a file imports from the package, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlhf":
            found |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "rlhf"}
    return found


def import_graph() -> dict[str, set[str]]:
    graph = {}
    for module, file in MODULES.items():
        targets = {f"{source}.{name}" if f"{source}.{name}" in MODULES else source for source, name in imports_of(file)}
        graph[module] = (targets & set(MODULES)) - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, in order; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_files_import_each_other():
    # The package itself imports lazily, by name, so it is not a part of a circle.
    graph = {module: targets - {"rlhf"} for module, targets in import_graph().items() if module != "rlhf"}
    assert circle(graph) == []


def test_a_circle_is_found():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()})) == {"b", "c"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_private_name_is_imported_across_folders(file):
    folder = module_name(file).split(".")[:2]
    private = {
        (source, name)
        for source, name in imports_of(file)
        if source.split(".")[:2] != folder
        and any(part.startswith("_") and not part.startswith("__") for part in (*source.split("."), name))
    }
    assert private == set()


def too_long() -> dict[str, int]:
    """Files, classes and functions over their limit, with their lines of code."""
    readability = load_readability()
    over = {}
    for file in FILES:
        source = file.read_text()
        tree = ast.parse(source)
        code = readability.code_lines(source, tree)
        name = str(file.relative_to(ROOT))
        sizes = {(name, "file"): len(code)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                sizes[f"{name}:{node.name}", kind] = len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
        over |= {place: size for (place, kind), size in sizes.items() if size > LIMITS[kind]}
    return over


def test_files_classes_and_functions_are_short_enough_to_read():
    over = too_long()
    assert {place: size for place, size in over.items() if place not in EXCEPTIONS} == {}
    assert set(EXCEPTIONS) - set(over) == set(), "no longer over a limit: remove the entry"


def test_files_of_tests_have_names_of_their_own():
    # pytest imports a file of tests by its name alone.
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert {name for name in names if names.count(name) > 1} == set()
