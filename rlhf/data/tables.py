"""Rows of text files as a table on disk; each column has the type that all of its values have."""

import json
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
import xxhash
from datasets import Dataset, DatasetInfo, Features, List, Value
from datasets.features.features import register_feature
from datasets.fingerprint import Hasher
from datasets.utils import tqdm
from filelock import FileLock

from rlhf.data.errors import error_context
from rlhf.data.text_files import Row, read_rows

_VERSION = 3  # part of the cache key: raise it when the same file becomes another table
_HASHED_BYTES = 2**20  # read at a time
_LEFT_OVER_SECONDS = 24 * 3600
_BATCH_ROWS = 500  # rows that are in memory at once
_SCALARS: dict[type, str] = {str: "string", bool: "bool", int: "int64", float: "float64"}
# The type of a column: None as long as only nulls were seen, the name of a scalar, [type of the items], or the types of
# an object's values under its keys.
_Type = str | list[Any] | dict[str, Any] | None
_JSON = "json"  # the type of values that have no common one: objects with different keys, or several types


@dataclass
class JsonText:
    """The type of a column whose values are kept as JSON text: objects with different keys, or several types.

    ``datasets.Json`` would read 0.6 as 0.6000000000000001, and write ten digits.
    """

    id: str | None = field(default=None, repr=False)
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="JsonText", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value, ensure_ascii=False)

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        return None if value is None else json.loads(value)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        """Convert the values that a batched ``map`` returns."""
        if pa.types.is_string(storage.type) or pa.types.is_null(storage.type):
            return storage.cast(pa.string())
        return pa.array([self.encode_example(value) for value in storage.to_pylist()], pa.string())


with warnings.catch_warnings(action="ignore"):  # types of one's own are experimental in `datasets`
    register_feature(JsonText, "JsonText")


def as_table(files: list[Path]) -> Dataset:
    """Read text files into a table in the cache of ``datasets``, which is mapped into memory.

    A column of objects with different keys, or of several types, becomes :class:`JsonText`. So no row gets the keys of
    another, and no text becomes a number.

    Args:
        files: The files, in order.

    Returns:
        All rows.

    Raises:
        ValueError: A row cannot be read; names the file, the row and the fault.
    """
    cache_key = content_key(files)
    cache_folder = Path(datasets.config.HF_DATASETS_CACHE) / "rows"
    cache_folder.mkdir(parents=True, exist_ok=True)
    table_path = cache_folder / f"{cache_key}.arrow"
    _remove_left_over(cache_folder)
    with FileLock(cache_folder / f"{cache_key}.lock"):  # several processes may load the same files
        if not table_path.exists():
            _write_table(files, table_path)
    rows = Dataset.from_file(str(table_path))
    # Later caches build on this fingerprint, so it names the files and not the place of the table.
    return Dataset(rows.data, info=DatasetInfo(features=rows.features), fingerprint=cache_key)


def table_of_rows(rows: list[Row]) -> Dataset:
    """A table in memory, with the same types of columns as :func:`as_table`.

    Args:
        rows: Plain values, as JSON has them.

    Returns:
        All rows.

    Raises:
        ValueError: A text is no Unicode; names the row.
    """
    column_types = _types_of_columns(rows)
    features = Features({column: _feature(column_type) for column, column_type in column_types.items()})
    # Later caches build on the fingerprint, so it names the content.
    return Dataset(
        pa.Table.from_batches(_batches(rows, column_types, features.arrow_schema)),
        info=DatasetInfo(features=features),
        fingerprint=Hasher.hash((_VERSION, rows)),
    )


def hash_of_file(file: Path) -> str:
    """Hash the bytes of a file, at some GB in a second.

    Args:
        file: Any file.

    Returns:
        Its xxh3 of 128 bits, in hexadecimal digits.
    """
    digest = xxhash.xxh3_128()
    with file.open("rb") as binary_file:
        while block := binary_file.read(_HASHED_BYTES):
            digest.update(block)
    return digest.hexdigest()


def content_key(files: list[Path]) -> str:
    """A cache key of files by their bytes. A time may stay where the content does not.

    Args:
        files: The files, in order.

    Returns:
        A key, in hexadecimal digits.
    """
    # The name tells the format.
    return Hasher.hash((_VERSION, [(file.name, hash_of_file(file)) for file in files]))


def chain_rows(files: list[Path]) -> Iterator[Row]:
    """The rows of several files, one after the other; an error names the file."""
    for data_file in files:
        with error_context(str(data_file)):
            yield from read_rows(data_file)


def _remove_left_over(folder: Path) -> None:
    """Remove temporary files of ``datasets.map`` that nobody has written to for a day: their runs were killed."""
    for file in folder.glob("tmp*"):
        with suppress(FileNotFoundError):  # another run removed it
            if time.time() - file.stat().st_mtime > _LEFT_OVER_SECONDS:
                file.unlink()


