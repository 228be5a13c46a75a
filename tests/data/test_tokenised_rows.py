"""A tokenised row: its limits, and the report about it."""

import pytest

from rlhf.data.tokenised_rows import REPORT_COLUMNS, Limits, TokenisedRow, check_prompt, row_limits, truncate

PAIR = TokenisedRow(
    {
        "prompt_ids": [1, 2, 3],
        "chosen_ids": [4, 5, 6, 7],
        "rejected_ids": [8, 9],
        "labels": [[4, 5, 6, 7], [8, 9]],
        "margin": 0.5,
    }
)


def test_a_prompt_is_whole_and_its_answers_share_the_rest():
    row = truncate(PAIR, Limits(max_length=5, vocab_size=10))
    assert row.columns["prompt_ids"] == [1, 2, 3] and row.columns["chosen_ids"] == [4, 5]
    assert row.columns["labels"] == [[4, 5], [8, 9]] and row.columns["margin"] == 0.5
    assert row.truncated == 2 and not row.dropped


def test_without_a_limit_nothing_is_cut():
    assert truncate(PAIR, row_limits(None, 10)) == PAIR


@pytest.mark.parametrize("columns, reason", [
    ({"input_ids": [1, 2, 3], "labels": [1, -100, -100]}, "without a scored token"),  # nothing predicts the first one
    ({"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, "with too long a prompt"),
    ({"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [2, 4], "labels": [[2, 3], [2, 4]]},
     "whose answers are the same once cut"),
])  # fmt: skip
def test_why_a_row_is_dropped(columns, reason):
    assert truncate(TokenisedRow(columns), Limits(2, 10, drop_long_prompts=True)).dropped == reason


def test_a_row_that_is_dropped_is_not_looked_at():
    row = TokenisedRow({"input_ids": [99], "labels": [99]}, dropped="with label false")
    assert truncate(row, Limits(1, 10)) is row


@pytest.mark.parametrize("row, limits, said", [
    (PAIR, Limits(3, 10), "the prompt has 3 tokens and max_length is 3"),
    (PAIR, Limits(9, 9), "token 9 in 'rejected_ids' is outside the model's vocabulary of 9"),
])  # fmt: skip
def test_what_stops_the_run(row, limits, said):
    with pytest.raises(ValueError, match=said):
        truncate(row, limits)


def test_a_prompt_that_is_answered_is_never_cut():
    row = TokenisedRow({"prompt_ids": [1, 2, 3]})
    assert check_prompt(row, Limits(3, 10)) is row
    assert check_prompt(row, Limits(2, 10, drop_long_prompts=True)).dropped == "with too long a prompt"
    with pytest.raises(ValueError, match="leaves room for 2"):
        check_prompt(row, Limits(2, 10))


def test_the_report_has_a_column_for_each_count():
    report = TokenisedRow({}, answers=2, scored=1, notes=("a",), dropped="d", truncated=3, error="e").report(7)
    assert tuple(report) == REPORT_COLUMNS and list(report.values()) == [3, "d", "e", 7, 2, 1, ["a"]]
