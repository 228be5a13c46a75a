"""Run the blocks of a documentation page in order, as a reader would, in a process and a folder of their own.

* a block with a title (` ```yaml title="dpo.yaml" `) is written to that file;
* `sh`: each line is run. `rlhf ...` and `python FILE` run in this process, so that a page imports torch once; they may
  read a pipe or a here-document and write to a file. A block with any other syntax goes to bash as a whole.
  `# status 2` at the end of a line is the exit status that the line must have;
* `python`: all blocks of a page share their names. A last comment such as `# ValueError: targets must be` is the
  exception that the block must raise, and the beginning of its message;
* other blocks, such as outputs, are not run.
"""

import ast
import contextlib
import faulthandler
import os
import pickle
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<source>.*?)^```$", re.DOTALL | re.MULTILINE)
_STATUS = re.compile(r"\s+# status (\d+)$")
_PROGRAMS = ("rlhf", "python")
_TAIL = 6_000  # characters of the output that a failure shows


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str | None
    source: str
    line: int


class Ran(NamedTuple):
    """A line or a block that was run: what it was, its exit status, and what it printed."""

    source: str
    status: int
    output: str


class ShellLine(NamedTuple):
    """A line that runs in this process: its words, where its input comes from, and where its output goes."""

    words: list[str]
    source: str
    status: int = 0
    input_command: str | None = None
    input_text: str | None = None
    output_file: str | None = None


class PageError(Exception):
    """A block of a page did not do what the page says."""


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    blocks = []
    for match in _BLOCK.finditer(page):
        title = re.search(r'title="([^"]+)"', match["info"])
        line = page.count("\n", 0, match.start()) + 1
        blocks.append(Block(match["language"], title[1] if title else None, match["source"], line))
    return blocks


def run_page(
    page: str | Path,
    folder: Path,
    *,
    replace: Mapping[str, Any] | None = None,
    files: Mapping[str, Path] | None = None,
    only: Sequence[str] = ("sh", "python"),
    timeout: float = 240,
) -> list[Ran]:
    """Run a page; raises :class:`PageError` at the first block that does something else than the page says.

    Args:
        page: path of a Markdown file.
        folder: the working directory, empty.
        replace: texts of the page and what stands in their place, such as a smaller model. All must occur.
        files: names that the page reads, and the files to put there.
        only: languages to run.
        timeout: seconds for the page.
    Returns:
        What was run, in order.
    """
    text = Path(page).read_text(encoding="utf-8")
    for old, new in (replace or {}).items():
        if old not in text:
            raise PageError(f"{page}: {old!r} is to be replaced, and does not occur")
        text = text.replace(old, str(new))
    for name, source in (files or {}).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(source).read_bytes())

    # Forked, so that what the tests imported is there already.
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_all, args=(sender, str(page), text, folder, tuple(only), timeout))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout + 30):
            raise PageError(f"{page}: no end after {timeout} seconds")
        ran, failure = pickle.loads(receiver.recv_bytes())
    except EOFError as error:
        raise PageError(f"{page}: the process ended: {(folder.parent / 'page_output.txt').read_text()}") from error
    finally:
        process.kill()
        process.join()
    if failure:
        raise PageError(failure)
    return ran


def _run_all(sender: Any, page: str, text: str, folder: Path, only: tuple[str, ...], timeout: float) -> None:
    """In the forked process: run the blocks and send what happened."""
    log = folder.parent / "page_output.txt"
    output = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_RDWR)
    faulthandler.dump_traceback_later(timeout, exit=True, file=output)
    _become_a_program(output, folder)
    runner = _Runner(log)
    failure = None
    for block in blocks_of(text):
        where = f"{page}:{block.line}"
        try:
            if block.title is not None:
                target = Path(block.title)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(block.source, encoding="utf-8")
            elif block.language in only:
                runner.run(block)
        except BaseException as error:
            printed = runner.printed()[-_TAIL:]
            cause = str(error) if isinstance(error, PageError) else traceback.format_exc()
            failure = f"{where}\n{textwrap.indent(block.source, '    ')}\n{printed}\n{cause}"
            break
    faulthandler.cancel_dump_traceback_later()
    sender.send_bytes(pickle.dumps((runner.ran, failure)))
    sender.close()
    os._exit(0)


def _become_a_program(output: int, folder: Path) -> None:
    """Give this process what a program of its own has: standard streams, a working directory, programs by name."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)
    # pytest has replaced them.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    # pytest collects warnings; a program prints them.
    warnings.showwarning = _print_warning
    programs = Path(tempfile.mkdtemp(dir=folder.parent))
    for name, words in (("rlhf", "-m rlhf "), ("python", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words}"$@"\n')
        program.chmod(0o755)
    os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    # A script's folder is the first on its path.
    sys.path.insert(0, "")
    os.chdir(folder)


def _print_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


class _Runner:
    """Runs blocks one after the other; Python blocks share their names."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.ran: list[Ran] = []
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self._start = 0

    def printed(self) -> str:
        """What was printed since the last step."""
        sys.stdout.flush()
        sys.stderr.flush()
        with self.log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")

    def run(self, block: Block) -> None:
        if block.language == "python":
            self._step(block.source, 0, lambda: _run_python(block.source, self.names))
            return
        lines = shell_lines(block.source)
        if lines is None:
            self._step(block.source, 0, lambda: subprocess.run(["bash", "-ec", block.source]).returncode)
            return
        for line in lines:
            self._step(line.source, line.status, lambda line=line: _run_line(line))

    def _step(self, source: str, expected: int, action: Any) -> None:
        self._start = self.log.stat().st_size
        status = action()
        printed = self.printed()
        self.ran.append(Ran(source, status, printed))
        if status != expected:
            raise PageError(f"status {status}, expected {expected}: {source}")


# The shell


def shell_lines(source: str) -> list[ShellLine] | None:
    """The lines of a block that run in this process; None where the block needs a shell."""
    lines: list[ShellLine] = []
    rest = source.replace("\\\n", " ").splitlines()
    while rest:
        text = rest.pop(0).strip()
        if not text or text.startswith("#"):
            continue
        line = _shell_line(text)
        if line is None:
            return None
        if line.input_text is not None:
            mark, body = line.input_text, []
            while rest and rest[0] != mark:
                body.append(rest.pop(0))
            if not rest:
                return None
            rest.pop(0)
            line = line._replace(input_text="".join(f"{one}\n" for one in body))
        lines.append(line)
    return lines


def _shell_line(text: str) -> ShellLine | None:
    """A line of a program of ours; None for anything else."""
    expected = _STATUS.search(text)
    command = _STATUS.sub("", text)
    tokens = shlex.shlex(command, posix=True, punctuation_chars=True)
    tokens.whitespace_split = True
    words = list(tokens)
    input_command = None
    if "|" in words and "rlhf" in words[words.index("|") :]:
        # What stands before the pipe only makes the input.
        input_command, _, _ = command.rpartition("|")
        words = words[len(words) - words[::-1].index("|") :]
    line = ShellLine(words, text, int(expected[1]) if expected else 0, input_command)
    if len(words) > 2 and words[-2] == "<<":
        line = line._replace(words=words[:-2], input_text=words[-1])
    elif len(words) > 2 and words[-2] == "<":
        line = line._replace(words=words[:-2], input_command=f"cat {shlex.quote(words[-1])}")
    elif len(words) > 2 and words[-2] == ">":
        line = line._replace(words=words[:-2], output_file=words[-1])
    punctuation = any(set(word) <= set("();<>|&") for word in line.words)
    needs_shell = punctuation or re.search(r"[$`*?]", command) or line.words[0] not in _PROGRAMS
    # `python -m` and `python -c` are other programs.
    needs_shell = needs_shell or (line.words[0] == "python" and line.words[1].startswith("-"))
    return None if needs_shell else line


