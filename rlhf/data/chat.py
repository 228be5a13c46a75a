"""From a dialogue to token ids: one rendering, one encoding, and which of the tokens the model is to write.

A conversation is rendered once and tokenised as a whole. Prompt, turns and answers are cut out of it by characters.
Where a border falls inside a token, that token belongs to the answer.
"""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.data.formats import Dialogue, Message, Turns
from rlhf.data.marks import PROBE
from rlhf.data.rendering import (
    Rendering,
    leaves_out_thought,
    locate_answers,
    locate_lost_answer,
    split_prefill,
)
from rlhf.data.templates import begin_answer, check_template, render


class Encoded(NamedTuple):
    """A dialogue as ids.

    ``prompt_ids`` come before every completion; a completion is its further ids and, for each, whether it is scored.
    ``answers`` counts the assistant's turns in the completions, ``scored`` those with a scored token. ``notes`` say
    what of the dialogue the template does not write.
    """

    prompt_ids: list[int]
    completions: list[tuple[list[int], list[bool]]]
    answers: int
    scored: int
    notes: tuple[str, ...] = ()


class Tokens(NamedTuple):
    """Ids of a text, and the characters that each stands for; None where the tokenizer does not tell."""

    ids: list[int]
    offsets: list[tuple[int, int]] | None


def encode(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, split: bool = False) -> Encoded:
    """Encode a prompt with its completions, all text or all messages.

    Scored are a text completion, or the assistant's turns of a completion whose ``weight`` is not 0, each up to and
    including the token that ends it. What follows the last scored answer is left out.

    Args:
        split: each completion is one answer, and is written as the model would write it behind its prompt, also where
            the template leaves out its reasoning.
    Raises:
        ValueError: no chat template or EOS token; the template refuses the conversation, or leaves out a part of it.
    """
    if isinstance(dialogue.prompt, str):
        return _encode_text(tokenizer, dialogue)
    check_template(tokenizer)
    rows = [_encode_turns(tokenizer, dialogue, turns, split) for turns in dialogue.completions]
    if not rows:
        return Encoded(encode_prompt(tokenizer, dialogue), [], 0, 0)
    shared = min(row.border for row in rows)
    shared = min(shared, _common_prefix([row.ids for row in rows]))
    # Where an answer begins later than another (behind an empty thought, say), both are scored on all that they do not
    # share.
    completions = [
        (row.ids[shared:], [row.opens or own for own in row.scored[shared : row.border]] + row.scored[row.border :])
        for row in rows
    ]
    notes = tuple(dict.fromkeys(note for row in rows for note in row.notes))
    answers, scored = sum(row.answers for row in rows), sum(row.found for row in rows)
    return Encoded(rows[0].ids[:shared], completions, answers, scored, notes)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Turns | Dialogue) -> list[int]:
    """Encode what a policy is given to answer: text, or turns in the chat template up to where the assistant begins.

    An assistant's turn at the end is continued.

    Raises:
        ValueError: as :func:`encode`.
    """
    dialogue = prompt if isinstance(prompt, Dialogue) else Dialogue(prompt)
    if isinstance(dialogue.prompt, str):
        return _text_ids(tokenizer, dialogue.prompt, ended=False).ids
    check_template(tokenizer)
    continued = bool(dialogue.prompt) and dialogue.prompt[-1]["role"] == "assistant"
    if continued:
        text = render(tokenizer, dialogue, dialogue.prompt, resume=True)
    else:
        text = begin_answer(tokenizer, dialogue, dialogue.prompt)
    return _tokens(tokenizer, text, special=False).ids


def encode_reply(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, reply: Message, last: int) -> list[int]:
    """Encode what a policy reads behind its answer, up to where its next answer begins.

    Args:
        dialogue: what the policy was asked, with tools and options of the template.
        reply: the user's or a tool's turn; its content alone where the prompt is text.
        last: the last id of the answer. The token that ends a turn is not written twice.
    Raises:
        ValueError: the template refuses the conversation.
    """
    if isinstance(dialogue.prompt, str):
        return _tokens(tokenizer, str(reply["content"]), special=False).ids
    # Without the system's turn, which some templates write before the last question.
    asked = [turn for turn in dialogue.prompt if turn["role"] != "system"] or [{"role": "user", "content": "?"}]
    turns, _, _ = split_prefill(asked, [{"role": "assistant", "content": PROBE}])
    text = begin_answer(tokenizer, dialogue, [*turns, reply])
    tokens = _tokens(tokenizer, text, special=False)
    ids = tokens.ids[_first_token_after(tokenizer, tokens, text, text.rindex(PROBE) + len(PROBE), special=False) :]
    end = ids.index(last) if last in ids else None
    if end is not None and not str(tokenizer.decode(ids[:end])).strip():
        return ids[end + 1 :]
    return ids


