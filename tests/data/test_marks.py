"""What a template leaves out is found by marks, and each note has a kind."""

import copy

import pytest

from rlhf.data import Dialogue, encode
from rlhf.data.marks import lost_parts, mark_messages
from rlhf.data.rendering import locate_answers
from rlhf.data.templates import ChatTemplate

END = "<|im_end|>\n"
# Reasoning is written for the last message only, as in templates of models that think.
LAST_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_THOUGHT = LAST_THOUGHT.replace("and loop.last", "and false")

ASK = {"role": "user", "content": "why"}
THINK = {"role": "assistant", "content": "the river", "reasoning_content": "the tree"}


def template(tokenizer, source):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = source
    return ChatTemplate.of(changed, Dialogue([]))


def notes(chat_template, messages, scored):
    marked = mark_messages(messages, first=0, prefill=0)
    return lost_parts(chat_template, marked, chat_template.render(marked.messages), scored)


@pytest.mark.parametrize("source, messages, kinds", [
    (LAST_THOUGHT, [ASK, THINK], []),
    (LAST_THOUGHT, [ASK, THINK, ASK, THINK], ["earlier reasoning"]),
    (NO_THOUGHT, [ASK, THINK], ["lost reasoning"]),
    (NO_THOUGHT, [ASK, {**THINK, "reasoning_content": "", "mood": "kind"}], ["other"]),  # a key without a word for it
])  # fmt: skip
def test_notes_have_a_kind(tokenizer, source, messages, kinds):
    found = notes(template(tokenizer, source), messages, [len(messages) - 1])
    assert [note.kind for note in found] == kinds


def test_marks_stand_in_the_middle_of_each_stretch(tokenizer):
    marked = mark_messages([{"role": "assistant", "content": "<think>abcd</think> ef"}], 0, 0)
    (parts,) = marked.parts
    assert [(part.before, part.after) for part in parts] == [("ab", "cd"), ("e", "f")]
    assert marked.messages[0]["content"] == f"<think>ab{parts[0].mark}cd</think> e{parts[1].mark}f"


def test_reasoning_that_is_lost_is_learned_where_answers_are_split(tokenizer):
    chat_template = template(tokenizer, NO_THOUGHT)
    assert locate_answers(chat_template, [ASK, THINK], 1).loses_reasoning
    ids, scored = encode(chat_template.tokenizer, Dialogue([ASK], ([THINK],)), split=True).completions[0]
    assert all(scored) and tokenizer.decode(ids) == f"<think>\nthe tree\n</think>\n\nthe river{END.strip()}"
