"""Names of options, checked before anything heavy is imported: a typing error should not cost seconds."""

import difflib
import os
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
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
    # The wheel has a copy of the folder inside the package.
    in_wheel = Path(__file__).parents[1] / "configs"
    in_checkout = Path(__file__).parents[2] / "configs"
    return in_wheel if in_wheel.is_dir() else in_checkout


class RaisingParser(ArgumentParser):
    """A parser that raises where argparse would end the program: one line says what is wrong, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def underscored(argv: Sequence[str]) -> list[str]:
    """Write names of options with underscores, for a command with a parser of its own.

    Args:
        argv: words of the command line, after the command.

    Returns:
        The same words; ``--max-new-tokens=5`` is ``--max_new_tokens=5``.
    """
    return [_with_underscores(word) if word.startswith("--") else word for word in argv]


def _with_underscores(word: str) -> str:
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


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
        if not word.startswith("--"):
            continue  # a value
        name = _option_name(word)
        # A switch that is on by default has a second option, --no_NAME.
        if name not in known_names and name.removeprefix("no_") not in known_names:
            option_shown = word.split("=")[0]
            raise ValueError(f"unknown option {option_shown}{_suggestion(name, known_names, '--')}")
    return value_of("config", argv)


def expand_aliases(argv: Sequence[str], known_names: frozenset[str]) -> list[str]:
    """The same command line with :data:`ALIASES` spelled out, where the command has the option.

    Args:
        argv: words of the command line, after the command.
        known_names: names of options, without dashes.

    Returns:
        The words, with the full names.
    """
    expanded = []
    for word in argv:
        short_name = _option_name(word) if word.startswith("--") else ""
        whole_name = ALIASES.get(short_name)
        # A command may have an option of its own under the short name.
        if whole_name in known_names and short_name not in known_names:
            _, equals, value = word.partition("=")
            word = f"--{whole_name}{equals}{value}"
        expanded.append(word)
    return expanded


def read_config(file: str, known_names: Iterable[str]) -> dict[str, Any]:
    """Read a YAML file of options. Its key ``env``, a dictionary, sets environment variables.

    A ``run.yaml`` that a run left is such a file; its key ``record`` is passed over.

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
    # A file of the user's wins over one of ours with the same name.
    if not path.exists() and shipped.exists():
        path = shipped
    try:
        # An empty file is read as None.
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such config file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not UTF-8 text; save the file as UTF-8") from None
    # ValueError: a date or a number that Python does not have.
    except (yaml.YAMLError, ValueError) as error:
        # A YAML error has several lines; ours has one.
        raise ValueError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    except RecursionError:
        raise ValueError(f"{file}: not valid YAML for options (nested too deeply)") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected `option: value` lines, found a {type(values).__name__}")
    # Before torch is imported, which reads some of them only then.
    _set_environment(file, values.pop("env", None))
    values.pop("record", None)
    known_names = frozenset(known_names)
    for key in values:
        if key not in known_names:
            raise ValueError(f"{file}: unknown key {key!r}{_suggestion(str(key), known_names)}")
    return values


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; of a key that is given twice it would take the last value without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key_node, _ in node.value:
            # Any other key is refused when the mapping is made.
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in keys:
                line = key_node.start_mark.line + 1
                raise ValueError(f"{key_node.value!r} is given twice, again in line {line}: delete one")
            keys.add(key_node.value)
        return node


def _set_environment(file: str, variables: Any) -> None:
    """Set the environment variables under ``env``."""
    if variables is None:
        return
    if not isinstance(variables, dict):
        raise ValueError(f"{file}: 'env' must hold `NAME: value` lines, got a {type(variables).__name__}")
    for name, value in variables.items():
        if not isinstance(value, str | int | float):
            raise ValueError(f"{file}: 'env' has a {type(value).__name__} for {name}, expected text or a number")
        try:
            os.environ[str(name)] = str(value)
        # The name is empty or has a "=", or one of them a NUL.
        except (ValueError, OSError) as error:
            raise ValueError(f"{file}: 'env' has no valid variable {name!r} ({error})") from error


def _option_name(word: str) -> str:
    """``--max-steps=3`` is ``max_steps``."""
    return word.removeprefix("--").split("=")[0].replace("-", "_")


def value_of(option: str, argv: Sequence[str]) -> str | None:
    """Find the value of an option on a command line; the last one counts.

    Args:
        option: its name, without dashes.
        argv: words of the command line.

    Returns:
        The value; None where the option is not there.
    """
    value = None
    for position, word in enumerate(argv):
        if not word.startswith("--") or _option_name(word) != option:
            continue
        if "=" in word:
            value = word.partition("=")[2]
        elif position + 1 < len(argv):
            value = argv[position + 1]
    return value


def _suggestion(name: str, known_names: frozenset[str], prefix: str = "") -> str:
    """``; did you mean …?``, or nothing where no name is near."""
    # Aliases first: `lr` has too few letters to be close to any whole name.
    whole_name = ALIASES.get(name)
    if whole_name in known_names:
        return f"; did you mean {prefix}{whole_name}?"
    nearest = difflib.get_close_matches(name, known_names, n=1)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""
