"""The files of a run: their names, lines that are appended to them, and a run as it is read from its folder."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RUN_FILE = "run.yaml"  # the options of the run, and under RECORD what they ran on
METRICS_FILE = "metrics.jsonl"  # a line for each line of the log
SAMPLES_FILE = "samples.jsonl"  # answers to the same prompts at each evaluation
COMPLETIONS_FILE = "completions.jsonl"  # samples of rollouts
CARD_FILE = "README.md"  # the model card
REPORT_FILE = "report.html"
RECORD = "record"  # key of RUN_FILE; `--config` passes over it
_STATE_FILE = "trainer_state.json"  # of transformers


@dataclass(frozen=True)
class Run:
    """A run, as its folder describes it.

    Attributes:
        folder: its ``output_dir``.
        options: those that were given, by name.
        record: command, versions, data files, machine and so on (docs/places.md lists the keys); empty where there is
            no ``run.yaml``.
        metrics: the lines of ``metrics.jsonl``, each with ``step`` and ``epoch``.
        samples: the lines of ``samples.jsonl``.
        completions: the lines of ``completions.jsonl``.
    """

    folder: Path
    options: dict[str, Any]
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    completions: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.resolve().name


def read_run(folder: Path | str) -> Run:
    """Read a run from its folder, also while it is being written.

    Args:
        folder: ``output_dir`` of the run. One of an older version, which has a ``trainer_state.json`` alone, will do;
            so will a copy of that file.

    Returns:
        The run.

    Raises:
        ValueError: the folder holds no run, or a file cannot be read.
    """
    folder = Path(folder)
    if folder.is_file():
        return _read_state_file(folder)
    run_file, state_file = folder / RUN_FILE, folder / _STATE_FILE
    if not (run_file.exists() or state_file.exists()):
        raise ValueError(f"{folder}: no run in this folder (neither {RUN_FILE} nor {_STATE_FILE}); name its output_dir")
    options = _read_yaml(run_file) if run_file.exists() else {}
    record = options.pop(RECORD, None) or {}
    metrics = read_lines(folder / METRICS_FILE)
    if not metrics and state_file.exists():
        metrics = list(_read_json(state_file).get("log_history", []))
    return Run(
        folder=folder,
        options=options,
        record=record,
        metrics=metrics,
        samples=read_lines(folder / SAMPLES_FILE),
        completions=read_lines(folder / COMPLETIONS_FILE),
    )


def _read_state_file(file: Path) -> Run:
    """A run of which only the state of its trainer is left, such as ``dpo_state.json``."""
    metrics = _read_json(file).get("log_history")
    if not isinstance(metrics, list):
        raise ValueError(f"{file}: no state of a trainer (it has no log_history); name the output_dir of a run")
    place = file.with_name(file.stem.removesuffix("_state"))
    return Run(place, options={}, record={}, metrics=metrics, samples=[], completions=[])


def append_line(file: Path, entry: Mapping[str, Any]) -> None:
    """Append an entry to a file of JSON lines.

    Args:
        file: made, with its folder, where it is missing.
        entry: a number that is not finite becomes null, as JSON has no word for it.

    Raises:
        OSError: the file cannot be written.
    """
    line = json.dumps(_finite(entry), ensure_ascii=False, default=float)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(line + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Args:
        file: its folder is made.
        text: its content.

    Raises:
        OSError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, as only there a rename replaces a file at once.
    temporary_file = file.with_name(f".{file.name}")
    try:
        temporary_file.write_text(text, encoding="utf-8")
        os.replace(temporary_file, file)
    finally:
        temporary_file.unlink(missing_ok=True)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The entries of a file of JSON lines; none where it is missing.

    Args:
        file: its last line may be cut off, as in a run that was killed: it is left out.

    Returns:
        An entry for each line.

    Raises:
        ValueError: another line is no JSON object.
    """
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    entries = []
    # What stands behind the last line break is empty, or a line that was not written to its end.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: no JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{file}, line {number}: expected a JSON object, found a {type(entry).__name__}")
        entries.append(entry)
    return entries


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected `option: value` lines, found a {type(content).__name__}")
    return content


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found a {type(content).__name__}")
    return content
