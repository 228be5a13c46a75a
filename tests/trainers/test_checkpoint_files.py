"""A folder is whole or it is not there, and damage is named."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rlhf.models.adapter_base import PARTIAL
from rlhf.trainers import checkpoint_files
from rlhf.trainers.checkpoint_files import (
    MARK,
    atomic_folder,
    last_whole_checkpoint,
    problem_of,
    read_mark,
    whole_checkpoints,
)


def save(final: Path, content: str = "weights", step: int | None = None) -> Path:
    with atomic_folder(final, step) as folder:
        (folder / "weights").write_text(content)
        (folder / "inner").mkdir()
        (folder / "inner" / "state").write_text("state")
    return final


def test_a_whole_folder_has_a_mark_and_nothing_beside_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoint-3", step=3)
    assert problem_of(folder) is None
    mark = read_mark(folder)
    assert mark["step"] == 3
    assert set(mark["files"]) == {"weights", "inner/state"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "old")
    with pytest.raises(OSError, match="model: could not be saved: No space left"), atomic_folder(folder) as partial:
        (partial / "weights").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (folder / "weights").read_text() == "old"
    assert problem_of(folder) is None
    assert not (tmp_path / PARTIAL).exists()


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:815] . PytorchStreamWriter failed writing file data/3"),
    ],
)
def test_a_library_that_cannot_write_is_an_error_of_the_disk(tmp_path: Path, error: Exception) -> None:
    message = r"model: could not be saved: .*(No space|left on the disk)"
    with pytest.raises(OSError, match=message), atomic_folder(tmp_path / "model"):
        raise error


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), atomic_folder(tmp_path / "model"):
        raise RuntimeError("a bug")


def test_damage_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoint-1")
    (folder / "weights").write_text("weighty")
    assert problem_of(folder) == "weights is damaged: its content differs from what was written"
    (folder / "weights").write_text("we")
    assert problem_of(folder) == "weights has 2 bytes, and 7 were written"
    (folder / "weights").unlink()
    assert problem_of(folder) == "weights is missing"
    (folder / MARK).write_text("{")
    assert "complete.json cannot be read" in str(problem_of(folder))
    (folder / MARK).write_text('{"format": 99}')
    assert problem_of(folder) == "complete.json is not of format 1"
    (folder / MARK).unlink()
    assert "no complete.json" in str(problem_of(folder))
    assert "no complete.json" in str(problem_of(tmp_path / "nowhere"))


def test_checkpoints_are_in_the_order_of_steps_and_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        save(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-100" / "weights").unlink()
    (tmp_path / "checkpoint-11-notes").mkdir()
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    last, passed_over = last_whole_checkpoint(tmp_path)
    assert last == tmp_path / "checkpoint-10"
    assert passed_over == {tmp_path / "checkpoint-100": "weights is missing"}
    assert last_whole_checkpoint(tmp_path / "nowhere") == (None, {})


def test_weights_get_the_permissions_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    with atomic_folder(tmp_path / "model") as folder:
        save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "ordinary").stat().st_mode}


def test_all_is_on_the_disk_before_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(checkpoint_files, "sync", lambda path: synced.append(path.name))
    save(tmp_path / "model")
    assert synced == ["state", "weights", f".{MARK}", "inner", "model", tmp_path.name]
