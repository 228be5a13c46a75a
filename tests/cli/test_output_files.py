"""A file that a command writes at its end is checked before the work, and replaced only when asked to."""

import errno
import tempfile

import pytest

from rlhf.cli.main import main
from rlhf.cli.output_files import check_output_file, write_output_file


@pytest.mark.parametrize("command", ["eval --model_name_or_path none --output_file", "data --html"])
def test_a_file_that_exists_is_refused_before_the_work(command, tmp_path, data_files, capsys):
    notes = tmp_path / "notes"
    notes.write_text("mine")
    argv = [*command.split(), str(notes), "--dataset_name", str(data_files / "sft.jsonl")]
    assert main(argv) == 2
    assert capsys.readouterr().err.endswith(
        f"{notes}: exists already; choose another, or pass --overwrite to replace it\n"
    )
    assert notes.read_text() == "mine"


def test_overwrite_replaces_it(tmp_path, data_files):
    page = tmp_path / "page.html"
    page.write_text("old")
    assert main(["data", str(data_files / "sft.jsonl"), "--html", str(page), "--overwrite"]) == 0
    assert page.read_text().startswith("<!doctype html>")


def test_a_place_where_nothing_can_be_written_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a folder; name a file"):
        check_output_file("html", str(tmp_path), True)
    with pytest.raises(ValueError, match=f"{file} is a file, not a folder"):
        check_output_file("html", str(file / "page.html"), False)

    # As on a read-only file system: permissions stop no root.
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=rf"cannot write to {tmp_path} \(Read-only file system\); choose another"):
        check_output_file("html", str(tmp_path / "new" / "page.html"), False)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    report = tmp_path / "report.json"
    report.write_text("old")

    def fail(path, text, **_):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        write_output_file(report, "new")
    assert report.read_text() == "old" and list(tmp_path.iterdir()) == [report]
