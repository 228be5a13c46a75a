"""The page of exit codes says what the program does."""

import re
import signal
from pathlib import Path

import pytest

from rlhf.cli.exit_codes import ExitCode
from rlhf.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs/exit-codes.md").read_text()


def test_the_table_has_every_code():
    assert ExitCode.of_signal(signal.SIGTERM) == ExitCode.TERMINATED == 143
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)] == list(ExitCode)


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("bad"), ExitCode.BAD_INPUT), (FloatingPointError("bad"), ExitCode.NOT_FINITE)]
)
def test_each_kind_of_error_has_its_code(error, code, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("rlhf.cli.training.run", fail)
    assert main(["sft"]) == code
    assert capsys.readouterr().err == "rlhf sft: bad\n"
