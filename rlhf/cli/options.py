"""Names of options, checked before anything heavy is imported: a typing error should not cost seconds."""

import ast
import difflib
import os
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml

# Short names that people type first. They work on the command line; a config file has the whole name.
ALIASES = {
    "model": "model_name_or_path",
    "data": "dataset_name",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
}


def config_folder() -> Path:
    """The folder of the YAML files that come with the package: in an installed wheel, or in a checkout."""
    in_wheel = Path(__file__).parents[1] / "configs"
    in_checkout = Path(__file__).parents[2] / "configs"
    return in_wheel if in_wheel.is_dir() else in_checkout


class RaisingParser(ArgumentParser):
    """A parser that raises where argparse would end the program: one line says what is wrong, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def require(**options: Any) -> None:
    """Refuse options that have no value.

    Args:
        options: values under the names of their options.

    Raises:
        ValueError: one is None.
    """
    for name, value in options.items():
        if value is None:
            raise ValueError(f"--{name} is missing: give it on the command line or in the config file")


def check_options(argv: Sequence[str], known_names: frozenset[str]) -> str | None:
    """Check the names of the options on a command line. Values are checked later.

    Args:
        argv: words of the command line, after the command.
        known_names: names of options, without dashes.

    Returns:
        The value of ``--config``.

    Raises:
        ValueError: an unknown option; the message has the nearest known name.
    """
    for word in argv:
        if not word.startswith("--") or word == "--":
            continue
        name = _option_name(word)
        # A switch that is on by default has a second option, --no_NAME.
        if not {name, name.removeprefix("no_")} & known_names:
            shown = word.split("=")[0]
            raise ValueError(f"unknown option {shown}{_suggestion(name, known_names, '--')}")
    return _value_of("config", argv)


def expand_aliases(argv: Sequence[str], known_names: frozenset[str]) -> list[str]:
    """The same command line with :data:`ALIASES` spelled out, where the command has the option."""
    words = []
    for word in argv:
        name = _option_name(word) if word.startswith("--") else ""
        whole_name = ALIASES.get(name)
        if whole_name in known_names and name not in known_names:
            _, equals, value = word.partition("=")
            word = f"--{whole_name}{equals}{value}"
        words.append(word)
    return words


def read_config(file: str, known_names: Iterable[str]) -> dict[str, Any]:
    """Read a YAML file of options. Its key ``env``, a dictionary, sets environment variables.

    Args:
        file: a path, or the name of a file that comes with the package.
        known_names: names that its keys may have.

    Returns:
        The values under the names of their options.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no valid YAML, no dictionary, or an unknown key.
    """
    path = Path(file)
    shipped = config_folder() / path.name
    if not path.exists() and shipped.exists():
        path = shipped
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such config file") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected `option: value` lines, found a {type(values).__name__}")
    environment = values.pop("env", None) or {}
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    known_names = frozenset(known_names)
    for key in values:
        if key not in known_names:
            raise ValueError(f"{file}: unknown key {key!r}{_suggestion(str(key), known_names)}")
    return values


def names_of_options(option_classes: Iterable[str]) -> frozenset[str]:
    """Names of the options of data classes, read from their source without importing it.

    Args:
        option_classes: data classes, each as ``module:Class``.
    """
    names: set[str] = set()
    for path in option_classes:
        module, _, class_name = path.partition(":")
        names |= _fields_of_class(module, class_name)
    return frozenset(names)


def _option_name(word: str) -> str:
    """``--max-steps=3`` is ``max_steps``."""
    return word.removeprefix("--").split("=")[0].replace("-", "_")


def _value_of(option: str, argv: Sequence[str]) -> str | None:
    """The value of an option on a command line; the last one counts."""
    value = None
    for position, word in enumerate(argv):
        if word == f"--{option}" and position + 1 < len(argv):
            value = argv[position + 1]
        elif word.startswith(f"--{option}="):
            value = word.partition("=")[2]
    return value


def _suggestion(name: str, known_names: frozenset[str], prefix: str = "") -> str:
    if ALIASES.get(name) in known_names:
        return f"; did you mean {prefix}{ALIASES[name]}?"
    nearest = difflib.get_close_matches(name, known_names, n=1)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""


# Importing the data classes takes seconds, because they inherit from transformers.TrainingArguments, which imports
# torch. Parsing their source takes a tenth of one, and cannot be out of date.


@cache
def _fields_of_class(module: str, class_name: str) -> frozenset[str]:
    """Names of the fields of a data class, with those of its bases."""
    tree = _syntax_tree(module)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            names = {statement.target.id for statement in node.body if _is_field(statement)}  # type: ignore[attr-defined]
            for base in node.bases:
                if isinstance(base, ast.Name):
                    names |= _fields_of_class(module, base.id)
            return frozenset(names)
    # Not defined here, so imported, perhaps for type checkers only.
    for statement in ast.walk(tree):
        if not isinstance(statement, ast.ImportFrom):
            continue
        for alias in statement.names:
            if class_name == (alias.asname or alias.name):
                return _fields_of_class(_absolute_module(statement, module), alias.name)
    raise LookupError(f"{module} defines and imports no class {class_name}")


def _is_field(statement: ast.stmt) -> bool:
    """Whether a statement of a class body declares a field that ``__init__`` takes."""
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
        return False
    if "ClassVar" in ast.unparse(statement.annotation):
        return False
    keywords = statement.value.keywords if isinstance(statement.value, ast.Call) else []
    return not any(keyword.arg == "init" and ast.unparse(keyword.value) == "False" for keyword in keywords)


def _absolute_module(statement: ast.ImportFrom, module: str) -> str:
    """The module that ``from .name import …`` in ``module`` is about."""
    if statement.level == 0:
        return statement.module or ""
    parts = module.split(".")
    levels = statement.level - 1 if _source_file(module).name == "__init__.py" else statement.level
    parents = parts[: len(parts) - levels]
    return ".".join([*parents, statement.module] if statement.module else parents)


@cache
def _syntax_tree(module: str) -> ast.Module:
    return ast.parse(_source_file(module).read_text(encoding="utf-8"))


def _source_file(module: str) -> Path:
    package, *parts = module.split(".")
    # Only the package at the top is looked up: looking up a module inside would import what is around it.
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} is not installed")
    path = Path(spec.origin).parent.joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
