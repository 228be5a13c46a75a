"""``rlhf chat``: from a script, and in a terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import sys
import time

import pytest
from conftest import tiny_model
from rich.console import Console

from rlhf.cli.main import main
from rlhf.models import load_reward_model
from rlhf.serving import ChatModel, Display, read_prompt
from rlhf.serving.answers import Part
from rlhf.serving.streaming import TextStream


@pytest.fixture
def chat_with(monkeypatch, capsys):
    """The status of a chat, and what it printed."""

    def run(lines, *words):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status = main(["chat", *map(str, words)])
        return status, capsys.readouterr()

    return run


def test_a_script_asks_changes_options_and_saves_rows_that_training_reads(chat_with, model_folder, tmp_path):
    file = tmp_path / "chats.jsonl"
    lines = f'hello\n"""\ntwo\nlines\n"""\n/undo\n/set top_k 3\n/retry\nthe cat\\\nis big\n/save {file}\n/exit\nno\n'
    status, printed = chat_with(lines, model_folder, "--system", "be small", "--max-new-tokens=6")
    assert status == 0, printed.err
    assert "top_k is 3" in printed.out and "\x1b" not in printed.out
    (row,) = map(json.loads, file.read_text().splitlines())
    asked = [(message["role"], message["content"]) for message in row["messages"] if message["role"] != "assistant"]
    assert asked == [("system", "be small"), ("user", "hello"), ("user", "the cat\nis big")]
    assert main(["data", "--dataset_name", str(file), "--model_name_or_path", str(model_folder)]) == 0


def test_wrong_lines_of_a_script_end_it_in_one_line(chat_with, model_folder, tmp_path):
    for lines, words, message in [
        ("/sett\n", [model_folder], "/help lists them"),
        ("/set top_p 2\n", [model_folder], "top_p must be in (0, 1]"),
        ("/undo\n", [model_folder], "no question yet"),
        ("hi\n", [tmp_path / "gone"], "no such model folder"),
        ("hi\n", [model_folder] * 3, "one model or two"),
        ("word " * 200, [model_folder], "/clear begins again"),
    ]:
        status, printed = chat_with(lines, *words)
        assert status == 2 and message in printed.err and printed.err.count("\n") == 1, printed.err


def test_a_base_model_continues_text_and_a_reward_model_is_refused(chat_with, caplog, tmp_path, tokenizer):
    plain = tmp_path / "plain"
    tiny_model().save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    (plain / "chat_template.jinja").unlink()
    status, printed = chat_with("the cat\n/save " + str(tmp_path / "a.jsonl"), plain, "--max_new_tokens", "4")
    assert status == 0 and "no chat template, so it continues each text" in caplog.text
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert row["prompt"] == "the cat" and row["completion"]
    status, printed = chat_with("hi\n", plain, "--system", "x")
    assert status == 2 and "no chat template" in printed.err

    reward = tmp_path / "reward"
    load_reward_model(str(plain)).model.save_pretrained(reward)
    tokenizer.save_pretrained(reward)
    status, printed = chat_with("hi\n", reward)
    assert status == 2 and "a reward model (LlamaForSequenceClassification): it scores answers" in printed.err


def test_the_end_that_was_taught_ends_the_answer(tokenizer):
    model = tiny_model(eos_token_id=1)
    model.generation_config.eos_token_id = 1
    ends = ChatModel(model, tokenizer, "x").engine.end_ids
    assert set(ends) == {1, tokenizer.convert_tokens_to_ids("<|im_end|>")}


def answered_by(texts, console):
    """A display that showed one answer of each of two models."""
    display = Display(console)
    with display.answers(["old", "new"]) as writers:
        for writer, parts in zip(writers, texts, strict=True):
            for part in parts:
                writer.part(part)
            writer.close("stopped")


REASONED = [Part("reasoning", "\nhm\n"), Part("text", "\n\nyes \x1b[31mred"), Part("call", "f(1)")]


def test_reasoning_and_calls_are_labelled_and_escape_sequences_are_text():
    file = io.StringIO()
    answered_by([REASONED, [Part("text", "no")]], Console(file=file, width=80))
    assert file.getvalue() == (
        "old:\n[thinking]\nhm\n[answer]\nyes \\x1b[31mred\n[tool call]\nf(1)\n[stopped]\nnew:\nno\n[stopped]\n"
    )


def test_a_wide_terminal_has_two_columns():
    file = io.StringIO()
    answered_by([REASONED, [Part("text", "no")]], Console(file=file, width=120, force_terminal=True, color_system=None))
    lines = file.getvalue().splitlines()
    assert any("old" in line and "new" in line for line in lines)
    assert any("[thinking]" in line and "no" in line for line in lines)
    assert any("yes \\x1b[31mred" in line for line in lines)


def test_lines_that_go_on():
    lines = iter(["a\\", "b", '"""c', 'd"""', '"""e"""'])
    assert [read_prompt(lambda _: next(lines)) for _ in range(3)] == ["a\nb", "c\nd", "e"]


def test_ctrl_c_stops_the_answer_and_not_the_chat(model_folder):
    """In a real terminal; the process is a copy of this one, which has imported all."""
    process, terminal = pty.fork()
    if process == 0:
        _begin_as_a_process_of_its_own()
        os._exit(main(["chat", str(model_folder), "--max_new_tokens", "100", "--temperature", "0"]))
    try:
        seen = _read_until(terminal, "Ctrl-D ends.*> ", "")
        os.write(terminal, b"hello\n")
        seen = _read_until(terminal, "> hello\r\n.", seen)  # the answer has begun
        os.write(terminal, b"\x03")
        seen = _read_until(terminal, r"stopped\].*> ", seen)
        os.write(terminal, b"/set seed 4\n")
        # The line editor has the terminal once it has written its prompt; earlier, a Ctrl-D would be lost.
        seen = _read_until(terminal, "seed is 4.*> ", seen)
        os.write(terminal, b"\x04")
        status = _wait(process)
    except AssertionError:
        os.kill(process, signal.SIGKILL)
        raise
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, seen


def _begin_as_a_process_of_its_own():
    # A test runner in the background may ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")  # not those of pytest
    feed = TextStream.feed
    # Slow enough to be stopped.
    TextStream.feed = lambda stream, token: (time.sleep(0.02), feed(stream, token))[1]


def _wait(process):
    for _ in range(200):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.1)
    raise AssertionError("the chat did not end")


def _read_until(terminal, text, seen):
    while not re.search(text, seen, re.DOTALL):
        ready, _, _ = select.select([terminal], [], [], 20)
        assert ready, f"{text!r} was not written after {seen!r}"
        seen += os.read(terminal, 4096).decode(errors="replace")
    return seen
