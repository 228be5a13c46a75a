"""Files as people have them: what they wrote is what is read."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow as pa
import pytest
from conftest import write_rows
from datasets import Dataset

from rlhf.data import load_data

# Strings that readers take for something else: dates, numbers, nulls, booleans.
TEXTS = ["2024-01-01", "2024-01-01 10:00:00", "007", "1.50", "1e5", "None", "NA", "null", "", "true", "inf"]


def written(path, text, encoding="utf-8"):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return str(path)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_text_stays_text(tmp_path, name, text):
    """huggingface/course#692, huggingface/datasets#7664: a column of strings that look like dates became dates."""
    rows = [{"prompt": "when?", "completion": text}] * 2
    if name.endswith("l"):
        content = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        mark = "\t" if name == "a.tsv" else ","
        lines = [f"prompt{mark}completion", *(f"when?{mark}{row['completion']}" for row in rows)]
        content = json.dumps(rows) if name == "a.json" else "\n".join(lines)
    assert load_data(written(tmp_path / name, content)).to_list() == rows


def test_a_key_that_comes_late_is_read(tmp_path):
    """huggingface/datasets#7222, #6162: a key that first appears after the first block of 10 MiB."""
    early, late = {"prompt": "the cat", "completion": " sat " * 2000}, {"prompt": "a", "source": {"page": 3}}
    path = tmp_path / "late.jsonl"
    path.write_text((json.dumps(early) + "\n") * 1300 + json.dumps(late) + "\n")
    assert path.stat().st_size > 12 << 20
    rows = load_data(str(path))
    assert len(rows) == 1301
    assert rows[1300] == {**late, "completion": None} and rows[0] == {**early, "source": None}


MIXED = {
    "objects keep their own keys": [{"t": {"a": 1}}, {"t": {"b": {"c": None}}}],
    "the same keys": [{"t": [{"a": "1", "b": None}, None]}, {"t": [{"a": None, "b": [1, 2]}]}, {"t": None}],
    "keys in another order": [{"t": {"a": 1, "b": 2}}, {"t": {"b": 1, "a": 2}}, {"t": {}}],
    "text and messages": [{"t": "42"}, {"t": [{"role": "user", "content": "a"}]}],
    "text and numbers": [{"t": "1"}, {"t": 1}, {"t": 1.5}, {"t": True}],
    "lists of two kinds": [{"t": [1, 2]}, {"t": ["1", 2]}, {"t": []}],
    "numbers as they were written": [{"t": {"price": 0.6, "long": 123456789012345678901}}],
    "content as text and as parts": [{"t": [{"content": "a"}, {"content": [{"type": "text", "text": "b"}]}]}],
}