def _write_table(files: list[Path], table: Path) -> None:
    """Read all rows twice: to find the type of each column, and to write them."""
    num_rows = 0

    def counted() -> Iterator[Row]:
        nonlocal num_rows
        for num_rows, row in enumerate(_with_progress(chain_rows(files), "Reading"), start=1):  # noqa: B007
            yield row

    column_types = _types_of_columns(counted())
    schema = Features({column: _feature(column_type) for column, column_type in column_types.items()}).arrow_schema

    all_rows = _with_progress(chain_rows(files), "Writing", num_rows)
    # One name for all processes, as only the one with the lock writes: what a killed run left is written over.
    unfinished = table.with_suffix(".new")
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in _batches(all_rows, column_types, schema):
                writer.write_batch(batch)
        # Renamed when it is complete: a run that is killed leaves no half table.
        unfinished.replace(table)
    finally:
        unfinished.unlink(missing_ok=True)


def _batches(rows: Iterable[Row], column_types: dict[str, _Type], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows as Arrow has them, some at a time."""
    row_iterator = iter(rows)
    rows_before = 0
    while row_batch := list(islice(row_iterator, _BATCH_ROWS)):
        column_arrays = [
            _array(row_batch, column, column_type, schema.field(column).type, rows_before)
            for column, column_type in column_types.items()
        ]
        yield pa.RecordBatch.from_arrays(column_arrays, schema=schema)
        rows_before += len(row_batch)


def _with_progress(rows: Iterable[Row], description: str, total: int | None = None) -> Iterable[Row]:
    return tqdm(rows, desc=description, total=total, unit=" rows", delay=3, leave=False)


def _types_of_columns(rows: Iterable[Row]) -> dict[str, _Type]:
    """The type of each column, in the order in which the rows have them."""
    column_types: dict[str, _Type] = {}
    for row in rows:
        for column, value in row.items():
            column_types[column] = _merge(column_types.get(column), _type_of(value))
    return column_types


def _type_of(value: Any) -> _Type:
    if value is None:
        return None
    if isinstance(value, list):
        return _type_of_list(value)
    if isinstance(value, dict):
        value_types = {key: _type_of(item) for key, item in value.items()}
        # Without keys there is nothing to derive a type from.
        return _JSON if not value_types or _JSON in value_types.values() else value_types
    # Arrow has no larger integers.
    is_large = type(value) is int and not -(2**63) <= value < 2**63
    return _JSON if is_large else _SCALARS[type(value)]


def _type_of_list(values: list[Any]) -> _Type:
    python_types = {type(value) for value in values} - {type(None)}
    # Long lists of one scalar type are common; integers are looked at, as they may be too large.
    if len(python_types) == 1 and (only_type := python_types.pop()) in (str, bool, float):
        return [_SCALARS[only_type]]
    item_type: _Type = None
    for value in values:
        item_type = _merge(item_type, _type_of(value))
    return _JSON if item_type == _JSON else [item_type]


def _merge(first: _Type, second: _Type) -> _Type:
    """The type that holds the values of both types unchanged."""
    if second is None:
        return first
    if first is None:
        return second
    if isinstance(first, list) and isinstance(second, list):
        item_type = _merge(first[0], second[0])
        return _JSON if item_type == _JSON else [item_type]
    if isinstance(first, dict) and isinstance(second, dict):
        return _merge_objects(first, second)
    if first == second:
        return first
    return "float64" if (first, second) in (("int64", "float64"), ("float64", "int64")) else _JSON


def _merge_objects(first: dict[str, Any], second: dict[str, Any]) -> _Type:
    # The order of keys counts: a template may write an object as it is.
    if list(first) != list(second):
        return _JSON
    merged_types = {key: _merge(first[key], second[key]) for key in first}
    return _JSON if _JSON in merged_types.values() else merged_types


def _feature(column_type: _Type) -> Any:
    if isinstance(column_type, list):
        return List(_feature(column_type[0]))
    if isinstance(column_type, dict):
        return {key: _feature(item) for key, item in column_type.items()}
    return JsonText() if column_type == _JSON else Value(column_type or "null")


def _array(batch: list[Row], column: str, column_type: _Type, arrow_type: pa.DataType, rows_before: int) -> pa.Array:
    column_values = [row.get(column) for row in batch]
    if column_type == _JSON:
        column_values = [JsonText().encode_example(value) for value in column_values]
    try:
        return pa.array(column_values, arrow_type)
    except UnicodeEncodeError:
        batch_index = next(batch_index for batch_index, value in enumerate(column_values) if not _is_unicode(value))
        raise ValueError(
            f"row {rows_before + batch_index + 1}: {column!r} holds half of a surrogate pair (such as \\ud83d), "
            "which is no text; mend it"
        ) from None


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
