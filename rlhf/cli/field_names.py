"""Names of the fields of data classes, read from their source without importing it.

Importing a trainer's configuration takes seconds, because it inherits from ``transformers.TrainingArguments``, which
imports torch. Parsing the source takes a tenth of one and, unlike a stored list, cannot be out of date.
"""

import ast
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def names_of_options(option_classes: Iterable[str]) -> frozenset[str]:
    """Names of the options of data classes, read from their source without importing it.

    Args:
        option_classes: data classes, each as ``module:Class``.

    Returns:
        The names.
    """
    names: set[str] = set()
    for path in option_classes:
        module, _, class_name = path.partition(":")
        names |= _fields_of_class(module, class_name)
    return frozenset(names)


@cache
def _fields_of_class(module: str, class_name: str) -> frozenset[str]:
    """Names of the fields of a data class, with those of its bases."""
    tree = _syntax_tree(module)
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef) and statement.name == class_name:
            names = {name for part in statement.body if (name := _field_name(part)) is not None}
            for base in statement.bases:
                if isinstance(base, ast.Name):
                    names |= _fields_of_class(module, base.id)
            return frozenset(names)
    # Not defined here, so imported from somewhere. All of the tree is searched, because a package that imports its
    # parts late, such as transformers, has its imports under `if TYPE_CHECKING`.
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if class_name == (alias.asname or alias.name):
                return _fields_of_class(_imported_module(node, module), alias.name)
    raise LookupError(f"{module} defines and imports no class {class_name}")


def _field_name(statement: ast.stmt) -> str | None:
    """The name of the field that a statement of a class body declares, if it declares one that ``__init__`` takes."""
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
        return None
    # A constant of the class.
    if "ClassVar" in ast.unparse(statement.annotation):
        return None
    # field(init=False): computed, so no option.
    keywords = statement.value.keywords if isinstance(statement.value, ast.Call) else []
    for keyword in keywords:
        if keyword.arg == "init" and ast.unparse(keyword.value) == "False":
            return None
    return statement.target.id


def _imported_module(statement: ast.ImportFrom, module: str) -> str:
    """The whole name of the module in ``from .name import …``, as it is written in ``module``."""
    if statement.level == 0:
        return statement.module or ""
    # One dot is the package that the file is in; in an __init__.py that is the module itself.
    is_package = _source_file(module).name == "__init__.py"
    levels_up = statement.level - 1 if is_package else statement.level
    parts = module.split(".")
    parents = parts[: len(parts) - levels_up]
    return ".".join([*parents, statement.module] if statement.module else parents)


@cache
def _syntax_tree(module: str) -> ast.Module:
    return ast.parse(_source_file(module).read_text(encoding="utf-8"))


def _source_file(module: str) -> Path:
    package, *parts = module.split(".")
    # Only the outermost package is looked up: to look up a module inside it, Python would import the package.
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} is not installed")
    path = Path(spec.origin).parent.joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
