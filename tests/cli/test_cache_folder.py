"""One option moves all that is kept outside the output folder."""

import os
import re
import sys
from pathlib import Path

import pytest

from rlhf.cli.cache_folder import PLACES, move_caches
from rlhf.cli.main import main
from rlhf.cli.options import value_of

PAGE = Path(__file__).parents[2] / "docs/places.md"


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has imported nothing yet."""
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    for name in (*PLACES, "HF_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)


def test_all_caches_move_and_the_token_stays(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/before")
    move_caches(str(tmp_path / "caches"))
    for name in PLACES:
        assert Path(os.environ[name]).is_relative_to(tmp_path / "caches")
    assert os.environ["HF_TOKEN_PATH"] == "/before/token"
    move_caches(str(tmp_path / "caches"))  # as in a process that a launcher started
    assert os.environ["HF_TOKEN_PATH"] == "/before/token"


def test_none_leaves_them(fresh):
    move_caches(None)
    assert "HF_HOME" not in os.environ


def test_what_cannot_be_followed_is_refused(tmp_path, data_files, capsys):
    # Here the packages have read their places.
    assert main(["data", str(data_files / "sft.jsonl"), "--cache-dir", str(tmp_path)]) == 2
    assert "too late in a program that loads models already" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    (tmp_path / "c.yaml").write_text(f"cache_dir: {tmp_path / 'file'}")
    assert main(["sft", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "is a file; choose a folder" in capsys.readouterr().err


def test_the_last_value_counts_in_any_spelling():
    assert value_of("cache_dir", ["--cache_dir", "a", "--cache-dir=b"]) == "b"
    assert value_of("cache_dir", ["--cache_dir"]) is None


def test_the_page_lists_each_place():
    assert set(PLACES) <= set(re.findall(r"`([A-Z_]+)`", PAGE.read_text(encoding="utf-8")))
