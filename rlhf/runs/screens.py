"""Where the lines of a run are shown: as plain text, above a bar in a terminal, or as a table in a notebook."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from rlhf.runs.lines import EVALUATION, Line, Pace, duration, number, thousands
from rlhf.visible import visible

_SECONDS_BETWEEN_UPDATES = 0.1  # of a bar
_NOTEBOOK_LINES = 200  # of the table, the last ones; the log has them all


class Screen(Protocol):
    """Where a run is shown."""

    def show(self, line: Line, with_others: bool) -> None:
        """Show a line of the log.

        Args:
            line: of training or of evaluation.
            with_others: whether to show all its other metrics too.
        """

    def tell(self, text: str) -> None:
        """Show any other text.

        Args:
            text: of one or more lines, which may be cut where the terminal ends. Its control characters are shown as
                text.
        """

    def move(self, pace: Pace, evaluated: tuple[int, int] | None) -> None:
        """Move the bar.

        Args:
            pace: of training.
            evaluated: during an evaluation, batches so far and of all.
        """

    def close(self) -> None:
        """Leave the terminal as it was; lines that come later are shown nevertheless."""


class PlainScreen:
    """Lines of text, for a file, a pipe, or a terminal that shows nothing else."""

    def show(self, line: Line, with_others: bool) -> None:
        """See :class:`Screen`."""
        self.tell("\n".join([line.text(), *(line.other_lines() if with_others else [])]))

    def tell(self, text: str) -> None:
        """See :class:`Screen`."""
        print_whole(visible(text))

    def move(self, pace: Pace, evaluated: tuple[int, int] | None) -> None:
        """Nothing: there is no bar."""

    def close(self) -> None:
        """Nothing to leave."""


class TerminalScreen:
    """Lines above a live bar.

    Args:
        console: by default the terminal of standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._updated = 0.0

    def show(self, line: Line, with_others: bool) -> None:
        """See :class:`Screen`."""
        width = self.console.width
        style = "bold" if line.head.startswith(EVALUATION) else ""
        self._print(Text(line.text(width), style=style))
        for text in line.other_lines(width) if with_others else []:
            self._print(Text(text, style="dim"))

    def tell(self, text: str) -> None:
        """See :class:`Screen`."""
        self._print(Text(visible(text)))

    def _print(self, text: Text) -> None:
        text = Text(writable(text.plain, self.console.encoding), style=text.style)
        self.console.print(text, no_wrap=True, overflow="ellipsis", highlight=False)

    def move(self, pace: Pace, evaluated: tuple[int, int] | None) -> None:
        """See :class:`Screen`."""
        if self._bar is None:
            self._bar = self._make_bar()
            self._bar.start()
        is_over = pace.step >= pace.steps
        if self._task is None:
            self._task = self._bar.add_task("training", total=pace.steps, end="")
        speed = "" if pace.tokens_per_second is None else f"{thousands(pace.tokens_per_second)} tok/s"
        left = "" if pace.seconds_left is None else f"{duration(pace.seconds_left)} left"
        end = " · ".join(part for part in (speed, left) if part)
        self._bar.update(self._task, completed=pace.step, end=end, visible=not is_over)
        self._move_evaluation(self._bar, evaluated)
        # A bar needs no more than a few pictures a second.
        is_first_or_last = evaluated is None and (is_over or self._updated == 0.0)
        if is_first_or_last or time.monotonic() - self._updated >= _SECONDS_BETWEEN_UPDATES:
            self._bar.refresh()
            self._updated = time.monotonic()

    def _move_evaluation(self, bar: Progress, evaluated: tuple[int, int] | None) -> None:
        if evaluated is None:
            if self._evaluation is not None:
                bar.remove_task(self._evaluation)
            self._evaluation = None
            return
        done, batches = evaluated
        if self._evaluation is None:
            self._evaluation = bar.add_task("evaluation", total=batches, end="")
        bar.update(self._evaluation, completed=done)

    def _make_bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[end]}"),
            console=self.console,
            # Without a thread of its own: a process that forks, or that ends by an error, leaves none behind.
            auto_refresh=False,
            transient=True,
            expand=True,
            redirect_stderr=sys.stderr.isatty(),
        )

    def close(self) -> None:
        """See :class:`Screen`."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = self._evaluation = None
        self._updated = 0.0


class NotebookScreen:
    """A table below the cell, with a row for each step of the log.

    Args:
        display: ``IPython.display``.
    """

    def __init__(self, display: Any) -> None:
        self._display = display
        self._rows: list[dict[str, str]] = []
        self._texts: list[str] = []
        self._bar = ""
        self._handle: Any = None
        self._updated = 0.0

    def show(self, line: Line, with_others: bool) -> None:
        """See :class:`Screen`."""
        kind, _, step = line.head.rpartition(" ")
        kind = kind.strip()
        prefix = "" if kind == "step" else f"{kind} "
        values = line.figures | (line.others if with_others else {})
        cells = {f"{prefix}{name}": number(value) for name, value in values.items()}
        if not prefix:
            cells |= {name: text.removeprefix("lr ") for name, text in line.pace.items() if name in ("lr", "speed")}
        # An evaluation stands beside the training of the same step.
        if self._rows and self._rows[-1]["step"] == step:
            self._rows[-1] |= cells
        else:
            self._rows.append({"step": step} | cells)
        self._update()

    def tell(self, text: str) -> None:
        """See :class:`Screen`."""
        self._texts.append(visible(text))
        self._update()

    def move(self, pace: Pace, evaluated: tuple[int, int] | None) -> None:
        """See :class:`Screen`."""
        done, total = evaluated or (pace.step, pace.steps)
        left = "" if pace.seconds_left is None or evaluated else f" · {duration(pace.seconds_left)} left"
        name = "evaluation" if evaluated else "step"
        self._bar = "" if pace.step >= pace.steps and not evaluated else (
            f'<progress value="{done}" max="{total}"></progress> {name} {done}/{total}{left}'
        )  # fmt: skip
        if time.monotonic() - self._updated >= _SECONDS_BETWEEN_UPDATES:
            self._update()

    def close(self) -> None:
        """Take the bar away; the table stays."""
        self._bar = ""
        if self._handle is not None:
            self._update()

    def html(self) -> str:
        """The table, the bar and the last text below it, as they are now.

        Returns:
            HTML, whose texts are escaped.
        """
        parts = []
        if self._rows:
            parts.append(_html_table(self._rows[-_NOTEBOOK_LINES:]))
        if self._bar:
            parts.append(f"<div>{self._bar}</div>")
        parts += [f'<pre style="white-space: pre-wrap">{escape(text)}</pre>' for text in self._texts[-1:]]
        return "\n".join(parts)

    def _update(self) -> None:
        content = self._display.HTML(self.html())
        if self._handle is None:
            self._handle = self._display.display(content, display_id=True)
        else:
            self._handle.update(content)
        self._updated = time.monotonic()


def _html_table(rows: Sequence[Mapping[str, str]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))

    def line(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f'<{tag} style="text-align: right">{escape(text)}</{tag}>' for text in texts) + "</tr>"

    lines = [line("th", names), *(line("td", [row.get(name, "") for name in names]) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def writable(text: str, encoding: str | None) -> str:
    """Replace what an output cannot show: a run must not end because of a character.

    Args:
        text: any text.
        encoding: of the output; None for one that takes all.

    Returns:
        The text, with ``|`` for the dots between figures and ``?`` for other characters where needed.
    """
    if encoding is None:
        return text
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace("·", "|").replace("→", "->")
        return text.encode(encoding, errors="replace").decode(encoding)
    return text


def print_whole(text: str) -> None:
    """Print a text, whatever its output can show.

    Args:
        text: of one or more lines.
    """
    # A line must be seen when it is written, also through a pipe.
    print(writable(text, sys.stdout.encoding), flush=True)


def make_screen(plain: bool) -> Screen:
    """The screen that suits where this program runs.

    Args:
        plain: whether lines of text are asked for.

    Returns:
        A table in a notebook; a bar in a terminal that can show one; plain lines elsewhere.
    """
    if plain:
        return PlainScreen()
    if (display := _notebook_display()) is not None:
        return NotebookScreen(display)
    shows_control_codes = sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    return TerminalScreen() if shows_control_codes and not os.environ.get("NO_COLOR") else PlainScreen()


def _notebook_display() -> Any:
    """``IPython.display``, where this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")  # the notebook has imported it
    shell = None if ipython is None else ipython.get_ipython()
    return ipython.display if shell is not None and hasattr(shell, "kernel") else None  # type: ignore[union-attr]