def _run_line(line: ShellLine) -> int:
    """Run a program of ours in this process."""
    with contextlib.ExitStack() as stack:
        if line.input_command is not None:
            made = subprocess.run(["bash", "-c", line.input_command], capture_output=True, check=True)
            stack.enter_context(_input(made.stdout))
        elif line.input_text is not None:
            stack.enter_context(_input(line.input_text.encode()))
        if line.output_file is not None:
            file = stack.enter_context(open(line.output_file, "w"))
            stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(_arguments(line.words))
        try:
            if line.words[0] == "rlhf":
                from rlhf.cli.main import main

                return int(main(line.words[1:]))
            runpy.run_path(line.words[1], run_name="__main__")
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


@contextlib.contextmanager
def _input(content: bytes) -> Any:
    """A file in the place of standard input."""
    before = sys.stdin
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        os.dup2(file.fileno(), 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        try:
            yield
        finally:
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.close(nothing)
            sys.stdin = before


@contextlib.contextmanager
def _arguments(words: list[str]) -> Any:
    before = sys.argv
    sys.argv = list(words[1:]) if words[0] == "python" else list(words)
    try:
        yield
    finally:
        sys.argv = before


# Python


def expected_error(source: str) -> tuple[str, str] | None:
    """The exception that the last comment of a block names, and the beginning of its message."""
    comment: list[str] = []
    for line in reversed(source.rstrip().splitlines()):
        if not line.startswith("#"):
            break
        comment.insert(0, line.lstrip("# "))
    match = re.match(r"(\w+(?:Error|Warning|Exception)): ?(.*)", " ".join(comment))
    return (match[1], match[2].rstrip("… ")) if match else None


def _run_python(source: str, names: dict[str, Any]) -> int:
    """Run a block; a last expression is printed, as a notebook does."""
    expected = expected_error(source)
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    try:
        exec(compile(tree, "page", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "page", "eval"), names)
            if value is not None:
                print(value)
    except Exception as error:
        if expected is None or type(error).__name__ != expected[0]:
            raise
        message = " ".join(str(error).split())
        if not message.startswith(" ".join(expected[1].split())):
            raise PageError(f"the message is: {message}") from error
        print(f"{type(error).__name__}: {error}")
        return 0
    if expected is not None:
        raise PageError(f"no {expected[0]} was raised")
    return 0
