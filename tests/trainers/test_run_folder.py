"""What an interrupted run leaves is finished or swept, and a save that fails takes nothing away."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model
from safetensors import SafetensorError
from transformers import PreTrainedModel

from rlhf import SFTConfig, SFTTrainer
from rlhf.models.adapter_base import PARTIAL
from rlhf.trainers import run_folder
from rlhf.trainers.checkpoint_files import MARK, partial_path, problem_of, whole_checkpoints, write_mark
from rlhf.trainers.resuming import checkpoint_to_resume
from rlhf.trainers.run_folder import MODEL, delete_old_checkpoints, finish_deletion, finish_interrupted, move_model_in


def write(folder: Path, marked: bool = True, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    if marked:
        write_mark(folder)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file() and path.name != MARK}


def test_an_interrupted_run_is_finished_where_it_was_whole(tmp_path: Path) -> None:
    write(partial_path(tmp_path / "checkpoint-1"), weights="whole")
    write(partial_path(tmp_path / "checkpoint-2"), marked=False, weights="half")
    write(tmp_path / PARTIAL / "replaced-checkpoint-1", weights="older")
    write(tmp_path / PARTIAL / "replaced-checkpoint-2", weights="older")
    write(tmp_path / PARTIAL / "deleted-checkpoint-0", weights="old")
    finish_interrupted(tmp_path)
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert contents(tmp_path / "checkpoint-1") == {"weights": "whole"}
    assert contents(tmp_path / "checkpoint-2") == {"weights": "older"}
    assert not (tmp_path / PARTIAL).exists()


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_model_that_was_moved_in_part_is_moved_wholly(
    tmp_path: Path, moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    move_model_in(write(folder / PARTIAL / MODEL, config="old", shard="old", weights="old"), folder)
    partial = write(folder / PARTIAL / MODEL, config="new", weights="new")
    replace, done = run_folder.os.replace, []

    def replace_some(source: Any, target: Any) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(replace(source, target))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.os, "replace", replace_some)
        move_model_in(partial, folder)
    assert "no complete.json" in str(problem_of(folder))
    finish_interrupted(folder)
    assert contents(folder) == {"config": "new", "weights": "new"}
    assert problem_of(folder) is None and not (folder / PARTIAL).exists()


def test_a_model_without_its_mark_is_not_moved(tmp_path: Path) -> None:
    write(tmp_path / PARTIAL / MODEL, marked=False, config="half")
    finish_interrupted(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_old_checkpoints_go_by_step(tmp_path: Path) -> None:
    """Not by the clock, which may be set back."""
    for step in (30, 9, 10, 20):
        write(tmp_path / f"checkpoint-{step}", weights="whole")
    write(tmp_path / "checkpoint-5", marked=False, weights="of an older version")
    delete_old_checkpoints(tmp_path / "checkpoint-20", 2, str(tmp_path / "checkpoint-9"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-5", "checkpoint-9"]
    delete_old_checkpoints(tmp_path / "checkpoint-20", None, None)
    assert len(whole_checkpoints(tmp_path)) == 2


def test_a_deletion_that_a_kill_left_out_is_made_up_for(tmp_path: Path) -> None:
    state = {"trainer_state.json": json.dumps({"best_model_checkpoint": str(tmp_path / "checkpoint-1")})}
    for step in (1, 2, 4):
        write(tmp_path / f"checkpoint-{step}", **state)
    finish_deletion(tmp_path / "checkpoint-2", 1)  # a later one would be lost
    assert len(whole_checkpoints(tmp_path)) == 3
    finish_deletion(tmp_path / "checkpoint-4", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4"]


@pytest.fixture
def make(tmp_path, tokenizer, sft_rows):
    def one(eval_rows=None, **options):
        base = dict(max_steps=3, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
        args = SFTConfig(str(tmp_path / "run"), per_device_train_batch_size=4, **(base | options))
        return SFTTrainer(
            tiny_model(), args, train_dataset=sft_rows, eval_dataset=eval_rows, processing_class=tokenizer
        )

    return one


def test_a_full_disk_leaves_the_checkpoint_before(make, tmp_path, monkeypatch):
    """Also with one checkpoint to keep, and a damaged one is passed over by name."""
    save_pretrained, saves = PreTrainedModel.save_pretrained, []

    def fill_disk(self, folder, **kwargs):
        save_pretrained(self, folder, **kwargs)
        saves.append(folder)
        if len(saves) == 3:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fill_disk)
    with pytest.raises(OSError, match=r"checkpoint-3: could not be saved: .*No space.* the last whole .*checkpoint-2"):
        make(save_total_limit=1).train()
    run = tmp_path / "run"
    assert [path.name for path in whole_checkpoints(run)] == ["checkpoint-2"]
    assert not (run / PARTIAL).exists() and not (run / "checkpoint-1").exists()

    shutil.copytree(run / "checkpoint-2", run / "checkpoint-10")
    (run / "checkpoint-10" / "optimizer.pt").unlink()
    assert checkpoint_to_resume("auto", str(run)) == str(run / "checkpoint-2")
    with pytest.raises(ValueError, match=r"optimizer.pt is missing; the last whole checkpoint is .*checkpoint-2"):
        checkpoint_to_resume(str(run / "checkpoint-10"), str(run))
    trainer = make()
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert trainer.state.global_step == 3 and problem_of(run / "checkpoint-3") is None

    # A model is replaced by a whole one, or not at all.
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert (run / "model.safetensors").stat().st_mode == (run / "config.json").stat().st_mode
    monkeypatch.setattr("rlhf.trainers.checkpointing.write_mark", no_space)
    with pytest.raises(OSError, match="run: could not be saved: No space left"):
        trainer.save_model()
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_best_checkpoint_has_its_final_path(make, sft_rows, tmp_path):
    options = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, save_total_limit=1)
    trainer = make(sft_rows.select(range(4)), **options)
    trainer.train()
    best = tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert problem_of(best) is None


def test_a_mark_of_too_many_brackets_is_damaged(tmp_path):
    (tmp_path / MARK).write_text("[" * 3000)
    assert f"{MARK} cannot be read" in problem_of(tmp_path)
