"""Rows of one text file (JSON, JSON lines, CSV, TSV, plain text), as they were written: text stays text."""

import bz2
import csv
import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

Row = dict[str, Any]

_CONTAINERS = ("data", "rows", "train", "examples", "instances")  # keys of a JSON object that hold all its rows
_SPACE = re.compile(r"[ \t\r\n]*")
_DELIMITERS = ",;\t|"  # the first of those that give most columns


def _zstd(path: Path) -> Any:
    return BufferedReader(pa.input_stream(str(path), compression="zstd"))


def _plain(path: Path) -> Any:
    return path.open("rb")


_COMPRESSIONS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


def suffix(path: Path) -> str:
    """Of the format, in lower case, without that of a compression: ``.jsonl`` of ``A.JSONL.gz``."""
    parts = [part.lower() for part in path.suffixes]
    if parts and parts[-1] in _COMPRESSIONS:
        parts.pop()
    return parts[-1] if parts else ""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in one of the formats of :data:`READERS`, one after the other.

    Raises:
        ValueError: which row cannot be read, and why; without the file's name.
    """
    number = 0
    packed = path.suffix.lower() in _COMPRESSIONS
    try:
        with _opened(path) as file:
            for number, row in enumerate(READERS[suffix(path)](file), start=1):  # noqa: B007  # read below
                yield row
    except UnicodeError:
        raise ValueError(f"line {_torn_line(path)} is not UTF-8 text; save the file as UTF-8") from None
    except EOFError:
        raise _ends_early(path, number) from None
    except (OSError, lzma.LZMAError) as error:
        if packed and "runcated" in str(error):
            raise _ends_early(path, number) from None
        raise ValueError(f"after row {number}: cannot be read ({error})") from None
    if number == 0:
        raise ValueError("the file is empty")


def _torn_line(path: Path) -> int:
    """The first line that is not UTF-8."""
    number = 0
    with _COMPRESSIONS.get(path.suffix.lower(), _plain)(path) as file:
        for number, line in enumerate(file, start=1):  # noqa: B007  # read below
            try:
                line.decode()
            except UnicodeDecodeError:
                break
    return number


def _ends_early(path: Path, number: int) -> ValueError:
    kind = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2", ".zst": "zstd"}[path.suffix.lower()]
    return ValueError(f"the {kind} file ends early, after row {number}; copy or download it again")


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """The text of a file: UTF-8, or UTF-16 where its first bytes say so."""
    opener = _COMPRESSIONS.get(path.suffix.lower(), _plain)
    with opener(path) as file:
        start = file.read(2)
    encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with opener(path) as file, TextIOWrapper(file, encoding, newline="") as text:
        yield text


# JSON


def _json(file: IO[str], may_hold: bool = True) -> Iterator[Row]:
    """Lines of one object each; an array of objects; or (``may_hold``) one object that holds the rows, or columns."""
    lines = iter(file)
    head = next((line for line in lines if line.strip()), "")
    first = _value(head)
    second = next((line for line in lines if line.strip()), None) if isinstance(first, dict) else None
    if isinstance(first, dict) and second is None:
        yield from _unwrapped(first) if may_hold else [first]
    elif isinstance(first, dict):
        yield first
        yield from _lines(chain([second or ""], lines))
    elif head:
        yield from _values(head + file.read(), may_hold)


def _value(line: str) -> Any:
    """Of a line that is JSON by itself; None otherwise."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _lines(lines: Iterator[str]) -> Iterator[Row]:
    number = 1
    for line in lines:
        if not line.strip():
            continue
        number += 1
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise _invalid(number, error.msg, error.pos) from None
        yield _row(value, number)


