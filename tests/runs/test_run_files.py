"""The files of a run: lines appended, cut off, read back."""

import json
import math

import pytest

from rlhf.runs import read_run
from rlhf.runs.files import append_line, read_lines


def test_lines_come_back(tmp_path):
    file = tmp_path / "folder" / "metrics.jsonl"
    append_line(file, {"step": 1, "loss": 0.1 + 0.2, "name": "Zürich 日本"})
    append_line(file, {"step": 2, "loss": math.nan, "deep": [math.inf, {"x": -math.inf}]})
    assert read_lines(file) == [
        {"step": 1, "loss": 0.1 + 0.2, "name": "Zürich 日本"},
        {"step": 2, "loss": None, "deep": [None, {"x": None}]},
    ]
    # Strict JSON, which NaN is not.
    json.loads(file.read_text().splitlines()[1], parse_constant=pytest.fail)


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_lines(file) == [{"step": 1}]
    file.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: no JSON"):
        read_lines(file)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run in this folder"):
        read_run(tmp_path)


def test_a_run_of_an_older_version_is_read(tmp_path):
    history = [{"step": 10, "epoch": 0.5, "loss": 1.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    run = read_run(tmp_path)
    assert (run.metrics, run.options, run.record, run.name) == (history, {}, {}, tmp_path.name)
