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

_CONTAINER_KEYS = ("data", "rows", "train", "examples", "instances")  # of a JSON object that holds all rows
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")
_DELIMITERS = ",;\t|"
_LONGEST_FIELD = 2**31 - 1  # characters of a CSV field; Python's own limit is 131072


def _open_zstd(path: Path) -> Any:
    return BufferedReader(pa.input_stream(str(path), compression="zstd"))


def _open_plain(path: Path) -> Any:
    return path.open("rb")


_COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
_COMPRESSION_NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}


def suffix(path: Path) -> str:
    """The suffix of a file's format, in lower case and without that of a compression.

    Args:
        path: A file, such as ``A.JSONL.gz``.

    Returns:
        The suffix, such as ``.jsonl``; empty if there is none.
    """
    suffixes = [part.lower() for part in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_rows(path: Path) -> Iterator[Row]:
    """Read a file row by row.

    Args:
        path: A file in one of the formats of :data:`READERS`, which may be compressed.

    Yields:
        Row: its columns.

    Raises:
        ValueError: A row cannot be read; names the row and the reason, but not the file.
    """
    is_compressed = path.suffix.lower() in _COMPRESSIONS
    num_rows = 0
    try:
        with _open_text(path) as text_file:
            for row in READERS[suffix(path)](text_file):
                num_rows += 1
                if num_rows == 1:
                    _check_names(row)
                yield row
    except UnicodeError:
        raise ValueError(f"line {_first_broken_line(path)} is not UTF-8 text; save the file as UTF-8") from None
    except EOFError:
        raise _ends_early(path, num_rows) from None
    except (OSError, lzma.LZMAError) as error:
        if is_compressed and "runcated" in str(error):  # "Truncated" or "truncated", by the library
            raise _ends_early(path, num_rows) from None
        raise ValueError(f"after row {num_rows}: cannot be read ({error})") from None
    if num_rows == 0:
        raise ValueError("the file is empty")


def _check_names(row: Row) -> None:
    # Arrow ends a name at a NUL, and does not find the column then.
    for column_name in row:
        if "\0" in column_name:
            raise ValueError(f"the name of column {column_name!r} has a NUL character; save the file as text again")


@contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
    """Open a file as text: UTF-8, or UTF-16 if it begins with the mark of that."""
    open_bytes = _opener(path)
    with open_bytes(path) as binary_file:
        byte_order_mark = binary_file.read(2)
    # `utf-8-sig` drops the mark that Excel writes at the beginning of UTF-8.
    encoding = "utf-16" if byte_order_mark in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    # Line breaks stay as they are (newline=""): inside quotes, they are a part of a CSV field.
    with open_bytes(path) as binary_file, TextIOWrapper(binary_file, encoding, newline="") as text_file:
        yield text_file


def _opener(path: Path) -> Callable[[Path], Any]:
    return _COMPRESSIONS.get(path.suffix.lower(), _open_plain)


def _first_broken_line(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    line_number = 0
    # Read again as bytes: the decoder's error has a position in its buffer, not in the file.
    with _opener(path)(path) as binary_file:
        for line_bytes in binary_file:
            line_number += 1
            try:
                line_bytes.decode()
            except UnicodeDecodeError:
                break
    return line_number


def _ends_early(path: Path, number: int) -> ValueError:
    compression_name = _COMPRESSION_NAMES[path.suffix.lower()]
    return ValueError(f"the {compression_name} file ends early, after row {number}; copy or download it again")


# JSON


def _read_json(file: IO[str]) -> Iterator[Row]:
    return _parse_json(file, may_be_container=True)


def _read_json_lines(file: IO[str]) -> Iterator[Row]:
    return _parse_json(file, may_be_container=False)


def _parse_json(file: IO[str], may_be_container: bool) -> Iterator[Row]:
    """Parse lines of one object each, an array of objects, or objects that are broken into lines.

    Args:
        file: The text.
        may_be_container: Whether a single object may hold all rows, or columns, instead of being a row.
    """
    # The first line decides: if it is an object by itself, so is each line behind it.
    line_iterator = iter(file)
    first_line = next((text_line for text_line in line_iterator if text_line.strip()), "")
    first_value = _parse_line(first_line)
    if not isinstance(first_value, dict):
        if first_line:
            yield from _parse_document(first_line + file.read(), may_be_container)
        return
    second_line = next((text_line for text_line in line_iterator if text_line.strip()), None)
    if second_line is not None:
        yield first_value
        yield from _parse_lines(chain([second_line], line_iterator))
    # An only line may be an only row, or hold all rows.
    elif may_be_container:
        yield from _rows_of_container(first_value)
    else:
        yield first_value


def _parse_line(line: str) -> Any:
    """The value of a line that is JSON by itself; None for any other."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _parse_lines(lines: Iterator[str]) -> Iterator[Row]:
    """The rows from the second one on, a line each."""
    row_number = 1
    for text_line in lines:
        if not text_line.strip():
            continue
        row_number += 1
        try:
            row_value = json.loads(text_line)
        except json.JSONDecodeError as error:
            raise _invalid_json(row_number, error.msg, error.pos) from None
        yield _as_row(row_value, row_number)


def _parse_document(text: str, may_be_container: bool) -> Iterator[Row]:
    """The elements of an array, or objects one after the other, however they are broken into lines."""
    # One value at a time, so that an error names its row.
    decoder = json.JSONDecoder()
    position = _skip_space(text, 0)
    is_array = text[position] == "["
    position = _skip_space(text, position + is_array)
    row_number = 0
    while position < len(text) and not (is_array and text[position] == "]"):
        row_number += 1
        try:
            row_value, value_end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            # Counted from the beginning of the row: a position in the whole file helps nobody.
            raise _invalid_json(row_number, error.msg, error.pos - position) from None
        position = _skip_space(text, value_end)
        if is_array:
            position = _skip_comma(text, position, row_number, value_end)
        is_only_value = row_number == 1 and not is_array and position == len(text)
        if may_be_container and is_only_value and isinstance(row_value, dict):
            yield from _rows_of_container(row_value)
        else:
            yield _as_row(row_value, row_number)


def _skip_comma(text: str, position: int, number: int, value_end: int) -> int:
    """The position behind the comma after an element of an array; the closing bracket stays."""
    character = text[position : position + 1]
    if character == ",":
        return _skip_space(text, position + 1)
    if character != "]":
        raise _invalid_json(number, "the array goes on without a comma, or never ends", value_end)
    return position


def _skip_space(text: str, position: int) -> int:
    space_match = _WHITE_SPACE.match(text, position)
    return space_match.end() if space_match else position


def _rows_of_container(container: Row) -> Iterator[Row]:
    """The rows of a file that is one object: those under a key such as ``data``, its columns, or the object itself."""
    rows = next(
        (container[key] for key in _CONTAINER_KEYS if _are_objects(container.get(key))),
        None,
    )
    column_values = list(container.values())
    if rows is not None:
        for row_number, value in enumerate(rows, start=1):
            yield _as_row(value, row_number)
    elif _are_pandas_columns(column_values):
        row_indices = dict.fromkeys(row_index for column in column_values for row_index in column)
        for row_index in row_indices:
            yield {column_name: column.get(row_index) for column_name, column in container.items()}
    elif _are_columns(column_values):
        for row in zip(*column_values, strict=True):
            yield dict(zip(container, row, strict=True))
    else:
        yield container


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _are_pandas_columns(values: list[Any]) -> bool:
    """Whether values are columns as pandas writes them: ``{"prompt": {"0": ..., "1": ...}, ...}``."""
    if not values or not all(isinstance(value, dict) and value for value in values):
        return False
    return all(key.isdigit() for value in values for key in value)


def _are_columns(values: list[Any]) -> bool:
    """Whether values are columns: lists of one length, at least one of them of texts or of lists.

    Lists of numbers alone are the ids of one row, lists of objects its messages.
    """
    are_lists = bool(values) and all(isinstance(value, list) and value for value in values)
    if not are_lists or len({len(value) for value in values}) > 1:
        return False
    return any(isinstance(value[0], str | list) for value in values)


def _as_row(value: Any, number: int) -> Row:
    if isinstance(value, str):
        # An array of texts is plain text, a row each.
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f"row {number} is a {type(value).__name__}, not an object with columns")
    return value


def _invalid_json(number: int, reason: str, position: int) -> ValueError:
    return ValueError(
        f"row {number} is not valid JSON ({reason} at character {position + 1}); mend or delete that line"
    )


# Tables and text


def _read_csv(file: IO[str], delimiters: str = _DELIMITERS) -> Iterator[Row]:
    """Read a table whose first line names the columns. Every field is text."""
    csv.field_size_limit(_LONGEST_FIELD)
    header = _read_record(file)
    # The delimiter is the one that makes most columns of the first line; of several, the first.
    delimiter = max(delimiters, key=lambda candidate: len(_split_record(header, candidate)))
    column_names = _column_names(_split_record(header, delimiter))
    row_number = 0
    try:
        # Strict: otherwise a quote that is never closed takes all rows behind it for one field.
        for row_fields in csv.reader(file, delimiter=delimiter, strict=True):
            if not row_fields:  # an empty line
                continue
            row_number += 1
            # A field too many means text that was split inside: its halves would be read as other columns.
            if len(row_fields) != len(column_names):
                raise ValueError(
                    f"row {row_number} has {len(row_fields)} fields, the first line {len(column_names)} "
                    f"(split at {delimiter!r}): put text that holds {delimiter!r}, quotes or line breaks "
                    "into double quotes"
                )
            yield dict(zip(column_names, row_fields, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"row {row_number + 1} is not valid CSV ({error}): double the quotes inside quoted text"
        ) from None
    if column_names and row_number == 0:
        raise ValueError("there is a line of column names, but no row")


def _read_record(file: IO[str]) -> str:
    """The first record of a CSV file: more than a line if a line break is inside quotes."""
    record = file.readline()
    while record.count('"') % 2 and (line := file.readline()):
        record += line
    return record


def _split_record(record: str, delimiter: str) -> list[str]:
    return next(csv.reader(record.splitlines(keepends=True), delimiter=delimiter), [])


def _column_names(fields: list[str]) -> list[str]:
    # A column without a name is called as pandas calls it, which leaves the name of its index empty.
    column_names = [header_field.strip() or f"Unnamed: {index}" for index, header_field in enumerate(fields)]
    for index, column_name in enumerate(column_names):
        if column_name in column_names[:index]:
            raise ValueError(f"two columns are called {column_name!r}: rename one")
    return column_names


def _read_tsv(file: IO[str]) -> Iterator[Row]:
    return _read_csv(file, "\t")


def _read_text(file: IO[str]) -> Iterator[Row]:
    """A row for each line that is not empty."""
    for text_line in file:
        if text_line.strip():
            # Files are opened with their line breaks as written, so each kind is removed here.
            yield {"text": text_line.rstrip("\r\n")}


# By suffix.
READERS: dict[str, Callable[[IO[str]], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_text,
}
