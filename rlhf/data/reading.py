"""Rows from files, a saved folder or the hub."""

import glob
import re
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.arrow_reader import ReadInstruction
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError

from rlhf.data.tables import as_table, chain_rows
from rlhf.data.text_files import READERS, suffix

_PARQUET = ".parquet"
_FORMATS = (*READERS, _PARQUET)
_FAULTS = (DatasetGenerationError, ValueError, OSError, EOFError, StopIteration)


def load_data(
    source: str, split: str = "train", name: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """Load rows, remembering where they came from for error messages (``dataset.info.dataset_name``).

    Text stays text, and objects keep their own keys, in every text format.

    Args:
        source: a file of JSON, JSON lines, Parquet, CSV, TSV or plain text (a row a line), all but Parquet also .gz,
            .bz2, .xz or .zst; a pattern (``data/*.jsonl``); a folder of such files, or one saved by ``datasets``; a hub
            name.
        split: split of a folder or a hub data set, or a slice of it (``train[:1000]``); files are all ``train``.
        name: configuration of a hub data set.
        streaming: read row by row while training, and keep none.
    Raises:
        FileNotFoundError: no such file or folder, or nothing matches the pattern.
        ValueError: the file cannot be read; names the file and, for text formats, the row.
    """
    path = Path(source).expanduser()
    try:
        if path.is_file():
            rows = _from_files([path], split, streaming)
        elif path.is_dir():
            rows = _from_folder(path, split, name, streaming)
        elif glob.has_magic(source):
            rows = _from_files(_matching(path), split, streaming)
        elif suffix(path) in _FORMATS or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise FileNotFoundError(f"{source}: no such file or folder")
        else:
            rows = _from_hub(source, split, name, streaming)
    except _FAULTS as error:
        if isinstance(error, FileNotFoundError) or str(error).startswith(str(path)):
            raise
        raise ValueError(f"{source}: {_first_line(error)}") from error
    # Rows of a slice are numbered within it.
    rows.info.dataset_name = f"{source} ({split})" if "[" in split else source
    return rows


def _matching(pattern: Path) -> list[Path]:
    files = sorted(Path(file) for file in glob.glob(str(pattern), recursive=True) if Path(file).is_file())
    if not files:
        raise FileNotFoundError(f"{pattern}: no file matches")
    return files


def _from_files(files: list[Path], split: str, streaming: bool) -> Dataset | IterableDataset:
    kinds = {file: suffix(file) for file in files}
    if unknown := [file for file, kind in kinds.items() if kind not in _FORMATS]:
        raise ValueError(f"{unknown[0]}: cannot tell the format; rename it to one of {', '.join(_FORMATS)}")
    columnar = [file for file, kind in kinds.items() if kind == _PARQUET]
    if columnar and len(columnar) < len(files):
        other = next(file for file in files if file not in columnar)
        raise ValueError(f"{columnar[0]} and {other.name} are of two kinds: name them as two data sets")
    if streaming:
        return _sliced_stream({"train": _stream(files, bool(columnar))}, split)
    rows = _parquet(files, False) if columnar else as_table(files)
    return _sliced({"train": rows}, split)


def _stream(files: list[Path], columnar: bool) -> IterableDataset:
    if columnar:
        return _parquet(files, True)
    return IterableDataset.from_generator(chain_rows, gen_kwargs={"files": files})


def _parquet(files: list[Path], streaming: bool) -> Any:
    names = [glob.escape(str(file)) for file in files]
    try:
        return load_dataset("parquet", data_files=names, split="train", streaming=streaming)
    except _FAULTS as error:
        raise ValueError(f"{files[0]}: cannot be read ({_first_line(error.__cause__ or error)})") from error


def _from_folder(path: Path, split: str, name: str | None, streaming: bool) -> Dataset | IterableDataset:
    if any((path / mark).exists() for mark in ("state.json", "dataset_dict.json")):
        saved = load_from_disk(str(path))
        splits = dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
        rows = _sliced(splits, split)
        return rows.to_iterable_dataset() if streaming else rows
    try:
        patterns = get_data_patterns(str(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: holds no file of {', '.join(_FORMATS)}") from None
    found = DataFilesDict.from_patterns(patterns, base_path=str(path))
    files = {key: [Path(file) for file in names if suffix(Path(file)) in READERS] for key, names in found.items()}
    if all(files[key] and len(files[key]) == len(found[key]) for key in found):
        parts = {key: value for key, value in files.items() if key == re.split(r"\W", split)[0]}
        if not parts:
            raise ValueError(f"{path}: no split {split!r}; it has {', '.join(map(str, found))}")
        if streaming:
            return _sliced_stream({key: _stream(value, False) for key, value in parts.items()}, split)
        return _sliced({key: as_table(value) for key, value in parts.items()}, split)
    return load_dataset(str(path), name, split=split, streaming=streaming)


def _from_hub(source: str, split: str, name: str | None, streaming: bool) -> Dataset | IterableDataset:
    try:
        if streaming:
            base = re.split(r"\W", split)[0]
            return _sliced_stream({base: load_dataset(source, name, split=base, streaming=True)}, split)
        return load_dataset(source, name, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: neither a file here nor a data set on the hub ({_first_line(error)})") from error


def _sliced(splits: dict[str, Dataset], split: str) -> Dataset:
    parts = ReadInstruction.from_spec(split).to_absolute({key: len(rows) for key, rows in splits.items()})
    if len(parts) == 1 and parts[0].from_ == 0 and parts[0].to == len(splits[parts[0].splitname]):
        return splits[parts[0].splitname]
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _sliced_stream(splits: dict[str, IterableDataset], split: str) -> IterableDataset:
    found = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", split)
    if found is None:
        raise ValueError(f"split {split!r} needs the number of rows, which a stream does not know: use train[:1000]")
    base, start, end = found.groups()
    if base not in splits:
        raise ValueError(f"no split {base!r}; it has {', '.join(splits)}")
    rows = splits[base]
    first = int(start or 0)
    rows = rows.skip(first) if first else rows
    return rows.take(max(int(end) - first, 0)) if end else rows


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
