"""Rows that a program has become the rows that a file would have been."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import write_rows
from datasets import Dataset, IterableDataset

from rlhf.data import Mixture, as_rows, load_data

ROWS = [
    {"prompt": "a", "completion": " b", "tools": [{"name": "f", "parameters": {"x": 1}}]},
    {"prompt": "c", "completion": " d", "margin": 0.5, "tools": [{"name": "g"}]},
    {"prompt": "é", "completion": None, "margin": 2},
]


def test_a_list_is_what_its_file_would_be(tmp_path):
    rows = as_rows(ROWS)
    from_file = load_data(str(write_rows(tmp_path / "rows.jsonl", ROWS)))
    assert rows.features == from_file.features and rows[:] == from_file[:]
    assert rows._fingerprint == as_rows(json.loads(json.dumps(ROWS)))._fingerprint != as_rows(ROWS[:2])._fingerprint


def test_what_is_missing_in_a_frame_is_missing():
    frame = pd.DataFrame(
        {
            "prompt": ["a", "b", np.str_("c")],
            "system": [None, float("nan"), "be kind"],
            "margin": [0.5, np.nan, 1.0],
            "label": pd.array([True, pd.NA, False], dtype="boolean"),
            "messages": [[{"role": "user", "content": "hi"}], None, np.array([{"role": "user", "content": "yo"}])],
        }
    )
    rows = as_rows(frame[frame.index >= 0].sort_index(ascending=False))
    assert rows.column_names == list(frame.columns)
    assert rows["system"][:] == ["be kind", None, None] and rows["margin"][:] == [1.0, None, 0.5]
    assert rows["label"][:] == [False, None, True] and rows["messages"][:][0] == [{"role": "user", "content": "yo"}]
    assert as_rows([{"text": float("nan")}, {"text": "a"}])["text"][:] == [None, "a"]


def test_paths_and_data_sets(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert as_rows(file)[:] == as_rows(str(file))[:] == load_data(str(file))[:]
    assert isinstance(as_rows([file, str(file)]), Mixture)
    for given in (None, Dataset.from_list(ROWS[:1]), IterableDataset.from_generator(lambda: iter(ROWS))):
        assert as_rows(given) is given
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        as_rows(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the list of rows is empty"),
        (pd.DataFrame({"prompt": []}), "the DataFrame has no rows"),
        (pd.DataFrame([["a", "b"]]), "has a column 0; name its columns"),
        ([{"prompt": "a"}, "b"], "row 2: expected a dictionary, got str"),
        ([{"date": pd.Timestamp("2026-01-01")}], "row 1: 'date' holds a Timestamp; expected text, a number"),
        ({"prompt": ["a"]}, "expected rows as a list of dictionaries, .*; got dict"),
        (3, "got int"),
    ],
)
def test_other_things_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        as_rows(given)
