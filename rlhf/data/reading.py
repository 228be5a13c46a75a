"""Rows from a file, a saved folder or the hub."""

import gzip
import json
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.arrow_reader import ReadInstruction
from datasets.exceptions import DatasetGenerationError

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_data(source: str, split: str = "train", name: str | None = None) -> Dataset:
    """Load rows, remembering where they came from for error messages (``dataset.info.dataset_name``).

    Args:
        source: a JSON, JSONL (each also .gz), Parquet or CSV file; a folder saved by ``datasets``; a hub name.
        split: split of a folder or a hub data set, or a slice of it (``train[:1000]``); a single file is all ``train``.
        name: configuration of a hub data set.
    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: the file cannot be read; names the file and, for JSON, the line.
    """
    path = Path(source).expanduser()
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if path.is_file():
        if suffix not in _BUILDERS:
            raise ValueError(f"{source}: cannot tell the format; rename it to one of {', '.join(_BUILDERS)} (or .gz)")
        try:
            dataset = load_dataset(_BUILDERS[suffix], data_files=str(path), split=split)
        except (DatasetGenerationError, ValueError, OSError, EOFError, StopIteration) as error:
            fault = _json_fault(path) if _BUILDERS[suffix] == "json" else None
            raise ValueError(
                f"{source}: {fault or f'cannot be read ({_first_line(error.__cause__ or error)})'}"
            ) from error
    elif path.is_dir():
        saved = any((path / mark).exists() for mark in ("state.json", "dataset_dict.json"))
        try:
            dataset = _saved_split(path, split) if saved else load_dataset(str(path), split=split)
        except (DatasetGenerationError, ValueError) as error:
            raise ValueError(f"{source}: {_first_line(error)}") from error
    elif suffix in _BUILDERS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"{source}: no such file or folder")
    else:
        try:
            dataset = load_dataset(source, name, split=split)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{source}: neither a file here nor a data set on the hub ({_first_line(error)})"
            ) from error
    dataset.info.dataset_name = source
    return dataset


def _saved_split(path: Path, split: str) -> Dataset:
    saved = load_from_disk(str(path))
    splits = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _json_fault(path: Path) -> str | None:
    """Why a JSON or JSONL file cannot be read, with its line; None when nothing is found."""
    opener = gzip.open if path.suffix == ".gz" else open
    types: dict[str, tuple[str, int]] = {}
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.lstrip().startswith("["):
                    json.loads(line + file.read())  # one JSON array
                    return None
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    return f"row {number} is a {type(row).__name__}, not an object with columns"
                for column, value in row.items():
                    kind, first = types.setdefault(column, (type(value).__name__, number))
                    if value is not None and kind != "NoneType" and kind != type(value).__name__:
                        return (
                            f"row {number}: {column!r} is a {type(value).__name__}, but a {kind} in row {first}; "
                            "give every row the same type"
                        )
    except json.JSONDecodeError as error:
        return f"row {number} is not valid JSON ({error.msg} at character {error.pos + 1}); mend or delete that line"
    except EOFError:
        return f"the gzip file ends early, after row {number}; copy or download it again"
    except UnicodeDecodeError as error:
        return f"after row {number}: not UTF-8 text ({error.reason})"
    except OSError as error:
        return f"cannot be read ({error})"
    return "the file is empty" if number == 0 else None
