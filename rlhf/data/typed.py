"""Rows of text files as a table on disk, each column of the type that all its values have; no type is guessed."""

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, List, Value
from datasets.features.features import register_feature
from datasets.fingerprint import Hasher
from datasets.utils import tqdm
from filelock import FileLock

from rlhf.data.rows import Row, read_rows

_VERSION = 1  # part of the cache key: raise it when the same file becomes another table
_BATCH = 500  # rows that are held at once
_NAMES: dict[type, str] = {str: "string", bool: "bool", int: "int64", float: "float64"}
_JSON = "json"  # what has no one type: objects of different keys, and columns of several types


@dataclass
class Written:
    """A column of values as they were written, kept as JSON text: objects of different keys, or several types.

    ``datasets.Json`` reads 0.6 as 0.6000000000000001, and writes ten digits.
    """

    id: str | None = field(default=None, repr=False)
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="Written", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value, ensure_ascii=False)

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        return None if value is None else json.loads(value)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        """Of values that a batched ``map`` gives back."""
        if pa.types.is_string(storage.type) or pa.types.is_null(storage.type):
            return storage.cast(pa.string())
        return pa.array([self.encode_example(value) for value in storage.to_pylist()], pa.string())


with warnings.catch_warnings(action="ignore"):  # that it is experimental
    register_feature(Written, "Written")

# A column's type while it is being found: None (only nulls so far), a name, the type of a list's items in a list, or
# the types of an object's values under its keys.
_Type = str | list[Any] | dict[str, Any] | None


def as_table(files: list[Path]) -> Dataset:
    """The rows of ``files``, one after the other, memory-mapped from a table in the cache of ``datasets``.

    A column of objects with different keys, or of several types, is :class:`Written`: no row gets the keys of another,
    no text turns into a number.

    Raises:
        ValueError: names the file, the row and the fault.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = Hasher.hash((_VERSION, stats))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{key}.arrow"
    with FileLock(folder / f"{key}.lock"):
        if not table.exists():
            _write(files, table)
    rows = Dataset.from_file(str(table))
    return Dataset(rows.data, info=DatasetInfo(features=rows.features), fingerprint=key)


def chained(files: list[Path]) -> Iterator[Row]:
    """The rows of all files; a ValueError names the file."""
    for file in files:
        try:
            yield from read_rows(file)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


def _write(files: list[Path], table: Path) -> None:
    types: dict[str, _Type] = {}
    count = 0
    for row in _progress(chained(files), "Reading"):
        count += 1
        for column, value in row.items():
            types[column] = _merged(types.get(column), _type_of(value))
    features = Features({column: _feature(kind) for column, kind in types.items()})
    schema = features.arrow_schema
    unfinished = table.with_suffix(f".{os.getpid()}")
    written = 0
    rows = iter(_progress(chained(files), "Writing", count))
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            while batch := list(islice(rows, _BATCH)):
                arrays = [_array(batch, name, kind, schema.field(name).type, written) for name, kind in types.items()]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
                written += len(batch)
        unfinished.replace(table)
    finally:
        unfinished.unlink(missing_ok=True)


def _progress(rows: Iterable[Row], what: str, total: int | None = None) -> Iterable[Row]:
    return tqdm(rows, desc=what, total=total, unit=" rows", delay=3, leave=False)


def _type_of(value: Any) -> _Type:
    if isinstance(value, list):
        kinds = set(map(type, value)) - {type(None)}
        if len(kinds) == 1 and (only := kinds.pop()) in (str, bool, float):
            return [_NAMES[only]]
        found: _Type = None
        for item in value:
            found = _merged(found, _type_of(item))
        return _JSON if found == _JSON else [found]
    if isinstance(value, dict):
        found = {key: _type_of(item) for key, item in value.items()}
        return _JSON if _JSON in found.values() or not found else found
    if type(value) is int and not -(2**63) <= value < 2**63:
        return _JSON
    return None if value is None else _NAMES[type(value)]


def _merged(one: _Type, other: _Type) -> _Type:
    if other is None or (one == other and not isinstance(one, dict)):
        return one
    if one is None:
        return other
    if isinstance(one, list) and isinstance(other, list):
        items = _merged(one[0], other[0])
        return _JSON if items == _JSON else [items]
    if isinstance(one, dict) and isinstance(other, dict):
        if list(one) != list(other):  # in this order: a template may write an object as it is
            return _JSON
        both = {key: _merged(one[key], other[key]) for key in one}
        return _JSON if _JSON in both.values() else both
    return "float64" if (one, other) in (("int64", "float64"), ("float64", "int64")) else _JSON


def _feature(kind: _Type) -> Any:
    if isinstance(kind, list):
        return List(_feature(kind[0]))
    if isinstance(kind, dict):
        return {key: _feature(item) for key, item in kind.items()}
    return Written() if kind == _JSON else Value(kind or "null")


def _array(batch: list[Row], column: str, kind: _Type, arrow: pa.DataType, before: int) -> pa.Array:
    values = [row.get(column) for row in batch]
    if kind == _JSON:
        values = [Written().encode_example(value) for value in values]
    try:
        return pa.array(values, arrow)
    except UnicodeEncodeError:
        number = next(index for index, value in enumerate(values, start=before + 1) if _torn(value))
        raise ValueError(
            f"row {number}: {column!r} holds half of a surrogate pair (such as \\ud83d), which is no text; mend it"
        ) from None


def _torn(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
