"""--overwrite never takes away what it reads, what others wrote, or the old model before the new one is whole."""

from pathlib import Path

import pytest

from rlhf.cli.overwriting import WRITTEN_BY_RUN, delete_set_aside, refuse_inputs_inside, set_aside
from rlhf.trainers.checkpoint_files import write_mark


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoint-2").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "training_args.bin", "vocabulary.odd"):
        (folder / name).write_text("old")
    write_mark(folder)
    for name in ("notes.txt", ".run.lock", "bad_rows.jsonl"):
        (folder / name).write_text("mine")
    return folder


def test_only_what_a_run_wrote_is_set_aside_and_deleted_later(run: Path) -> None:
    aside = set_aside(run, WRITTEN_BY_RUN)
    assert aside == run / ".old-1"
    assert {path.name for path in run.iterdir()} == {".old-1", "notes.txt", ".run.lock", "bad_rows.jsonl"}
    assert (aside / "vocabulary.odd").read_text() == "old" and (aside / "checkpoint-2").is_dir()
    (run / "config.json").write_text("half")
    assert set_aside(run, WRITTEN_BY_RUN) == run / ".old-2"
    assert set_aside(run, WRITTEN_BY_RUN) is None
    delete_set_aside(run)
    # Nothing shows that a run wrote the second.
    assert {path.name for path in run.iterdir()} == {".old-2", "notes.txt", ".run.lock", "bad_rows.jsonl"}


@pytest.mark.parametrize(
    "option", ["model_name_or_path", "dataset_name", "teacher_adapter", "ref_model", "reward_funcs", "config"]
)
def test_an_input_in_the_folder_is_refused(run: Path, option: str, tmp_path: Path) -> None:
    inside = str(run / "notes.txt")
    (run / "score.py").touch()
    values = {"dataset_name": [str(tmp_path), inside], "reward_funcs": [f"{run}/score.py:score"]}
    options = {"output_dir": str(run), option: values.get(option, inside)}
    with pytest.raises(ValueError, match=rf"--overwrite would replace .*\(--{option}\)"):
        refuse_inputs_inside(run, options)
    refuse_inputs_inside(run, {"output_dir": str(run), option: str(tmp_path), "loss_type": "sigmoid"})


@pytest.mark.parametrize("inner", [".", "notes"])
def test_the_working_directory_is_refused(run: Path, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / inner).mkdir(exist_ok=True)
    monkeypatch.chdir(run / inner)
    with pytest.raises(ValueError, match="of the working directory"):
        refuse_inputs_inside(run, {})
