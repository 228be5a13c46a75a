"""``python -m benchmarks.gpu`` in small shapes on a CPU: its sections run, and a failure ends no other."""

import json

import pytest
import torch

from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu.measuring import Results, Setup

TINY = ["--tiny", "--device", "cpu"]


def test_sections_run_on_a_cpu(tmp_path, capsys):
    names = ["head-accuracy", "head", "attention"]
    file = tmp_path / "gpu.json"
    assert benchmark.main([*TINY, "--only", ",".join(names), "--output", str(file)]) == 0
    found = json.loads(file.read_text())
    assert list(found["tables"]) == names and found["failures"] == []
    assert all(row["gradient of rows"] < 1e-2 for row in found["tables"]["head-accuracy"])
    shown = capsys.readouterr().out
    assert "The head against float64" in shown and "way" in shown


def test_a_failure_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def measure(setup):
        results = Results(setup)
        results.measure({"way": "first"}, lambda: {"ms": 1.0})
        results.measure({"way": "second"}, lambda: torch.zeros(2) @ torch.zeros(3))
        results.measure({"way": "third"}, lambda: {"ms": 3.0})
        return results

    monkeypatch.setattr("benchmarks.gpu.head.measure", measure)
    monkeypatch.setattr("benchmarks.gpu.flow.measure", lambda setup: 1 / 0)
    file = tmp_path / "gpu.json"
    assert benchmark.main([*TINY, "--only", "flow,head,attention", "--output", str(file)]) == 1
    found = json.loads(file.read_text())
    assert [row.get("ms") for row in found["tables"]["head"]] == [1.0, None, 3.0]
    assert found["failures"][0] == "flow: ZeroDivisionError: division by zero"
    assert found["failures"][1].startswith("head: second: RuntimeError")
    assert found["tables"]["attention"] and "failed: head: second" in capsys.readouterr().out


def test_memory_of_a_failed_call_is_free():
    alive = []

    class Large:
        def __del__(self):
            alive.remove(self.name)

    def fails():
        large = Large()
        large.name = "large"
        alive.append("large")
        raise torch.OutOfMemoryError("CUDA out of memory")

    results = Results(Setup(torch.device("cpu"), tiny=True))
    results.measure({"way": "too large"}, fails)
    assert results.rows[0]["failed"] == "OutOfMemoryError: CUDA out of memory" and alive == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_one_line_says_so(capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main([])
    assert ended.value.code == 1 and "torch finds no GPU here" in capsys.readouterr().err
