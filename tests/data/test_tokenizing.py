"""From rows to token ids: columns, templates, endings, truncation, reports and the cache."""

import copy
import gzip
import logging

import pytest
from conftest import write_rows
from datasets import Dataset

from rlhf.data import load_data, tokenize_preferences, tokenize_sft

USER, BOT = {"role": "user", "content": "why"}, {"role": "assistant", "content": "the river"}
SYSTEM, AGAIN, LAST = (
    {"role": "system", "content": "say"},
    {"role": "user", "content": "how"},
    {"role": "assistant", "content": "no"},
)


def sft(rows, tokenizer, **changes):
    return tokenize_sft(Dataset.from_list(rows), tokenizer, **{"max_length": 64, "vocab_size": 330, **changes})


def pairs(rows, tokenizer, **changes):
    return tokenize_preferences(Dataset.from_list(rows), tokenizer, **{"max_length": 64, "vocab_size": 330, **changes})


def parts(tokenizer, row):
    """(all of the text, the part of it that is scored)"""
    scored = [i for i in row["labels"] if i != -100]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(scored)


CHAT = "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nthe river<|im_end|>"
SFT_ROWS = {
    "text": ({"text": "the cat"}, "the cat<|im_end|>", "the cat<|im_end|>"),
    "plain": ({"prompt": "the", "completion": " cat"}, "the cat<|im_end|>", " cat<|im_end|>"),
    "messages": ({"messages": [USER, BOT]}, CHAT, "the river<|im_end|>"),
    "conversational completion": ({"prompt": [USER], "completion": [BOT]}, CHAT, "the river<|im_end|>"),
    "conversational, implicit prompt": ({"completion": [USER, BOT]}, CHAT, "the river<|im_end|>"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "the river"}]},
        CHAT,
        "the river<|im_end|>",
    ),
    "several turns": (
        {"messages": [SYSTEM, USER, BOT, AGAIN, LAST]},
        "<|im_start|>system\nsay<|im_end|>\n" + CHAT
        + "\n<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\nno<|im_end|>",
        "the river<|im_end|>no<|im_end|>",
    ),
    "preference row": ({"prompt": [USER], "chosen": [BOT], "rejected": [LAST]}, CHAT, "the river<|im_end|>"),
}  # fmt: skip


@pytest.mark.parametrize("form", SFT_ROWS)
def test_the_answers_and_their_endings_are_scored(form, tokenizer):
    row, text, scored = SFT_ROWS[form]
    assert parts(tokenizer, sft([row], tokenizer)[0]) == (text, scored)


def test_tokenised_rows_pass_through(tokenizer):
    row = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
    assert sft([row], tokenizer)[0] == row


PAIR = {"prompt": [USER], "chosen": [BOT], "rejected": [LAST]}
PAIR_ROWS = {
    "explicit": PAIR,
    "implicit": {"chosen": [USER, BOT], "rejected": [USER, LAST]},
    "prompt repeated in the answers": {"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, LAST]},
    "text prompt": {"prompt": "why", "chosen": [BOT], "rejected": [LAST]},
    "ShareGPT": {
        "chosen": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "the river"}],
        "rejected": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "no"}],
    },
}


