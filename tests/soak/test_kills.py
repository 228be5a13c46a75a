"""A run that is killed in the middle of a write goes on with the same command, and ends as one that was not killed.

`make soak` tries every write of every trainer; here are the writes that were found to matter.
"""

from pathlib import Path

import pytest
from forked import Kill, Outcome, run
from jobs import JOBS, import_commands, prepare, result, start, survive

# The write that is cut in half: the name of its file, and which one of that name.
TORN = {
    "sft": {
        "weights of a checkpoint": ("model.safetensors", 1),
        "state of the last checkpoint": ("trainer_state.json", 2),
        "weights of the last save": ("model.safetensors", -1),
    },
    "grpo": {"optimizer of a checkpoint": ("optimizer.pt", 1), "samples": ("completions.jsonl", -1)},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("soak") / "inputs"
    folder.mkdir()
    import_commands()
    prepared = run(lambda: prepare(folder, tokenizer), folder)
    assert prepared.status == 0, prepared.output
    return folder


def torn(whole: Outcome, name: str, which: int) -> Kill:
    """A kill while one of the files of a name is written."""
    numbers = [
        number for number, write in enumerate(whole.writes, 1) if write.kind == "open" and Path(write.file).name == name
    ]
    return Kill(before=numbers[which] + 1, torn=True)


@pytest.mark.parametrize("name", TORN)
def test_a_run_survives_kills_in_the_middle_of_writes(inputs, tmp_path, name):
    case = tmp_path / name
    whole = start(JOBS[name], inputs, case)
    assert whole.status == 0, whole.output
    expected = result(case)
    # No write escapes the count, but that of a tokenizer, which is written by Rust.
    written = {Path(write.file).name for write in whole.writes}
    assert {Path(file).name for file in expected["files"]} - written <= {"tokenizer.json"}
    for place, (file, which) in TORN[name].items():
        assert survive(JOBS[name], inputs, tmp_path / "killed", [torn(whole, file, which)], expected) == [], place