def _values(text: str, may_hold: bool) -> Iterator[Row]:
    """Of a whole file: an array's elements, or objects one after the other, however they are broken into lines."""
    decoder, at, number = json.JSONDecoder(), _skip(text, 0), 0
    array = text[at] == "["
    at = _skip(text, at + array)
    while at < len(text) and not (array and text[at] == "]"):
        number += 1
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _invalid(number, error.msg, error.pos - at) from None
        at = _skip(text, end)
        if array and text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif array and text[at : at + 1] != "]":
            raise _invalid(number, "the array goes on without a comma, or never ends", end)
        if may_hold and number == 1 and not array and at == len(text) and isinstance(value, dict):
            yield from _unwrapped(value)
        else:
            yield _row(value, number)


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _unwrapped(whole: Row) -> Iterator[Row]:
    """The rows of a file that is a single object: what it holds under ``data``, its columns, or itself."""
    held = next((whole[key] for key in _CONTAINERS if _of_objects(whole.get(key))), None)
    values = list(whole.values())
    if held is not None:
        yield from (_row(value, number) for number, value in enumerate(held, start=1))
    elif values and all(isinstance(value, dict) and value and all(map(str.isdigit, value)) for value in values):
        # As pandas writes a table: {"prompt": {"0": …, "1": …}, …}.
        for index in dict.fromkeys(key for value in values for key in value):
            yield {column: value.get(index) for column, value in whole.items()}
    elif _is_table(values):
        yield from (dict(zip(whole, row, strict=True)) for row in zip(*values, strict=True))
    else:
        yield whole


def _of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_table(values: list[Any]) -> bool:
    """Lists of one length, and one of texts or of lists: numbers alone are one row's ids, objects its messages."""
    lists = [value for value in values if isinstance(value, list) and value]
    alike = len(lists) == len(values) > 0 and len({len(value) for value in lists}) == 1
    return alike and any(isinstance(value[0], (str, list)) for value in lists)


def _row(value: Any, number: int) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f"row {number} is a {type(value).__name__}, not an object with columns")
    return value


def _json_lines(file: IO[str]) -> Iterator[Row]:
    return _json(file, may_hold=False)


def _invalid(number: int, message: str, position: int) -> ValueError:
    return ValueError(
        f"row {number} is not valid JSON ({message} at character {position + 1}); mend or delete that line"
    )


# Tables and text


def _csv(file: IO[str], delimiters: str = _DELIMITERS) -> Iterator[Row]:
    """Every field is text; the delimiter is the one that makes most columns of the first line."""
    csv.field_size_limit(2**31 - 1)  # Python's own limit is 131072 characters
    head = file.readline()
    while head.count('"') % 2 and (more := file.readline()):
        head += more
    delimiter = max(delimiters, key=lambda mark: len(next(csv.reader([head], delimiter=mark), [])))
    columns = next(csv.reader(head.splitlines(keepends=True), delimiter=delimiter), [])
    columns = [name.strip() or f"Unnamed: {index}" for index, name in enumerate(columns)]  # pandas' name for its index
    if twice := [name for index, name in enumerate(columns) if name in columns[:index]]:
        raise ValueError(f"two columns are called {twice[0]!r}: rename one")
    number = 0
    try:
        for fields in csv.reader(file, delimiter=delimiter, strict=True):
            if not fields:  # an empty line
                continue
            number += 1
            if len(fields) != len(columns):
                raise ValueError(
                    f"row {number} has {len(fields)} fields, the first line {len(columns)} (split at {delimiter!r}): "
                    f"put text that holds {delimiter!r}, quotes or line breaks into double quotes"
                )
            yield dict(zip(columns, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"row {number + 1} is not valid CSV ({error}): double the quotes inside quoted text") from None
    if columns and number == 0:
        raise ValueError("there is a line of column names, but no row")


def _tsv(file: IO[str]) -> Iterator[Row]:
    return _csv(file, "\t")


def _text(file: IO[str]) -> Iterator[Row]:
    """A row for each line that is not empty."""
    for line in file:
        if line.strip():
            yield {"text": line.rstrip("\r\n")}


READERS: dict[str, Callable[[IO[str]], Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _text,
}
