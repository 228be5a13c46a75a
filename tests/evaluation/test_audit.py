"""What `rlhf data` says of a file, beside what training makes of it."""

import copy
import importlib.util
import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import sentences, write_rows
from datasets import Dataset
from rich.console import Console

from rlhf.cli.main import main
from rlhf.data import Reading, RowFormat, load_data, tokenize_preferences, tokenize_sft
from rlhf.evaluation import audit, audit_page, command_for, show_audit
from rlhf.evaluation.pieces import pieces

U, A, N = (
    {"role": role, "content": text} for role, text in (("user", "why"), ("assistant", "yes"), ("assistant", "no"))
)
ROWS = [
    {"messages": [U, A, U, N], "id": 1},
    {"messages": [U, {**A, "weight": 0}, U, N], "id": 2},
    {"messages": [U, {**A, "content": ""}], "id": 3},
    {"messages": [U, {**A, "weight": 0}], "id": 4},
    {"messages": [U, {**A, "content": "the cat " * 40}], "id": 5},
]


def test_figures_are_those_of_training(tokenizer, tmp_path):
    rows = Dataset.from_list(ROWS)
    found = audit(rows, "rows", "sft", tokenizer, max_length=40)
    trained = tokenize_sft(
        rows, tokenizer, max_length=40, vocab_size=330, reading=Reading(bad_rows=str(tmp_path / "bad.jsonl"))
    )
    labels = [label for row in trained for label in row["labels"]]
    assert found.trained == len(trained) == 3
    assert (found.tokens, found.scored_tokens) == (len(labels), sum(label != -100 for label in labels))
    assert found.lengths == [len(ids) for ids in trained["input_ids"]]
    assert (found.answers, found.scored_answers) == (5, 4)
    assert found.dropped == {"whose answers are all marked not to be learned": [4]}
    assert found.errors == [(3, "'messages', message 2: the assistant's answer is empty")]
    assert found.cut_rows == 1 and found.columns == {"messages": "messages", "id": ""}
    assert found.roles == {"user": 6, "assistant": 6}


def test_pairs_are_counted_as_two_sequences(tokenizer):
    rows = Dataset.from_list([{"prompt": "why", "chosen": " yes", "rejected": " no no"}] * 2)
    found = audit(rows, "rows", command_for(rows, Reading()), tokenizer)
    row = tokenize_preferences(rows, tokenizer, max_length=64, vocab_size=330)[0]
    sizes = [len(row["prompt_ids"]) + len(row[key]) for key in ("chosen_ids", "rejected_ids")]
    assert found.command == "dpo" and found.lengths == sizes * 2
    assert found.scored_tokens == 2 * (len(row["chosen_ids"]) + len(row["rejected_ids"]))


@pytest.mark.parametrize("row, command", [
    ({"messages": [U, A]}, "sft"), ({"prompt": "a", "completion": "b", "label": True}, "kto"),
    ({"messages": [U, A], "label": False}, "kto"), ({"messages": [U, A], "label": "sports"}, "sft"),
    ({"question": "a", "chosen": "b", "rejected": "c"}, "dpo"), ({"problem": "a"}, "grpo"), ({"text": "a"}, "sft"),
    ({"text": "a", "label": 1}, "sft"),
])  # fmt: skip
def test_the_columns_decide_the_command(row, command):
    assert command_for(Dataset.from_list([row]), Reading()) == command


def test_pieces_are_the_text(tokenizer):
    """Characters of several tokens, and spaces that a token loses at the beginning of a text."""
    for text in (*sentences(9, 3), "é 猫 🐈<|im_end|> the"):
        ids = tokenizer(text)["input_ids"]
        shown = pieces(tokenizer, ids, [-100] * (len(ids) - 1) + ids[-1:])
        assert "".join(piece.text for piece in shown) == text
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(piece.text for piece in shown)
        assert [piece.text for piece in shown if piece.special] == (["<|im_end|>"] if "end" in text else [])
        assert [piece.learned for piece in shown] == [False] * (len(shown) - 1) + [True]


def test_a_terminal_without_colours_gets_brackets(tokenizer):
    out = io.StringIO()
    found = audit(Dataset.from_list(ROWS), "rows", "sft", tokenizer, max_length=40)
    show_audit(found, Console(file=out, width=100))
    said = out.getvalue()
    assert "⟦yes<|im_end|>⟧" in said and "4 of 5 (80%)" in said and "not read" in said
    assert "row 3: 'messages', message 2: the assistant's answer is empty" in said


class _Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img")
        self.open += [tag] if tag != "meta" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(tokenizer):
    rows = [*ROWS, {"messages": [{**U, "content": "<b>&amp;"}, A], "id": 6}]
    found = audit(Dataset.from_list(rows), "a <file>", "sft", tokenizer, samples=9)
    page = _Balanced()
    page.feed(audit_page(found))
    assert not page.open and "a <file>" in page.text and "<b>&amp;" in page.text
    assert page.text.count("yes") + page.text.count("<|im_end|>") > 4


def test_the_command(model_folder, tokenizer, tmp_path, capsys):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert main(["data", str(file), "--model", str(model_folder), "--html", str(tmp_path / "page.html")]) == 0
    assert "⟦yes<|im_end|>⟧" in capsys.readouterr().out and (tmp_path / "page.html").exists()
    assert main(["data", str(file)]) == 0  # without a model
    assert "⟦yes" in capsys.readouterr().out
    assert main(["data", str(file), "--command", "dpo"]) == 2
    assert main(["data", str(file), "--command", "cook"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_names_that_are_given_are_used(tokenizer):
    rows = Dataset.from_list([{"frage": "why", "antwort": "yes"}])
    form = RowFormat(columns={"frage": "question", "antwort": "answer"})
    found = audit(rows, "rows", "sft", copy.copy(tokenizer), Reading(form))
    assert found.columns == {"frage": "question", "antwort": "answer"} and found.roles == {"user": 1, "assistant": 1}


def test_the_recorded_table_of_templates_is_what_is_scored_now():
    folder = Path(__file__).parents[2] / "docs" / "runs" / "templates"
    spec = importlib.util.spec_from_file_location("scored", folder / "scored.py")
    scored = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scored)
    rows = load_data(str(folder / "conversations.jsonl"))
    page = (folder / "README.md").read_text(encoding="utf-8")
    found = scored.table(scored.audits(rows, False), scored.audits(rows, True), rows)
    assert found.split("Messages:")[0] in page
