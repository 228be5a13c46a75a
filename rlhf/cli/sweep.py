"""``rlhf sweep``: one run for each combination of some options, each in a process of its own, and a table of all."""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.cli.commands import COMMANDS, TrainingCommand
from rlhf.cli.exit_codes import ExitCode
from rlhf.cli.options import RaisingParser, config_folder, value_of
from rlhf.cli.sweep_grid import DEFAULT_SEED, SEED, GridRun, as_number, command_of, grid_of, runs_of, words_of
from rlhf.cli.sweep_table import sweep_table
from rlhf.runs.comparable import last_figures, scaled_by
from rlhf.runs.files import RECORD, REPORT_FILE, Run, read_run, write_whole
from rlhf.visible import visible

SWEEP_FILE = "sweep.json"
_FINISHED = "finished"  # a run's record says so
_RESULTS = "all_results.json"  # the last file of a run
_NOT_RUN = "not run"
_STOPPED = (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
_DESCRIPTION = """\
Train once for each combination of values, and compare the runs. Each run is a process of its own, with a folder in
--output_dir. The same command goes on with a sweep that was stopped: finished runs are skipped. A run that fails is
named, and the others go on. All further options, such as --max_steps 100, are those of the command, for all runs."""
_EXAMPLE = "Example: rlhf sweep --config dpo.yaml --set beta=0.05,0.1,0.2 --seeds 3"


@dataclass
class SweepRun:
    """A run of a sweep, and how far it is.

    Attributes:
        point: of the grid.
        folder: of the run.
        status: ``finished``, ``not run``, ``failed (status 2)`` or ``stopped``.
        run: as its folder describes it; None where it has no record.
    """

    point: GridRun
    folder: Path
    status: str = _NOT_RUN
    run: Run | None = None

    @property
    def figures(self) -> dict[str, float]:
        """The last value of each metric."""
        return {} if self.run is None else last_figures(self.run.metrics)

    def read(self) -> None:
        """Read what its folder says."""
        try:
            self.run = read_run(self.folder)
        except ValueError:
            return
        # Its record ends with training; the final model and its evaluation come after that.
        if self.run.record.get("status") == _FINISHED and (self.folder / _RESULTS).exists():
            self.status = _FINISHED

    def as_record(self) -> dict[str, Any]:
        """For the file of the sweep."""
        record = {} if self.run is None else self.run.record
        return {
            "name": self.point.name,
            "options": {name: as_number(value) for name, value in self.point.options.items()},
            "folder": str(self.folder),
            "status": self.status,
            "seconds": record.get("seconds"),
            "metrics": self.figures if self.status == _FINISHED else {},
        }


def run(argv: list[str]) -> int:
    """Run a sweep.

    Args:
        argv: words of the command line, after the command.

    Returns:
        0 where all runs are finished; that of the first run that failed; or that of the signal that stopped the sweep.

    Raises:
        ValueError, OSError: bad options, or a folder that holds another sweep.
    """
    named = argv[0] if argv and not argv[0].startswith("-") else None
    options, further = _parser().parse_known_args(argv[named is not None :])
    command = _command(named, options.config)
    for name in ("resume", "resume_from_checkpoint", "overwrite"):
        if any(word.split("=")[0].replace("-", "_") == f"__{name}" for word in further):
            raise ValueError(f"--{name}: a sweep goes on by itself; choose another --output_dir to begin anew")
    file_values = _values_of_file(options.config)
    output_folder = Path(value_of("output_dir", further) or file_values.get("output_dir") or "")
    if output_folder == Path():
        raise ValueError("--output_dir is missing: the folder of all runs, on the command line or in the config file")
    further = _without_output(further)
    first_seed = int(value_of(SEED, further) or file_values.get(SEED) or DEFAULT_SEED)
    grid = grid_of(command, options.set or [], options.seeds, first_seed)
    runs = [SweepRun(point, output_folder / point.name) for point in runs_of(grid)]
    shared = {"command": command, "config": file_values, "words": further}
    _check_same_sweep(output_folder / SWEEP_FILE, shared)
    for entry in runs:
        entry.read()
    if options.metric is not None:
        _warn_of_scale(options.metric, grid)

    def launch(entry: SweepRun) -> int:
        words = words_of(entry.point, entry.folder, options.config, further)
        return run_command([command, *words])

    if options.dry_run:
        for entry in runs:
            words = words_of(entry.point, entry.folder, options.config, further)
            print(visible(f"{entry.status:9} rlhf {command} {shlex.join(words)}"))
        return ExitCode.SUCCESS

    def save() -> None:
        write_sweep(output_folder / SWEEP_FILE, {**shared, "grid": grid}, runs)

    status = run_all(runs, launch, save)
    _show(runs, list(grid), options.metric, output_folder)
    return status


def run_all(runs: Sequence[SweepRun], launch: Callable[[SweepRun], int], save: Callable[[], None]) -> int:
    """Run what is not finished, one after the other.

    Args:
        runs: of the sweep, each read from its folder.
        launch: trains a run and returns its exit status.
        save: writes the state of the sweep; called after each run.

    Returns:
        The exit status of the sweep.
    """
    failed: int = ExitCode.SUCCESS
    for number, entry in enumerate(runs, start=1):
        if entry.status == _FINISHED:
            print(visible(f"run {number} of {len(runs)}: {entry.point.name}: finished already"))
            continue
        print(visible(f"run {number} of {len(runs)}: {entry.point.name}"), flush=True)
        status = launch(entry)
        entry.read()
        if status in _STOPPED:
            entry.status = "stopped"
            save()
            print("stopped; the same command goes on with the sweep", file=sys.stderr)
            return status
        if status != ExitCode.SUCCESS:
            entry.status = f"failed (status {status})"
            failed = failed or status
            print(visible(f"{entry.point.name}: failed with status {status}; the sweep goes on"), file=sys.stderr)
        save()
    save()
    return failed


def run_command(words: Sequence[str]) -> int:
    """Run ``rlhf`` with these words as a process of its own, and wait for it.

    Args:
        words: the command and its options.

    Returns:
        Its exit status, as a shell reports it.
    """
    process = subprocess.Popen([sys.executable, "-m", "rlhf", *words])
    with _passed_on(process):
        status = process.wait()
    return status if status >= 0 else 128 - status


@contextmanager
def _passed_on(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Pass SIGTERM on to a process. Ctrl-C reaches it by itself, as it is in the same group; we wait for its end."""
    handlers: Mapping[int, Any] = {
        signal.SIGTERM: lambda *_: process.terminate(),
        signal.SIGINT: lambda *_: None,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_sweep(file: Path, shared: Mapping[str, Any], runs: Sequence[SweepRun]) -> None:
    """Write the state of a sweep, whole or not at all.

    Args:
        file: ``sweep.json``.
        shared: what all runs have.
        runs: of the sweep.

    Raises:
        OSError: the file cannot be written.
    """
    content = {**shared, "runs": [entry.as_record() for entry in runs]}
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def _parser() -> RaisingParser:
    parser = RaisingParser(
        "rlhf sweep",
        usage="rlhf sweep [COMMAND] --config FILE --set OPTION=A,B [--OPTION VALUE ...]",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options, or a run.yaml")
    parser.add_argument("--set", action="append", metavar="OPTION=VALUES", help="values of an option; may be repeated")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds of each combination")
    parser.add_argument("--metric", metavar="NAME", help="to sort by; by default one that compares across the sweep")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="show the commands, and run nothing")
    return parser


def _training_commands() -> list[str]:
    return [name for name, command in COMMANDS.items() if isinstance(command, TrainingCommand)]


def _command(named: str | None, config: str | None) -> str:
    """The command that was named, else that of the file of options."""
    if named is not None and named not in _training_commands():
        raise ValueError(f"{named} is no command that trains: one of {', '.join(_training_commands())}")
    if named is not None:
        return named
    if config is None:
        raise ValueError("neither a command nor --config: write `rlhf sweep dpo --set ...`, or name a file of options")
    return command_of(config)


def _values_of_file(config: str | None) -> dict[str, Any]:
    """The values of a file of options, without setting environment variables; the runs check them."""
    if config is None:
        return {}
    path = Path(config) if Path(config).exists() else config_folder() / Path(config).name
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"{config}: no such config file") from None
    if not isinstance(values, dict):
        raise ValueError(f"{config}: expected `option: value` lines, found a {type(values).__name__}")
    return {name: value for name, value in values.items() if name != RECORD}


def _without_output(words: Sequence[str]) -> list[str]:
    """The words without ``--output_dir``, of which each run has its own."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word.replace("-", "_").startswith("__output_dir"):
            skip = "=" not in word
        else:
            kept.append(word)
    return kept


def _check_same_sweep(file: Path, shared: Mapping[str, Any]) -> None:
    """Runs that are finished already must be those that this sweep would make; its grid may have grown."""
    if not file.exists():
        return
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    now = json.loads(json.dumps(shared, default=str))
    for name, value in now.items():
        before = earlier.get(name)
        if before == value:
            continue
        if isinstance(before, dict) and isinstance(value, dict):
            name = next(key for key in {**before, **value} if before.get(key) != value.get(key))
            before, value = before.get(name), value.get(name)
        raise ValueError(f"{file}: its runs have {name} {before}, this sweep has {value}; choose another --output_dir")


def _warn_of_scale(metric: str, grid: Mapping[str, Any]) -> None:
    options = scaled_by(metric, grid)
    if options:
        print(visible(f"warning: {metric} has a scale that {', '.join(options)} sets; its values do not compare"))


def _show(runs: Sequence[SweepRun], swept: Sequence[str], metric: str | None, folder: Path) -> None:
    """Print the table, and write the report of all runs that have one."""
    # Imports of the report only here: --dry_run and a mistyped option answer at once.
    from rlhf.runs.report import write_report

    finished = [entry for entry in runs if entry.status == _FINISHED]
    print()
    for line in sweep_table([(entry.point.options, entry.figures) for entry in finished], swept, metric):
        print(visible(line))
    for entry in runs:
        if entry.status != _FINISHED:
            print(visible(f"{entry.point.name}: {entry.status}"))
    if finished:
        write_report([entry.run for entry in finished if entry.run is not None], folder / REPORT_FILE)
        print(visible(f"report of all runs: {folder / REPORT_FILE}"))
