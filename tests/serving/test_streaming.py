"""Text that arrives token by token, and its parts."""

import pytest
import torch
from conftest import tiny_model
from kinds import KINDS

from rlhf.rollouts import LocalEngine, Sampling
from rlhf.serving.answers import Part, PartStream, answer_message, joined
from rlhf.serving.streaming import TextStream

TEXT = "the cat sat . Ünïcödé 猫が好き 👩‍🚀 <think> maybe </think> yes\n\n  two  spaces"


def streamed(tokenizer, ids):
    stream = TextStream(tokenizer)
    pieces = [stream.feed(token) for token in ids]
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_the_text_of_all_tokens(kind):
    tokenizer = KINDS[kind]()
    generator = torch.Generator().manual_seed(0)
    rows = [tokenizer(TEXT, add_special_tokens=False).input_ids]
    # Random tokens hold wrong bytes, and special tokens in the middle.
    rows += [torch.randint(len(tokenizer), (60,), generator=generator).tolist() for _ in range(8)]
    for ids in rows:
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_text_is_shown_at_once_and_a_character_when_it_is_whole():
    tokenizer = KINDS["byte-level"]()
    ids = tokenizer("a猫", add_special_tokens=False).input_ids
    assert streamed(tokenizer, ids) == ["a", "", "", "猫", ""]


ANSWER = 'so<think>\na < b\n</think>\n\nyes <b>\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
PARTS = [
    Part("text", "so"),
    Part("reasoning", "\na < b\n"),
    Part("text", "\n\nyes <b>\n"),
    Part("call", '\n{"name": "f", "arguments": {"x": 1}}\n'),
]


@pytest.mark.parametrize("size", [1, 2, 5, 200])
def test_parts_do_not_depend_on_the_pieces(size):
    stream = PartStream()
    parts = [part for start in range(0, len(ANSWER), size) for part in stream.feed(ANSWER[start : start + size])]
    assert joined([*parts, *stream.finish()]) == PARTS


def test_a_mark_that_is_begun_and_not_finished_is_text():
    stream = PartStream()
    assert stream.feed("a <thi") == [Part("text", "a ")]
    assert stream.finish() == [Part("text", "<thi")]


def test_a_template_may_begin_the_reasoning():
    stream = PartStream("<|im_start|>assistant\n<think>\n")
    assert stream.feed("hm</think>ok") == [Part("reasoning", "hm"), Part("text", "ok")]


def test_reasoning_and_calls_are_keys_where_the_template_reads_them():
    assert answer_message(ANSWER, PARTS, "{{ content }}") == {"role": "assistant", "content": ANSWER}
    message = answer_message(ANSWER, PARTS, "reasoning_content tool_calls")
    assert message["content"] == "so\n\nyes <b>"
    assert message["reasoning_content"] == "a < b"
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    wrong_call = [Part("call", "no json")]
    assert answer_message("x", wrong_call, "tool_calls") == {"role": "assistant", "content": "x"}


@pytest.mark.parametrize("architecture", ["llama", "stablelm"])  # our attention, and model.generate
def test_the_engine_reports_each_token_up_to_the_end(architecture, tokenizer):
    engine = LocalEngine(tiny_model(architecture), tokenizer)
    engine.end_ids = list(range(40))  # so that rows end at different steps
    told = {}
    completions = engine.generate(
        [[5, 6], [7]], 2, Sampling(max_tokens=12), 0, on_token=lambda row, token: told.setdefault(row, []).append(token)
    )
    rows = [completion.ids for samples in completions for completion in samples]
    assert [told[row] for row in range(4)] == rows
    assert len({len(ids) for ids in rows}) > 1
