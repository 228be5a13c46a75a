"""The grid of a sweep: its runs, their names, and the command of each."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rlhf.cli.commands import COMMANDS, TrainingCommand
from rlhf.cli.field_names import names_of_options
from rlhf.cli.options import ALIASES, check_options, config_folder
from rlhf.runs.files import RECORD

SEED = "seed"
DEFAULT_SEED = 42  # of transformers
_UNSAFE = re.compile(r"[^\w.+=-]+")
_NOT_SWEPT = ("output_dir", "config", "resume", "resume_from_checkpoint", "overwrite")


@dataclass(frozen=True)
class GridRun:
    """A run of a sweep.

    Attributes:
        name: of its folder, such as ``beta=0.1,seed=43``.
        options: those that are swept, as they were typed.
    """

    name: str
    options: dict[str, str]


def command_of(file: str) -> str:
    """The command that a file of options is for.

    Args:
        file: as ``--config`` takes it.

    Returns:
        The name of the command that a ``run.yaml`` records, that a comment at the beginning of the file shows
        (``# rlhf dpo ...``), or that the file is named after.

    Raises:
        FileNotFoundError: no such file.
        ValueError: none of them names a command that trains.
    """
    path = Path(file) if Path(file).exists() else config_folder() / Path(file).name
    if not path.exists():
        raise FileNotFoundError(f"{file}: no such config file")
    text = path.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    record = values.get(RECORD) if isinstance(values, dict) else None
    recorded = record.get("command") if isinstance(record, dict) else None
    beginning = re.match(r"(?:#.*\n)*", text)
    shown = re.search(r"\brlhf ([a-z-]+) ", beginning[0]) if beginning else None
    for name in (recorded, shown[1] if shown else None, path.stem):
        if isinstance(COMMANDS.get(str(name)), TrainingCommand):
            return str(name)
    raise ValueError(f"{file}: does not tell its command; name it, as in `rlhf sweep dpo --config {file}`")


def values_of(setting: str) -> tuple[str, list[str]]:
    """An option and its values.

    Args:
        setting: such as ``beta=0.05,0.1``. Commas inside brackets, braces and quotes belong to a value.

    Returns:
        The whole name of the option, and the values as they were typed.

    Raises:
        ValueError: no ``=``, no value, or a value twice.
    """
    name, equals, text = setting.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    values = [value.strip() for value in re.findall(r"""(?:[^,\[{"']|\[[^]]*\]|\{[^}]*\}|"[^"]*"|'[^']*')+""", text)]
    if not equals or not name or not values or not all(values):
        raise ValueError(f"--set {setting}: expected OPTION=VALUE,VALUE such as beta=0.05,0.1")
    if len(set(values)) < len(values):
        raise ValueError(f"--set {setting}: a value is given twice")
    return ALIASES.get(name, name), values


def grid_of(command: str, settings: Sequence[str], num_seeds: int | None, first_seed: int) -> dict[str, list[str]]:
    """The values of each option of a sweep.

    Args:
        command: that trains.
        settings: as :func:`values_of` takes them.
        num_seeds: seeds of each point of the grid; None for that of the options.
        first_seed: the others follow it.

    Returns:
        Values by option, in the order in which they were given.

    Raises:
        ValueError: an unknown option, one that is given twice, or one that a sweep sets itself.
    """
    grid: dict[str, list[str]] = {}
    for setting in settings:
        name, values = values_of(setting)
        if name in _NOT_SWEPT:
            raise ValueError(f"--set {name}: the sweep sets it itself; the folder of all runs is --output_dir")
        check_options([f"--{name}"], names_of_options(COMMANDS[command].option_classes))
        if name in grid:
            raise ValueError(f"--set {name} is given twice: list its values once, --set {name}=A,B,C")
        grid[name] = values
    if num_seeds is not None:
        if SEED in grid:
            raise ValueError("--seeds and --set seed exclude each other")
        if num_seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {num_seeds}")
        grid[SEED] = [str(first_seed + number) for number in range(num_seeds)]
    if not grid:
        raise ValueError("nothing is swept: pass --set OPTION=VALUE,VALUE or --seeds N")
    return grid


def runs_of(grid: dict[str, list[str]]) -> list[GridRun]:
    """All runs of a grid.

    Args:
        grid: values by option.

    Returns:
        A run for each combination; the last option varies fastest.

    Raises:
        ValueError: two runs would have the same folder.
    """
    runs = []
    for values in itertools.product(*grid.values()):
        options = dict(zip(grid, values, strict=True))
        # A value may be a path; a folder's name has no separator.
        name = ",".join(f"{option}={_UNSAFE.sub('_', value)}" for option, value in options.items())
        runs.append(GridRun(name, options))
    names = [run.name for run in runs]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"two runs would have the folder {repeated[0]}: sweep them one by one")
    return runs


def words_of(run: GridRun, folder: Path, config: str | None, further: Sequence[str]) -> list[str]:
    """The command line of a run, after the name of the command.

    Args:
        run: of the grid.
        folder: its output folder.
        config: file of options.
        further: words that all runs have.

    Returns:
        The words; a run that has begun goes on.
    """
    file = [] if config is None else ["--config", config]
    swept = [f"--{option}={value}" for option, value in run.options.items()]
    return [*file, *further, *swept, f"--output_dir={folder}", "--resume=auto"]


def as_number(value: str) -> int | float | str:
    """A value as it was typed, for a file of results.

    Args:
        value: text.

    Returns:
        The number that it is, or the text.
    """
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value