def answer_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: EOS, and the token with which the chat template ends the assistant's turn."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        probe = Dialogue([{"role": "user", "content": "?"}], ([{"role": "assistant", "content": "!"}],))
        try:
            ids, _ = encode(tokenizer, probe).completions[0]
        except ValueError:  # a template with demands of its own
            return ends
        ends += [ids[-1]] if ids[-1] not in ends else []
    return ends


def answer_ends(rows: Any, tokenizer: PreTrainedTokenizerBase, look_at: int = 64) -> list[int]:
    """Ids of special tokens that end answers in the first ``look_at`` tokenised rows; of prompts alone, of the template
    where they are conversations."""
    sized = hasattr(rows, "__len__")
    first = [rows[i] for i in range(min(len(rows), look_at))] if sized else list(rows.take(look_at))
    if first and not _scored_ids(first[0]):
        return [] if isinstance(first[0].get("prompt"), str) else answer_end_ids(tokenizer)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    found: dict[int, None] = {}
    for row in first:
        for labels in _scored_ids(row):
            runs = zip(labels, [*labels[1:], -100], strict=True)
            found |= {token: None for token, after in runs if token != -100 and after == -100 and token in special}
    return list(found)


def _scored_ids(row: dict[str, Any]) -> list[list[int]]:
    if "input_ids" in row:
        return [row["labels"]]
    return row.get("labels") or [row[key] for key in ("chosen_ids", "rejected_ids") if key in row]


def split_turns(dialogue: Dialogue) -> list[Dialogue]:
    """One dialogue for each answer of a conversation, whose prompt is all that comes before it."""
    if isinstance(dialogue.prompt, str):
        return [dialogue]
    found = []
    for completion in dialogue.completions:
        turns = [*dialogue.prompt, *completion]
        for index in range(len(dialogue.prompt), len(turns)):
            if turns[index]["role"] == "assistant" and turns[index].get("weight", 1):
                found.append(
                    Dialogue(turns[:index], (turns[index : index + 1],), dialogue.tools, dialogue.template_kwargs)
                )
    return found


# Text


def _encode_text(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> Encoded:
    prompt = str(dialogue.prompt)
    if not dialogue.completions:
        return Encoded(encode_prompt(tokenizer, prompt), [], 0, 0)
    rows = [_text_ids(tokenizer, prompt + str(completion), ended=True) for completion in dialogue.completions]
    borders = [_first_token_after(tokenizer, tokens, prompt + str(c), len(prompt), special=True)
               for tokens, c in zip(rows, dialogue.completions, strict=True)]  # fmt: skip
    # Where a token reaches over the border in one answer, the others begin there too: both are scored on the same text.
    shared = min(*borders, _common_prefix([tokens.ids for tokens in rows]))
    completions = [(tokens.ids[shared:], [True] * (len(tokens.ids) - shared)) for tokens in rows]
    return Encoded(rows[0].ids[:shared], completions, len(rows), len(rows))


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str, ended: bool) -> Tokens:
    """Text with the tokenizer's own special tokens, none of them twice; with one EOS at the end, or without."""
    ids, offsets = _tokens(tokenizer, text, special=True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos] and not text.startswith(str(tokenizer.bos_token) * 2):
        ids, offsets = ids[1:], offsets and offsets[1:]
    written = eos is not None and text.rstrip().endswith(str(tokenizer.eos_token))
    added = eos is not None and len(ids) > 0 and ids[-1] == eos and (not written or ids[-2:] == [eos, eos])
    if added:
        ids, offsets = ids[:-1], offsets and offsets[:-1]
    if ended and not written:
        ids, offsets = [*ids, _eos(tokenizer)], offsets and [*offsets, (len(text), len(text) + 1)]
    return Tokens(ids, offsets)


# Conversations


class _Row(NamedTuple):
    ids: list[int]
    scored: list[bool]
    border: int  # number of ids before the first thing that the model is to write
    opens: bool  # the completion begins with an answer, not with another's turn
    answers: int
    found: int
    notes: tuple[str, ...]