@pytest.mark.parametrize("form", PAIR_ROWS)
def test_every_form_of_a_conversational_pair_is_the_same(form, tokenizer):
    row = pairs([PAIR_ROWS[form]], tokenizer)[0]
    got = tuple(tokenizer.decode(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
    prompt = "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    assert got == (prompt, "the river<|im_end|>", "no<|im_end|>")


@pytest.mark.parametrize("prompt", [{"prompt": "the big"}, {}])
def test_plain_pairs(prompt, tokenizer):
    before = "" if prompt else "the big"
    row = pairs([{**prompt, "chosen": before + " cat", "rejected": before + " tree"}], tokenizer)[0]
    got = [tokenizer.decode(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert got == ["the big", " cat<|im_end|>", " tree<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_scores_the_last_answer(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: "
        "{{ 'x' if m['role'] == 'assistant' and not loop.last else m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    text, scored = parts(other, sft([{"messages": [USER, BOT, AGAIN, LAST]}], other)[0])
    assert text.endswith("no<|im_end|>") and scored == " no<|im_end|>"  # the space is a part of the token


def test_truncation_keeps_the_prompt_and_says_what_it_cut(tokenizer, caplog):
    long = {"prompt": "the cat", "chosen": " yes" * 20, "rejected": " no" * 3}
    whole = pairs([long], tokenizer)[0]
    cut = pairs([long], tokenizer, max_length=12)[0]
    assert cut["prompt_ids"] == whole["prompt_ids"] and cut["rejected_ids"] == whole["rejected_ids"]
    assert len(cut["prompt_ids"] + cut["chosen_ids"]) == 12
    lost = len(whole["chosen_ids"]) - len(cut["chosen_ids"])
    assert f"1 of 1 rows cut to max_length 12, losing {lost} tokens in all" in caplog.text


def test_rows_without_a_scored_token_are_dropped_and_counted(tokenizer, caplog):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [1, 2, 3], "labels": [1, -100, -100]}]
    assert len(sft(rows, tokenizer)) == 1
    assert "dropped 1 of 2 rows without a scored token" in caplog.text


def test_long_prompts_stop_the_run_or_are_dropped(tokenizer, caplog):
    rows = [{"prompt": "the " * 30, "completion": "cat"}, {"prompt": "the", "completion": " cat"}]
    with pytest.raises(ValueError, match=r"row 1: the prompt has \d+ tokens and max_length is 16: raise --max_length"):
        sft(rows, tokenizer, max_length=16)
    assert len(sft(rows, tokenizer, max_length=16, drop_long_prompts=True)) == 1
    assert "dropped 1 of 2 rows with too long a prompt" in caplog.text


BAD = {
    "empty completion": (sft, {"prompt": "the", "completion": " "}, "'completion' is empty"),
    "empty answer": (sft, {"messages": [USER, {**BOT, "content": ""}]}, "message 2: the assistant's answer is empty"),
    "no text": (sft, {"text": ""}, "'text' is empty"),
    "a number": (sft, {"text": 7}, "'text' is a number, expected text"),
    "a null": (sft, {"prompt": "a", "completion": None}, "has no 'completion'"),
    "a missing column": (sft, {"question": "a"}, "no column to train on: found question"),
    "too many brackets": (sft, {"messages": "[" * 3000}, "'messages' is"),
    "no role": (sft, {"messages": [{"content": "a"}]}, "'messages', message 1 has no 'role'"),
    "labels of another length": (sft, {"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 entries, 'input_ids' 2"),
    "other vocabulary": (sft, {"input_ids": [1, 999]}, "token 999 in 'input_ids' is outside the model's vocabulary of"),
    "a wild label": (sft, {"input_ids": [1, 2], "labels": [1, -7]}, "token -7 in 'labels' is outside"),
    "an id that is text": (sft, {"input_ids": ["a"]}, "'input_ids' has a str in it, expected token ids only"),
    "a label that is null": (sft, {"input_ids": [1, 2], "labels": [None, 2]}, "'labels' has a NoneType in it"),
    "identical answers": (pairs, {"prompt": "a", "chosen": "b", "rejected": "b"}, "are identical"),
    "no rejected": (pairs, {"prompt": "a", "chosen": "b"}, "no column 'rejected': found prompt, chosen"),
    "a null prompt": (pairs, {"prompt": None, "chosen": "b", "rejected": "c"}, "has no 'prompt'"),
    "different prompts": (pairs, {"chosen": [USER, BOT], "rejected": [AGAIN, BOT]}, "begin with different messages"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(case, tokenizer):
    tokenise, row, said = BAD[case]
    with pytest.raises(ValueError) as error:
        tokenise([row], tokenizer)
    assert said in str(error.value)
    assert "data set, row 1: " in str(error.value) or "column" in said


def test_conversations_need_a_template(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="row 1: the data is conversational but the tokenizer has no chat template"):
        sft([{"messages": [USER, BOT]}], bare)


FORMATS = {
    "jsonl": lambda rows, path: write_rows(path, rows),
    "json": lambda rows, path: rows.to_json(path, lines=False),
    "parquet": lambda rows, path: rows.to_parquet(path),
    "csv": lambda rows, path: rows.to_csv(path),
    "jsonl.gz": lambda rows, path: path.write_bytes(gzip.compress(write_rows(path, rows).read_bytes())),
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_file_format_gives_the_same_rows(suffix, sft_rows, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    FORMATS[suffix](sft_rows, path)
    assert load_data(str(path)).to_list() == sft_rows.to_list()
    assert load_data(str(path), "train[2:5]").to_list() == sft_rows.to_list()[2:5]


def test_saved_folders_with_and_without_splits(sft_rows, tmp_path):
    sft_rows.save_to_disk(tmp_path / "one")
    assert load_data(str(tmp_path / "one"), "train[:3]").to_list() == sft_rows.to_list()[:3]
    sft_rows.train_test_split(8, shuffle=False).save_to_disk(tmp_path / "two")
    assert len(load_data(str(tmp_path / "two"), "test")) == 8
    with pytest.raises(ValueError, match="Unknown split"):
        load_data(str(tmp_path / "two"), "validation")


def test_tokenising_is_cached(data_files, tokenizer, caplog):
    rows = load_data(str(data_files / "sft.jsonl"))
    first = tokenize_sft(rows, tokenizer, max_length=64, vocab_size=330)
    with caplog.at_level(logging.INFO, "datasets"):
        again = tokenize_sft(load_data(str(data_files / "sft.jsonl")), tokenizer, max_length=64, vocab_size=330)
    assert first._fingerprint == again._fingerprint
    assert first.cache_files == again.cache_files != []
    other = tokenize_sft(rows, tokenizer, max_length=32, vocab_size=330)
    assert other._fingerprint != first._fingerprint
