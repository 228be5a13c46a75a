"""The lines of a run in a terminal, in a notebook, and elsewhere."""

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from rlhf.runs.lines import FIGURES, Pace, log_line
from rlhf.runs.screens import NotebookScreen, PlainScreen, TerminalScreen, make_screen, writable

PACE = Pace(5, 20, 1234.0, 61.0)
TRAINING = log_line(
    {"loss": 0.5, "perplexity": 1.6, "learning_rate": 2e-5, "aux_loss": 0.1}, FIGURES["SFTTrainer"], PACE
)
EVALUATION = log_line({"eval_loss": 0.4, "eval_perplexity": 1.5}, FIGURES["SFTTrainer"], PACE)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_plain_lines_have_no_control_codes(capsys):
    screen = PlainScreen()
    screen.move(PACE, None)
    screen.show(TRAINING, with_others=True)
    screen.tell("an answer \x1b[31m")
    assert capsys.readouterr().out == (
        "step  5/20 · loss 0.500 · ppl 1.600 · lr 2e-5 · 1.23k tok/s · 1:01 left\n"
        "    aux_loss 0.100\n"
        "an answer \\x1b[31m\n"
    )


def test_a_terminal_has_lines_above_a_bar_that_is_gone_in_the_end():
    file = Terminal()
    screen = TerminalScreen(Console(file=file, force_terminal=True, width=60, color_system=None))
    screen.move(PACE, None)
    assert "training" in file.getvalue() and "5/20 1.23k tok/s · 1:01 left" in file.getvalue()
    screen.show(TRAINING, with_others=False)
    assert "step  5/20 · loss 0.500 · ppl 1.600 · lr 2e-5 · 1.23k tok/s\n" in file.getvalue()  # the bar has the rest
    screen.move(PACE, (1, 3))
    screen._bar.refresh()
    assert "evaluation" in file.getvalue() and "1/3" in file.getvalue()
    screen.show(EVALUATION, with_others=False)
    screen.move(Pace(20, 20), None)
    written = len(file.getvalue())
    screen.close()
    assert "\x1b[?25h" in file.getvalue()[written:]  # the cursor is there again
    assert "training" not in file.getvalue()[written:]
    screen.tell("after the bar")
    assert file.getvalue().endswith("after the bar\n")


def test_a_notebook_has_a_table_that_is_updated_in_place():
    shown = []
    handle = SimpleNamespace(update=shown.append)

    def display(content, display_id):
        assert display_id is True
        shown.append(content)
        return handle

    screen = NotebookScreen(SimpleNamespace(HTML=str, display=display))
    screen.move(PACE, None)
    screen.show(TRAINING, with_others=False)
    screen.show(EVALUATION, with_others=False)
    screen.tell("<b>an answer</b>")
    cells = [text.split("</t")[0] for text in shown[-1].split('right">')[1:]]
    assert cells[:7] == ["step", "loss", "ppl", "lr", "speed", "eval loss", "eval ppl"]
    assert cells[7:] == ["5/20", "0.500", "1.600", "2e-5", "1.23k tok/s", "0.400", "1.500"]
    assert '<progress value="5" max="20"></progress> step 5/20 · 1:01 left' in shown[-1]
    assert "&lt;b&gt;an answer" in shown[-1]
    screen.move(Pace(20, 20), None)  # so soon after the last update that it is not shown
    screen.close()
    assert "<progress" not in shown[-1] and "<table" in shown[-1]


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({"TERM": "xterm"}, TerminalScreen),
        ({"TERM": "dumb"}, PlainScreen),
        ({"TERM": "xterm", "NO_COLOR": "1"}, PlainScreen),
    ],
)
def test_the_screen_suits_the_terminal(variables, kind, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert type(make_screen(plain=False)) is PlainScreen  # pytest's output is no terminal
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert type(make_screen(plain=False)) is kind
    assert type(make_screen(plain=True)) is PlainScreen


@pytest.mark.parametrize(
    ("shell", "kind"), [(SimpleNamespace(kernel=1), NotebookScreen), (SimpleNamespace(), PlainScreen)]
)
def test_a_notebook_is_known_by_its_kernel(shell, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace()))
    assert type(make_screen(plain=False)) is kind


def test_a_character_that_an_output_cannot_show_ends_no_run():
    assert writable("a · b → ü", "ascii") == "a | b -> ?"
    assert writable("a · b → ü", "utf-8") == "a · b → ü"