def _encode_turns(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, completion: Turns, split: bool) -> _Row:
    """One completion behind its prompt."""
    messages, first, prefill = split_prefill(_messages(dialogue.prompt), _messages(completion))
    rendering = locate_answers(tokenizer, dialogue, messages, first, prefill)
    if split and leaves_out_thought(rendering.notes):
        rendering = locate_lost_answer(tokenizer, dialogue, messages)
    elif split:  # what earlier turns lose is learned from rows of their own
        rendering = replace(rendering, notes=tuple(n for n in rendering.notes if "--split_turns" not in n))
    tokens = _tokens(tokenizer, rendering.text, special=False)
    spans = [_token_span(tokenizer, tokens, rendering, answer) for answer in rendering.answers]
    ids, scored = list(tokens.ids), [False] * len(tokens.ids)
    for start, stop in spans:
        scored[start:stop] = [True] * (stop - start)
    end = max((stop for _, stop in spans), default=len(ids))
    ids, scored = ids[:end], scored[:end]
    if spans and rendering.needs_eos and ids[-1:] != [tokenizer.eos_token_id]:
        ids, scored = [*ids, _eos(tokenizer)], [*scored, True]
    border = min((start for start, _ in spans), default=len(ids))
    answers = sum(message["role"] == "assistant" for message in messages[first:])
    found = min(sum(start < stop for start, stop in spans), answers)  # an answer may have several spans
    opens = messages[first]["role"] == "assistant" and bool(messages[first].get("weight", 1))
    return _Row(ids, scored, border, opens, answers, found, rendering.notes)


def _token_span(
    tokenizer: PreTrainedTokenizerBase, tokens: Tokens, rendering: Rendering, answer: tuple[int, int]
) -> tuple[int, int]:
    start = _first_token_after(tokenizer, tokens, rendering.text, answer[0], special=False)
    return start, _first_token_from(tokenizer, tokens, rendering.text, answer[1], special=False)


def _messages(turns: Turns) -> list[Message]:
    if isinstance(turns, str):
        raise ValueError("the prompt is a list of messages and the completion is text: give both the same form")
    return turns


# Characters and tokens


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> Tokens:
    if tokenizer.is_fast:
        encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        offsets = encoding["offset_mapping"]
        for index in range(len(offsets) - 1, 0, -1):  # special tokens behind the text stand behind it
            if offsets[index] != (0, 0):
                break
            offsets[index] = (len(text), len(text) + 1)
        return Tokens(encoding["input_ids"], offsets)
    return Tokens(list(tokenizer(text, add_special_tokens=special)["input_ids"]), None)


def _first_token_after(
    tokenizer: PreTrainedTokenizerBase, tokens: Tokens, text: str, border: int, special: bool
) -> int:
    """The first token with a character at or after ``border``: it may begin before."""
    if tokens.offsets is not None:
        found = bisect_right(tokens.offsets, border, key=lambda offset: offset[1])
        return found - 1 if found and _trimmed_over(tokenizer, tokens, text, border, found - 1) else found
    before = _tokens(tokenizer, text[:border], special).ids
    return _common_prefix([before, tokens.ids])


def _trimmed_over(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, text: str, border: int, index: int) -> bool:
    """Whether a token reaches over ``border`` with white space that offsets leave out (``trim_offsets``)."""
    assert tokens.offsets is not None
    (start, end), after = tokens.offsets[index], tokens.offsets[index + 1 : index + 2]
    covered = bool(after) and after[0][0] <= border
    if end != border or covered or not text[border : border + 1].isspace() or not text[start:end].strip():
        return False
    return str(tokenizer.decode(tokens.ids[index]))[-1:].isspace()


def _first_token_from(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, text: str, border: int, special: bool) -> int:
    """The first token that begins at or after ``border``."""
    if tokens.offsets is not None:
        return bisect_left(tokens.offsets, border, key=lambda offset: offset[0])
    before = _tokens(tokenizer, text[:border], special).ids
    same = _common_prefix([before, tokens.ids])
    return same if same == len(before) else same + 1


def _common_prefix(rows: Sequence[list[int]]) -> int:
    return len(os.path.commonprefix(list(rows)))  # noqa: RUF071  # of any sequences


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token: set tokenizer.eos_token, so that answers learn to end")
    return tokenizer.eos_token_id
