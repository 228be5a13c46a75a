"""What a run keeps in its folder: the final model beside its checkpoints, and what an interrupted run left there."""

import json
import os
import shutil
from pathlib import Path

from rlhf.models.adapter_base import PARTIAL
from rlhf.trainers.checkpoint_files import (
    MARK,
    checkpoint_step,
    checkpoints_by_step,
    discard,
    problem_of,
    put_in_place,
    read_mark,
    sync,
)

MODEL = "model"  # in PARTIAL: the final model, until its files are moved into the run's folder


def move_model_in(partial: Path, folder: Path) -> None:
    """Move a whole model into the folder of its run, file by file, and its mark last.

    Files of an earlier model that this one does not have are deleted. A move that is interrupted is finished by
    :func:`finish_interrupted`.

    Args:
        partial: holds the model and its mark.
        folder: of the run.

    Raises:
        OSError: a file cannot be moved.
    """
    names = set(read_mark(partial)["files"])
    earlier_names = _marked_names(folder)
    (folder / MARK).unlink(missing_ok=True)
    for name in earlier_names - names:
        (folder / name).unlink(missing_ok=True)
    for name in sorted(names):
        if (partial / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / name, folder / name)
    sync(folder)
    os.replace(partial / MARK, folder / MARK)
    sync(folder)
    discard(partial)


def finish_interrupted(folder: Path) -> None:
    """Finish what an interrupted run had written whole, and delete what it had not.

    Args:
        folder: of the run; it may be missing. No run may be writing into it.

    Raises:
        OSError: a file cannot be moved.
    """
    partial_folder = folder / PARTIAL
    if not partial_folder.is_dir():
        return
    # A checkpoint comes before the older one of the same step that it replaces ("replaced-…").
    for partial in sorted(partial_folder.iterdir()):
        final = folder / partial.name.removeprefix("replaced-")
        if partial.name == MODEL and (partial / MARK).exists():
            move_model_in(partial, folder)
        elif checkpoint_step(final) is not None and not final.exists() and problem_of(partial) is None:
            put_in_place(partial, final)
        else:
            discard(partial)
    shutil.rmtree(partial_folder, ignore_errors=True)


def delete_old_checkpoints(saved: Path, limit: int | None, best: str | None) -> None:
    """Keep as many checkpoints as asked for: the one just saved, the best one, and the latest others by step.

    Folders without a mark do not count. Checkpoints of later steps go first: they are of a part of the run that was
    given up.

    Args:
        saved: the checkpoint that was just saved.
        limit: how many to keep; None or 0 for all.
        best: path of the best one.
    """
    if not limit or limit < 0:
        return
    by_step = {step: path for step, path in checkpoints_by_step(saved.parent).items() if (path / MARK).exists()}
    kept_names = {saved.name} | ({Path(best).name} if best else set())
    last_step = checkpoint_step(saved) or 0
    given_up_first = sorted(by_step, key=lambda step: (step <= last_step, step))
    deletable = [by_step[step] for step in given_up_first if by_step[step].name not in kept_names]
    num_to_delete = len(by_step) - max(limit, len(kept_names))
    for path in deletable[: max(num_to_delete, 0)]:
        # Renamed first: a deletion that is interrupted leaves no half of a checkpoint.
        deleted = path.parent / PARTIAL / f"deleted-{path.name}"
        deleted.parent.mkdir(exist_ok=True)
        path.rename(deleted)
        discard(deleted)


def finish_deletion(resumed: Path, limit: int | None) -> None:
    """Delete the older checkpoints that a run was killed in front of deleting, after its last save.

    Args:
        resumed: the whole checkpoint that the run goes on from. Nothing is deleted where there is a later one.
        limit: how many to keep; None or 0 for all.
    """
    if last_marked_checkpoint(resumed.parent) != resumed:
        return
    state = json.loads((resumed / "trainer_state.json").read_text(encoding="utf-8"))
    delete_old_checkpoints(resumed, limit, state.get("best_model_checkpoint"))


def last_marked_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; its files are not read.

    Args:
        folder: of the run.

    Returns:
        Its path, or None.
    """
    marked = [path for path in checkpoints_by_step(folder).values() if (path / MARK).exists()]
    return marked[-1] if marked else None


def _marked_names(folder: Path) -> set[str]:
    """Files that the mark of a folder lists; none where it has no readable mark."""
    try:
        return set(read_mark(folder)["files"])
    except ValueError:
        return set()
