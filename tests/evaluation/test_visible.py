"""What a file or a model wrote cannot steer the terminal or the page that shows it."""

import json
import logging
from io import StringIO

from rich.console import Console

from rlhf.cli.main import main
from rlhf.data import Reading, load_data
from rlhf.evaluation import audit, audit_page, show_audit, show_completions, show_metrics
from rlhf.online import completions
from rlhf.online.samples import Sample
from rlhf.visible import VisibleFormatter, visible

# Clears the screen, sets the window's title, moves back, rings, turns the direction of writing.
HOSTILE = "a\x1b[2J\x1b]0;owned\x07\x08\x9b1m\u202eb [red]c[/blue] <script>"
FORBIDDEN = ("\x1b[2J", "\x1b]", "\x07", "\x08", "\x9b", "\u202e")


def is_safe(text):
    return not any(control in text for control in FORBIDDEN)


def test_control_characters_become_text_and_nothing_else_does():
    assert visible("a\x1b[2J\r\x9b\u202e\x00") == "a\\x1b[2J\\x0d\\x9b\\u202e\\x00"
    plain = "Grüße, 日本 👩‍👩‍👧 \n\tשלום"
    assert visible(plain) == plain


def test_an_audit_is_safe(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"prompt": HOSTILE, "completion": HOSTILE, HOSTILE: 1}
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": 3}))
    report = audit(load_data(str(file)), str(file) + HOSTILE, "sft", None, Reading(), samples=2)
    report.roles[HOSTILE] += 1
    page = audit_page(report)
    assert is_safe(page) and "<script>" not in page
    for colours in (None, "truecolor"):
        console = Console(file=StringIO(), width=300, color_system=colours, force_terminal=colours is not None)
        show_audit(report, console)
        assert is_safe(console.file.getvalue()) and "[red]c[/blue]" in console.file.getvalue()


def test_tables_of_models_and_samples_are_safe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    show_metrics({HOSTILE: {"loss": 1.0}})
    show_completions([HOSTILE], {HOSTILE: [HOSTILE]})
    sample = Sample(0, {"prompt": HOSTILE}, [1], [1], None, HOSTILE, False, {})
    completions.print_completions([sample], 1)
    printed = capsys.readouterr().out
    assert is_safe(printed) and printed.count("[red]c[/blue]") >= 5


def test_errors_and_logs_are_safe(tmp_path, capsys):
    assert main(["data", str(tmp_path / HOSTILE)]) == 2
    assert is_safe(capsys.readouterr().err)
    record = logging.LogRecord("rlhf", logging.INFO, "", 0, "%s", (HOSTILE,), None)
    assert is_safe(VisibleFormatter("%(message)s").format(record))
