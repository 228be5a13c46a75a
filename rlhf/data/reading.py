"""Rows from files, a folder, a saved data set or the hub."""

import glob
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import datasets
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
from datasets.fingerprint import Hasher

from rlhf.data.tables import as_table, chain_rows, content_key
from rlhf.data.text_files import READERS, suffix

Rows: TypeAlias = Dataset | IterableDataset

_PARQUET = ".parquet"
_FORMATS = (*READERS, _PARQUET)
_SAVED_FILES = ("state.json", "dataset_dict.json")  # `datasets` writes one of them with a saved data set
# RuntimeError: a folder with code, which `datasets` no longer runs.
_LOADING_ERRORS = (DatasetGenerationError, ValueError, OSError, EOFError, StopIteration, RuntimeError)


def load_data(source: str, split: str = "train", name: str | None = None, streaming: bool = False) -> Rows:
    """Load rows.

    Text stays text, and objects keep their own keys, in every text format. ``dataset.info.dataset_name`` holds the
    source, for error messages.

    Args:
        source: A file of JSON, JSON lines, Parquet, CSV, TSV or plain text (a row a line), all but Parquet also
            compressed (.gz, .bz2, .xz, .zst); a pattern (``data/*.jsonl``); a folder of such files, or one saved by
            ``datasets``; or a name on the hub.
        split: Split of a folder or a hub data set, or a slice of it (``train[:1000]``). Files are all ``train``.
        name: Configuration of a hub data set.
        streaming: Whether rows are read one by one while training, and not kept.

    Returns:
        The rows.

    Raises:
        FileNotFoundError: There is no such file or folder, or no file matches the pattern.
        ValueError: A file cannot be read; names the file and, for text formats, the row.
    """
    source_path = Path(source).expanduser()
    # Names on the hub have at most one slash; any other text is a path, if only to a file that is not there.
    is_path = suffix(source_path) in _FORMATS or source.startswith((".", "/", "~")) or source.count("/") > 1
    try:
        if source_path.is_file():
            with _uncounted():
                rows = _from_files([source_path], split, streaming)
        elif source_path.is_dir():
            with _uncounted():
                rows = _from_folder(source_path, split, name, streaming)
        elif glob.has_magic(source):
            with _uncounted():
                rows = _from_files(_matching_files(source_path), split, streaming)
        elif is_path:
            raise FileNotFoundError(f"{source}: no such file or folder")
        else:
            rows = _from_hub(source, split, name, streaming)
    except _LOADING_ERRORS as error:
        names_file = str(error).startswith(str(source_path))
        if isinstance(error, FileNotFoundError) or names_file:
            raise
        raise ValueError(f"{source}: {_first_line(error)}") from error
    # The rows of a slice are numbered within it, so the name has to tell the slice.
    rows.info.dataset_name = f"{source} ({split})" if "[" in split else source
    return rows


@contextmanager
def _uncounted() -> Iterator[None]:
    """Ask no server: ``datasets`` counts each loading there, also that of a file of one's own."""
    config = datasets.config
    counts_before, config.HF_UPDATE_DOWNLOAD_COUNTS = config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts_before


# Files


def _matching_files(pattern: Path) -> list[Path]:
    paths = map(Path, glob.glob(str(pattern), recursive=True))
    # `glob` lists files in the order of the disk, which differs between machines.
    files = sorted(matching_path for matching_path in paths if matching_path.is_file())
    if not files:
        raise FileNotFoundError(f"{pattern}: no file matches")
    return files


def _from_files(files: list[Path], split: str, streaming: bool) -> Rows:
    for data_file in files:
        if suffix(data_file) not in _FORMATS:
            raise ValueError(f"{data_file}: cannot tell the format; rename it to one of {', '.join(_FORMATS)}")
    parquet_files = [data_file for data_file in files if suffix(data_file) == _PARQUET]
    if not parquet_files:
        return _slice({"train": _from_text(files, streaming)}, split)
    if len(parquet_files) < len(files):
        other_file = next(data_file for data_file in files if data_file not in parquet_files)
        raise ValueError(f"{parquet_files[0]} and {other_file.name} are of two kinds: name them as two data sets")
    return _slice({"train": _from_parquet(files, streaming)}, split)


def _from_text(files: list[Path], streaming: bool) -> Rows:
    if streaming:
        return IterableDataset.from_generator(chain_rows, gen_kwargs={"files": files})
    return as_table(files)


def _from_parquet(files: list[Path], streaming: bool) -> Any:
    # `datasets` takes names as patterns: a bracket in a folder's name would match nothing.
    file_patterns = [glob.escape(str(file)) for file in files]
    try:
        if streaming:
            return load_dataset("parquet", data_files=file_patterns, split="train", streaming=True)
        return _load_by_content(files, "parquet", data_files=file_patterns, split="train")
    except _LOADING_ERRORS as error:
        # The outer error of `datasets` only tells that a table could not be made.
        root_cause = error.__cause__ or error
        raise ValueError(f"{files[0]}: cannot be read ({_first_line(root_cause)})") from error


