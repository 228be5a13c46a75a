"""Make a picture of a terminal in which a command runs: ``python docs/pictures/terminal.py FILE.svg COLUMNS COMMAND …``

Needs ``pip install pyte``. The command runs in a terminal of its own; pyte draws it, rich writes the picture: that of
the end, or with ``--until PATTERN`` that of the moment at which the pattern is on the screen.
"""

import argparse
import fcntl
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

LINES = 60  # of the terminal; the picture has those that are used
_COLORS = {"default": None, "brown": "yellow"}


def screen_of(command: list[str], columns: int, until: str | None, seconds: float = 600) -> list:
    """The lines of the screen, each a list of pyte's characters."""
    import pyte

    screen = pyte.Screen(columns, LINES)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(LINES)}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end and not (until and any(re.search(until, line) for line in screen.display)):
            if not select.select([ours], [], [], 1)[0]:
                continue
            try:
                data = os.read(ours, 65536)
            except OSError:  # the command has ended
                break
            stream.feed(data)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    rows = [[screen.buffer[row][column] for column in range(columns)] for row in range(LINES)]
    while rows and not "".join(character.data for character in rows[-1]).strip():
        rows.pop()
    return rows


def as_svg(rows: list, columns: int, title: str) -> str:
    """The lines as a picture without fonts from the network."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=columns, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for row in rows:
        text = Text(no_wrap=True, overflow="crop")
        for character in row:
            color = _COLORS.get(character.fg, character.fg)
            color = f"#{color}" if color and re.fullmatch("[0-9a-f]{6}", color) else color
            style = " ".join([*(["bold"] if character.bold else []), color or ""]).strip()
            text.append(character.data, style)
        text.rstrip()
        console.print(text)
    svg = console.export_svg(title=title)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S).replace("Fira Code, monospace", "monospace")


def main(words: list[str]) -> None:
    """Make the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("columns", type=int)
    parser.add_argument("--until")
    parser.add_argument("--title")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(words)
    rows = screen_of(options.command, options.columns, options.until)
    title = options.title or shlex.join(options.command)
    options.file.write_text(as_svg(rows, options.columns, title), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
