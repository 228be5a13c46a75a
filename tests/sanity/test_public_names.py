"""What people import is pinned: each public name, its parameters and their defaults, and each option of a config.

`public_names.txt` is the list. A line that changes is a decision: it breaks somebody's script, or promises something.
To accept it: `python tests/sanity/test_public_names.py`, and a line in CHANGELOG.md.
"""

import dataclasses
import difflib
import enum
import importlib
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PINNED = Path(__file__).with_name("public_names.txt")
MODULES = [
    "rlhf",
    "rlhf.losses",
    "rlhf.logprobs",
    "rlhf.data",
    "rlhf.models",
    "rlhf.rollouts",
    "rlhf.rewards",
    "rlhf.online",
    "rlhf.distillation",
]


def shown(default: Any) -> str:
    """A default as it is written: the same text on every version of Python."""
    if isinstance(default, enum.Enum):
        return str(default)
    if inspect.isroutine(default) or inspect.isclass(default):
        return str(default.__name__)
    return repr(default) if " at 0x" not in repr(default) else "..."


def parameters(function: Any) -> str:
    """The names and defaults in brackets. Types are left out: mypy holds them, and their texts differ by version."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a class of C, or one without a constructor of its own
        return "(...)"
    plain = [
        parameter.replace(annotation=parameter.empty, default=parameter.empty)
        for parameter in signature.parameters.values()
    ]
    words = []
    for bare, parameter in zip(plain, signature.parameters.values(), strict=True):
        if parameter.kind is parameter.KEYWORD_ONLY and not any(word.startswith("*") for word in words):
            words.append("*")
        default = "" if parameter.default is parameter.empty else f"={shown(parameter.default)}"
        words.append(f"{bare}{default}")
    return f"({', '.join(words)})"


def is_ours(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("rlhf")


def options(config: type) -> dict[str, str]:
    """The fields that a config declares in this package; those of `TrainingArguments` change with transformers."""
    declared = {name for base in config.__mro__ if is_ours(base) for name in inspect.get_annotations(base)}
    found = {}
    for field in dataclasses.fields(config):
        if field.name not in declared:
            continue
        if field.default is not dataclasses.MISSING:
            found[field.name] = f" = {shown(field.default)}"
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = f" = {shown(field.default_factory())}"
        else:
            found[field.name] = ""
    return found


def config_lines(configs: list[type]) -> list[str]:
    """Each option once, under the class that declares or changes it."""
    ours = {base for config in configs for base in config.__mro__ if is_ours(base) and dataclasses.is_dataclass(base)}
    lines = ["[options]"]
    for config in sorted(ours, key=lambda cls: cls.__name__):
        inherited: dict[str, str] = {}
        for base in reversed(config.__mro__[1:]):
            if base in ours:
                inherited |= options(base)
        lines.append(f"{config.__name__}({', '.join(base.__name__ for base in config.__bases__)})")
        lines += [
            f"    {name}{default}"
            for name, default in sorted(options(config).items())
            if inherited.get(name, "not inherited") != default
        ]
    return lines


def methods(cls: type) -> Iterator[str]:
    """Public methods and properties that a class adds to those of foreign bases, such as `torch.nn.Module`."""
    names = {name for base in cls.__mro__ if is_ours(base) for name in base.__dict__ if not name.startswith("_")}
    foreign = {name for base in cls.__mro__ if not is_ours(base) for name in dir(base)}
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    for name in sorted(names - fields - foreign):
        member = inspect.getattr_static(cls, name)
        if isinstance(member, property):
            yield f"    .{name}"
        elif callable(getattr(cls, name)) and not inspect.isclass(getattr(cls, name)):
            yield f"    .{name}{parameters(getattr(cls, name))}"


def name_lines(module_name: str, seen: dict[int, str]) -> Iterator[str]:
    """One name after the other; what an earlier module exports too is told as its other name."""
    module = importlib.import_module(module_name)
    for name in sorted(module.__all__):
        thing = getattr(module, name)
        known = seen.get(id(thing)) if callable(thing) else None
        if known is not None:
            yield f"{name} = {known}"
            continue
        seen[id(thing)] = f"{module_name}.{name}"
        if name.endswith(("Config", "Trainer")):
            yield f"{name}" if name.endswith("Config") else f"{name}{parameters(thing)}"
        elif typing.get_origin(thing) is not None:  # the name of a type
            yield name
        elif inspect.isclass(thing):
            yield f"class {name}{parameters(thing)}"
            yield from methods(thing)
        elif callable(thing):
            yield f"{name}{parameters(thing)}"
        elif isinstance(thing, dict):  # a registry: what can be chosen by name
            yield f"{name}: {', '.join(map(str, thing))}"
        else:
            yield name


def public_lines() -> list[str]:
    import rlhf

    lines: list[str] = []
    seen: dict[int, str] = {}
    for module_name in MODULES:
        lines += [f"[{module_name}]", *name_lines(module_name, seen), ""]
    configs = [getattr(rlhf, name) for name in rlhf.__all__ if name.endswith("Config") and name != "ModelConfig"]
    return [*lines, *config_lines(configs)]


def test_public_names_are_those_that_were_decided():
    pinned = PINNED.read_text().splitlines()
    changed = list(difflib.unified_diff(pinned, public_lines(), "public_names.txt", "the package", lineterm="", n=2))
    assert not changed, "\n".join([*changed, "", str(__doc__)])


if __name__ == "__main__":
    PINNED.write_text("\n".join(public_lines()) + "\n")