def _load_by_content(files: list[Path], *args: Any, **kwargs: Any) -> Dataset:
    """``load_dataset`` of local files, whose content counts: its own cache goes by the time of a file."""
    key = content_key(files)
    rows: Any = load_dataset(*args, **kwargs, cache_dir=str(Path(datasets.config.HF_DATASETS_CACHE) / "rows" / key))
    # Later caches build on the fingerprint, so it too has to name the content.
    return Dataset(rows.data, rows.info, rows.split, fingerprint=Hasher.hash((rows._fingerprint, key)))


# Folders and the hub


def _from_folder(path: Path, split: str, name: str | None, streaming: bool) -> Rows:
    if any((path / file).exists() for file in _SAVED_FILES):
        saved_data = load_from_disk(str(path))
        splits = dict(saved_data) if isinstance(saved_data, DatasetDict) else {"train": saved_data}
        rows = _slice(splits, split)
        return rows.to_iterable_dataset() if streaming else rows

    # `datasets` finds the splits by the names of files; text is then read here, where no type is guessed.
    text_files = _text_files_of(path)
    if text_files is None and streaming:
        return load_dataset(str(path), name, split=split, streaming=True)
    if text_files is None:
        return _load_by_content(_visible_files(path), str(path), name, split=split)
    wanted_split = _split_name(split)
    if wanted_split not in text_files:
        raise ValueError(f"{path}: no split {split!r}; it has {', '.join(text_files)}")
    return _slice({wanted_split: _from_text(text_files[wanted_split], streaming)}, split)


def _visible_files(folder: Path) -> list[Path]:
    """All files that ``datasets`` may read of a folder: it passes over hidden ones."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _text_files_of(path: Path) -> dict[str, list[Path]] | None:
    """The files of each split of a folder; None if some are not text, so that ``datasets`` has to read the folder."""
    try:
        patterns = get_data_patterns(str(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: holds no file of {', '.join(_FORMATS)}") from None
    files = {
        split: [Path(data_file) for data_file in file_names]
        for split, file_names in DataFilesDict.from_patterns(patterns, base_path=str(path)).items()
    }
    are_text = all(
        file_names and all(suffix(data_file) in READERS for data_file in file_names) for file_names in files.values()
    )
    return files if are_text else None


def _from_hub(source: str, split: str, name: str | None, streaming: bool) -> Rows:
    try:
        if not streaming:
            return load_dataset(source, name, split=split)
        wanted_split = _split_name(split)  # `datasets` slices no streams
        return _slice({wanted_split: load_dataset(source, name, split=wanted_split, streaming=True)}, split)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: neither a file here nor a data set on the hub ({_first_line(error)})") from error


# Slices


def _split_name(split: str) -> str:
    """The split of a slice: ``train`` of ``train[:1000]``."""
    return re.split(r"\W", split)[0]


def _slice(splits: Mapping[str, Rows], split: str) -> Any:
    """The rows of a split, or of a slice of it (``train[:1000]``)."""
    split_tables = {split_name: rows for split_name, rows in splits.items() if isinstance(rows, Dataset)}
    if not split_tables:
        return _slice_stream(splits, split)
    split_lengths = {split_name: len(rows) for split_name, rows in split_tables.items()}
    instructions = ReadInstruction.from_spec(split).to_absolute(split_lengths)
    first = instructions[0]
    # `select` would give the whole table a new fingerprint, and later caches new keys.
    if len(instructions) == 1 and (first.from_, first.to) == (0, split_lengths[first.splitname]):
        return split_tables[first.splitname]
    return concatenate_datasets(
        [split_tables[part.splitname].select(range(part.from_, part.to)) for part in instructions]
    )


def _slice_stream(splits: Mapping[str, Any], split: str) -> IterableDataset:
    slice_match = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", split)
    if slice_match is None:
        raise ValueError(f"split {split!r} needs the number of rows, which a stream does not know: use train[:1000]")
    split_name, slice_start, slice_end = slice_match.groups()
    if split_name not in splits:
        raise ValueError(f"no split {split_name!r}; it has {', '.join(splits)}")
    rows = splits[split_name]
    num_skipped = int(slice_start or 0)
    if num_skipped:
        rows = rows.skip(num_skipped)
    return rows.take(max(int(slice_end) - num_skipped, 0)) if slice_end else rows


def _first_line(error: BaseException) -> str:
    message_lines = str(error).splitlines()
    return message_lines[0] if message_lines else type(error).__name__
