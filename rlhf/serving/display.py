"""Answers on the screen: plain text, coloured text as it arrives, or two answers in columns."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from rlhf.serving.answers import Kind, Part
from rlhf.visible import visible

WIDE = 100  # characters, from which two answers stand side by side
_LABELS: dict[Kind, str] = {"reasoning": "thinking", "call": "tool call"}
_STYLES: dict[Kind, str] = {"text": "", "reasoning": "dim", "call": "dim cyan"}
_REFRESH_RATE = 8  # times a second; more would slow the model down

Write = Callable[[str, str], object]  # text and its style


class Writer:
    """One answer, written as it arrives. Control characters are shown as text: a model may write escape sequences.

    Args:
        write: shows a text in a style.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._kind: Kind | None = None
        self._at_line_start = True

    def part(self, part: Part) -> None:
        """Show a piece of the answer.

        Args:
            part: may go on the last one.
        """
        text = part.text
        if part.kind != self._kind:
            if self._kind is not None or part.kind != "text":
                text = text.lstrip("\n")  # a label begins a line of its own
                self._label(part.kind, is_first=self._kind is None)
            self._kind = part.kind
        self._show(visible(text), _STYLES[part.kind])

    def close(self, note: str = "") -> None:
        """End the answer.

        Args:
            note: shown behind it.
        """
        if not self._at_line_start:
            self._show("\n", "")
        if note:
            self._show(f"[{note}]\n", "dim")

    def _label(self, kind: Kind, is_first: bool) -> None:
        if not self._at_line_start:
            self._show("\n", "")
        label = _LABELS.get(kind)
        if label is not None:
            self._show(f"[{label}]\n", "dim italic")
        elif not is_first:
            # Behind reasoning only, so that plain output tells the two apart.
            self._show("[answer]\n", "dim italic")

    def _show(self, text: str, style: str) -> None:
        if text:
            self._write(text, style)
            self._at_line_start = text.endswith("\n")


class Display:
    """Where answers are shown.

    Args:
        console: of the terminal or file. Without a terminal no control codes are written.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)

    @contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[list[Writer]]:
        """Show the answers of all models to one question.

        Args:
            names: of the models.

        Yields:
            A writer for each. They are used one after the other.
        """
        if len(names) > 1 and self.console.is_terminal and self.console.width >= WIDE:
            with self._columns(names) as writers:
                yield writers
        else:
            yield [self._writer(name if len(names) > 1 else None) for name in names]

    def note(self, text: str) -> None:
        """Show a line that is no answer.

        Args:
            text: may quote the user or a file.
        """
        self.console.print(Text(visible(text), style="dim" if self.console.is_terminal else ""))

    def _writer(self, name: str | None) -> Writer:
        is_named = name is None

        def write(text: str, style: str) -> None:
            nonlocal is_named
            if not is_named:
                self._print(f"{visible(str(name))}:\n", "bold")
                is_named = True
            self._print(text, style)

        return Writer(write)

    def _print(self, text: str, style: str) -> None:
        self.console.print(Text(text, style=style), end="")
        self.console.file.flush()

    @contextmanager
    def _columns(self, names: Sequence[str]) -> Iterator[list[Writer]]:
        texts = [Text() for _ in names]

        def rendered() -> RenderableType:
            width = self.console.width // len(names) - 1
            panels = [
                Panel(text, title=visible(name), title_align="left", width=width, border_style="dim")
                for name, text in zip(names, texts, strict=True)
            ]
            return Group(Columns(panels, padding=(0, 1)))

        live = Live(
            console=self.console,
            get_renderable=rendered,
            refresh_per_second=_REFRESH_RATE,
            vertical_overflow="ellipsis",
        )
        with live:
            yield [Writer(text.append) for text in texts]