@pytest.mark.parametrize("case", MIXED)
def test_values_are_those_that_were_written(tmp_path, case):
    """PrimeIntellect-ai/prime-rl#2968: a table gives all rows the keys and the type of some."""
    rows = MIXED[case]
    found = load_data(str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert json.dumps(list(found)) == json.dumps(rows)
    again = found.map(lambda row: {"new": 1})  # as tokenising keeps the columns that rewards read
    assert json.dumps(list(again.remove_columns("new"))) == json.dumps(rows)


ROWS = [{"prompt": "a", "completion": "é 😀"}, {"prompt": "c", "completion": "d\ne"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
SHAPES = {
    "A.JSONL": LINES,
    "a.ndjson": LINES.replace("\n", "\r\n\r\n"),  # carriage returns, empty lines
    "array.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "lines.json": LINES,
    "one_after_the_other.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "held.json": json.dumps({"version": "1", "data": ROWS}),
    "columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
    "pandas.json": json.dumps({key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]}),
    "comma.csv": 'prompt,completion\na,é 😀\n\nc,"d\ne"\n',
    "semicolon.CSV": 'prompt;completion\na;é 😀\nc;"d\ne"',
    "tabs.csv": 'prompt\tcompletion\na\té 😀\nc\t"d\ne"\n',
    "tabs.tsv": 'prompt\tcompletion\na\té 😀\nc\t"d\ne"\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_files(tmp_path, name, encoding):
    """NDJSON, arrays, columns, delimiters, capitals, byte order marks."""
    assert load_data(written(tmp_path / name, SHAPES[name], encoding)).to_list() == ROWS


def test_a_file_of_one_row_is_one_row(tmp_path):
    turns = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for row in (turns, {"input_ids": [1, 2], "labels": [1, 2]}):
        assert load_data(str(write_rows(tmp_path / "row.json", [row]))).to_list() == [row]
    listed = {"completions": ["a", "b"]}
    assert load_data(str(write_rows(tmp_path / "row.jsonl", [listed]))).to_list() == [listed]


def test_plain_text_is_a_row_a_line(tmp_path):
    file = written(tmp_path / "a.txt", "one, two\n\n  \nthree\r\n")
    assert load_data(file).to_list() == [{"text": "one, two"}, {"text": "three"}]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(("end", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)])  # fmt: skip  # noqa: E501
def test_compressed_files(tmp_path, end, pack):
    path = tmp_path / f"a.jsonl.{end}"
    path.write_bytes(pack(LINES.encode()))
    assert load_data(str(path)).to_list() == ROWS
    path.write_bytes(pack((LINES * 50).encode())[:60])
    with pytest.raises(ValueError, match=rf"a.jsonl.{end}: the \w+ file ends early, after row"):
        load_data(str(path))


def test_patterns_and_folders(tmp_path):
    folder = tmp_path / "data"
    for name, row in zip(
        ("train_b.jsonl", "train_a.jsonl", "test.jsonl"), (ROWS[1], ROWS[0], {"other": 1}), strict=True
    ):
        written(folder / name, json.dumps(row))
    assert load_data(str(folder / "train*.jsonl")).to_list() == ROWS
    assert load_data(str(folder)).to_list() == ROWS
    assert load_data(str(folder), "test").to_list() == [{"other": 1}]
    assert load_data(str(folder), "train[1:]").to_list() == ROWS[1:]
    Dataset.from_list(ROWS).to_parquet(str(folder / "P.PARQUET"))
    assert load_data(str(folder / "P.PARQUET")).to_list() == ROWS
    for pattern, said in (("*.csv", "no file matches"), ("*", "are of two kinds")):
        with pytest.raises((ValueError, OSError), match=said):
            load_data(str(folder / pattern))


FAULTS = {
    "commas without quotes": ("a.csv", "text\nso, it is\n", r"row 1 has 2 fields, the first line 1 \(split at ','\)"),
    "a quote that never ends": ("a.csv", 'a,b\n1,2\n"c,d\ne,f\n', "row 2 is not valid CSV"),
    "a column twice": ("a.csv", "a,a\n1,2\n", "two columns are called 'a'"),
    "a name with a NUL": ("a.csv", "a\0b\n1\n", "the name of column 'a.x00b' has a NUL character"),
    "no rows": ("a.csv", "a,b\n", "there is a line of column names, but no row"),
    "half a character": ("a.jsonl", '{"a": "ok"}\n{"a": "\\ud83d"}\n', "row 2: 'a' holds half of a surrogate pair"),
    "a number for a row": ("a.jsonl", '{"a": 1}\n3\n', "row 2 is a int, not an object"),
    "an array that never ends": ("a.json", '[{"a": 1}, {"a": 2}', "row 2 is not valid JSON"),
    "half a row of an array": ("a.json", '[{"a": 1}, {"a"', "row 2 is not valid JSON"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_named_with_their_row(tmp_path, case):
    name, text, said = FAULTS[case]
    with pytest.raises(ValueError, match=f"{name}: {said}"):
        load_data(written(tmp_path / name, text))
    assert not list(tmp_path.glob("*.arrow"))


def test_other_encodings_are_named(tmp_path):
    with pytest.raises(ValueError, match="line 2 is not UTF-8 text"):
        load_data(written(tmp_path / "a.csv", "text\ncafé\n", "latin-1"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_stream_gives_the_same_rows(tmp_path, name):
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    written(tmp_path / "a.jsonl", LINES)
    written(tmp_path / "a.csv", SHAPES["comma.csv"])
    assert list(load_data(str(tmp_path / name), streaming=True)) == ROWS
    assert list(load_data(str(tmp_path / name), "train[1:2]", streaming=True)) == ROWS[1:]
    with pytest.raises(ValueError, match="needs the number of rows, which a stream does not know"):
        load_data(str(tmp_path / name), "train[:50%]", streaming=True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "folder"])
def test_other_rows_under_the_same_size_and_time_are_read(tmp_path, name):
    """An archive is unpacked over the file, or a clock is coarse: a cache that goes by times gave the old rows."""
    file = tmp_path / name / "a.parquet" if name == "folder" else tmp_path / name
    file.parent.mkdir(exist_ok=True)
    prints, stats = [], []
    for text in ("one", "two", "one"):
        rows = Dataset.from_list([{"text": text}])
        rows.to_json(file) if name == "a.jsonl" else rows.to_parquet(file)
        os.utime(file, (1e9, 1e9))
        stats.append((file.stat().st_size, file.stat().st_mtime_ns))
        data = load_data(str(tmp_path / name))
        # `map` keeps its result in the cache too.
        assert data["text"] == data.map(lambda row: {"copy": row["text"]})["copy"] == [text]
        prints.append(data._fingerprint)
    assert len(set(stats)) == 1 and prints[0] == prints[2] != prints[1]
