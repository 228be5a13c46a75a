"""A conversation as one text, and where in it the assistant's answers stand."""

import os
import re
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf.data.formats import Dialogue, Message
from rlhf.data.marks import MARKS, REASONING, THOUGHT_TAG, Marked, Part, mark_messages, what_is_lost
from rlhf.data.templates import begin_answer, plain_messages, render

_EMPTY_THOUGHT = re.compile(
    r"\s*(?:<([\w:|]*think\w*)>\s*</\1>|\[THINK\]\s*\[/THINK\]|<\|START_THINKING\|>\s*<\|END_THINKING\|>"
    r"|<\|channel>thought\s*<channel\|>)\n{0,2}",  # a third begins what comes next, such as a call
    re.IGNORECASE,
)
_OPEN_THOUGHT = re.compile(r"(?:<[\w:]*think\w*>\s*)?$", re.IGNORECASE)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendering:
    """``answers`` are the characters [start, end) of each scored answer, in order; ``needs_eos`` where no token of the
    template ends the last of them; ``notes`` say what the template does not write."""

    text: str
    answers: list[tuple[int, int]]
    needs_eos: bool = False
    notes: tuple[str, ...] = ()


def split_prefill(prompt: list[Message], completion: list[Message]) -> tuple[list[Message], int, int]:
    """All messages, the number of the first that is answered, and how many characters of it the prompt holds already.

    An answer behind a prompt that ends with the assistant's turn continues that turn.
    """
    if not (prompt and completion and prompt[-1]["role"] == completion[0]["role"] == "assistant"):
        return [*prompt, *completion], len(prompt), 0
    begun, rest = prompt[-1], completion[0]
    if not (isinstance(begun.get("content"), str) and isinstance(rest.get("content"), str)) or begun.get("tool_calls"):
        return [*prompt, *completion], len(prompt), 0
    whole = {**begun, **rest, "content": begun["content"] + rest["content"]}
    return [*prompt[:-1], whole, *completion[1:]], len(prompt) - 1, len(begun["content"])


def locate_answers(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, messages: list[Message], first: int, prefill: int = 0
) -> Rendering:
    """Render ``messages`` and find the answers among those from ``first`` on.

    Args:
        prefill: characters of message ``first`` that belong to the prompt.
    Raises:
        ValueError: the template refuses the conversation, or leaves out a part of it.
    """
    text = render(tokenizer, dialogue, messages)
    scored = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant" and _has_weight(messages[i])]
    for names in (True, False):
        marked = mark_messages(messages, first, prefill, names)
        whole = render(tokenizer, dialogue, marked.messages)
        if MARKS.sub("", whole) == text and (names or all(marked.parts[index] for index in scored)):
            break
    else:  # the template looks at what a message says
        return _locate_by_prefix(tokenizer, dialogue, messages, scored, text)
    notes = what_is_lost(tokenizer, dialogue, marked, whole, scored)
    finder = _Finder(tokenizer, dialogue, marked, whole)
    spans, needs_eos = finder.generation_spans(scored), False
    if spans is None:
        spans = []
        for index in scored:
            if not finder.present(index):
                continue
            start, (end, closed) = finder.start(index), finder.end(index)
            if index == first and prefill:
                start = max(start, finder.place[marked.parts[index][0].mark])
            spans.append((start, max(start, end)))
            needs_eos = not closed
    elif spans and finder.leaves_out_end(scored[-1], spans[-1][1]):
        notes = (*notes, "the template's {% generation %} marks leave out what ends an answer: it is not learned")
    return Rendering(text, [(finder.plain(start), finder.plain(end)) for start, end in spans], needs_eos, notes)


def locate_lost_answer(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, messages: list[Message]) -> Rendering:
    """The last message as the model would write it, where the template leaves out its reasoning: behind what the model
    is given to begin with, and up to the end that the template writes."""
    usual = locate_answers(tokenizer, dialogue, messages, len(messages) - 1)
    begun, answer = begin_answer(tokenizer, dialogue, messages[:-1]), messages[-1]
    written = usual.text[slice(*usual.answers[-1])] if usual.answers else ""
    reasoning = next((str(answer[key]) for key in REASONING if answer.get(key)), None)
    content = str(answer.get("content") or "")
    rest = THOUGHT_TAG.split(content)[-1]
    own = content[: len(content) - len(rest.lstrip())] if reasoning is None else f"<think>\n{reasoning}\n</think>\n\n"
    text = own + written.lstrip()
    given = next(n for n in range(len(text), -1, -1) if begun.endswith(text[:n]))
    whole = begun + text[given:]
    return Rendering(whole, [(len(begun), len(whole))], usual.needs_eos or not usual.answers)


def leaves_out_thought(notes: tuple[str, ...]) -> bool:
    """Whether notes of :func:`locate_answers` say that the answer's own reasoning is lost."""
    return any("before </think>" in note or ("reasoning" in note and "which is lost" in note) for note in notes)


def _has_weight(message: Message) -> bool:
    return bool(message.get("weight", 1))


# Answers


class _Finder:
    """Where answers start and end in a rendering with marks (``whole``)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, marked: Marked, whole: str) -> None:
        self.tokenizer, self.dialogue, self.marked, self.whole = tokenizer, dialogue, marked, whole
        found = list(MARKS.finditer(whole))
        self.marks = [mark.start() for mark in found]
        self.place = {mark.group(): mark.start() for mark in reversed(found)}  # where each stands first
        self.special = _special_tokens(tokenizer)

    def plain(self, position: int) -> int:
        """The same place in the text without marks."""
        return position - bisect_left(self.marks, position)

    def present(self, index: int) -> list[Part]:
        return sorted((p for p in self.marked.parts[index] if p.mark in self.place), key=lambda p: self.place[p.mark])

    def content_start(self, index: int) -> int:
        """Where the first string of a message begins, as far as it is rendered as it is."""
        part = self.present(index)[0]
        place = self.place[part.mark]
        start = place - len(part.before)
        return start if start >= 0 and self.whole[start:place] == part.before else place

    def start(self, index: int) -> int:
        """Where the model begins to write answer ``index``: behind what the template gives it to begin with."""
        first = self.content_start(index)
        # A template may move a turn, such as the system's, behind an answer.
        earlier = [p for i in range(index) for p in self.present(i) if self.place[p.mark] < first]
        if not index:
            return first
        begun = begin_answer(self.tokenizer, self.dialogue, self.marked.messages[:index])
        anchor = max(earlier, key=lambda part: self.place[part.mark], default=Part("", "", "", ""))
        if anchor.mark not in begun:
            return first
        from_here = self.place.get(anchor.mark, 0) + len(anchor.mark)
        given = begun[begun.index(anchor.mark) + len(anchor.mark) :]
        region = self.whole[from_here:first]
        same = _common(given, region)
        if same < len(given):
            same = self._whole_tokens(region, same, len(anchor.after) if region.startswith(anchor.after) else 0)
            same -= len(_OPEN_THOUGHT.search(region[:same]).group())  # type: ignore[union-attr]  # it always matches
        return from_here + self._behind_empty_thought(index, region, same)

    def _behind_empty_thought(self, index: int, region: str, place: int) -> int:
        """``place`` in what stands in front of an answer, moved behind a thought that the template left empty."""
        content = str(self.marked.messages[index].get("content") or "")
        if _EMPTY_THOUGHT.search(content):  # of the user's own
            return place
        lead = content[: len(content) - len(content.lstrip())]
        stop = len(region) - len(lead) if region.endswith(lead) else len(region)
        for thought in _EMPTY_THOUGHT.finditer(region, 0, stop):
            if thought.start() <= place <= thought.end():
                place = thought.end()
        return place

    def end(self, index: int) -> tuple[int, bool]:
        """Behind the token that ends answer ``index``, and whether there is one."""
        part = self.present(index)[-1]
        from_here = self.place[part.mark] + 1
        follows = self.whole[from_here:]
        content = len(part.after) if follows.startswith(part.after) else 0
        following = [self.place[p.mark] for i in range(index + 1, len(self.marked.messages)) for p in self.present(i)]
        if following:
            closing = self._closing(part, self.marked.messages[: index + 1])
            same = _common(closing, follows[: min(following) - from_here])
        else:
            same = self._end_of_last(index, part, follows, content)
        ends = [token.end() for token in self.special.finditer(follows, content, same)] if self.special else []
        if not ends and following and self.special:
            ends = self._end_before_more(index, part, follows, content)
        if ends:
            return from_here + ends[-1], True
        stop = content + len(follows[content:same].rstrip())
        if same < len(follows) and following:  # plain text that closes a turn, up to where it is surely whole
            stop = (
                content
                + max(follows.rfind("\n", content, same), follows.rfind(">", content, same) + 1, content)
                - content
            )
        return from_here + stop, False

    def _end_of_last(self, index: int, part: Part, follows: str, content: int) -> int:
        """How far the closing of the last turn goes: a template may write more behind the end of a conversation."""
        ends = [token.end() for token in self.special.finditer(follows, content)] if self.special else []
        if len(ends) < 2:
            return len(follows)
        try:
            more = self._closing(part, [*self.marked.messages[: index + 1], {"role": "user", "content": "?"}])
        except ValueError:
            return len(follows)
        same = _common(more, follows)
        return same if any(end <= same for end in ends) else len(follows)

    def _end_before_more(self, index: int, part: Part, follows: str, content: int) -> list[int]:
        """The end of a turn in a template that ends the last turn of a conversation with another token."""
        more = render(self.tokenizer, self.dialogue, self.marked.messages[: index + 1], generate=True)
        same = _common(more[more.index(part.mark) + 1 :], follows) if part.mark in more else 0
        return [token.end() for token in self.special.finditer(follows, content, same)][:1]  # type: ignore[union-attr]

    def _closing(self, part: Part, messages: list[Message]) -> str:
        text = render(self.tokenizer, self.dialogue, messages)
        return text[text.index(part.mark) + 1 :] if part.mark in text else ""

    def _whole_tokens(self, text: str, stop: int, least: int) -> int:
        """``stop``, moved back to where neither a special token nor a word is torn."""
        ends = [least, *(m.end() for m in re.finditer(r"[\s>\]]", text[:stop]))]
        if self.special:
            ends += [token.end() for token in self.special.finditer(text) if token.end() <= stop]
        return max(ends)

    def generation_spans(self, scored: list[int]) -> list[tuple[int, int]] | None:
        """The template's own marks (``{% generation %}``) of the answers in ``scored``; None where it has none."""
        template = str(self.tokenizer.get_chat_template(tools=self.dialogue.tools))
        if not _GENERATION.search(template):
            return None
        messages = plain_messages(self.tokenizer, template, self.marked.messages)
        options = {**self.tokenizer.special_tokens_map, **self.dialogue.template_kwargs}
        rendered: Any = render_jinja_template(  # typed as text, it is texts and spans
            [messages], tools=self.dialogue.tools, chat_template=template, return_assistant_tokens_mask=True, **options
        )
        texts, spans = rendered
        if texts[0] != self.whole:
            return None
        found = []
        for start, end in spans[0]:
            inside = [i for i in scored if any(start <= self.place[p.mark] < end for p in self.present(i))]
            if inside:  # some templates mark the header, or an empty thought of their own
                found.append((max(start, self.start(inside[0])), self._without_space(start, end)))
        return found

    def leaves_out_end(self, index: int, stop: int) -> bool:
        """Whether the token that ends answer ``index`` comes behind ``stop``."""
        end, closed = self.end(index)
        return closed and end > stop

    def _without_space(self, start: int, end: int) -> int:
        """``end``, without the white space behind a special token: it is never generated."""
        text = self.whole[start:end]
        ends = [token.end() for token in self.special.finditer(text)] if self.special else []
        return start + ends[-1] if ends and not text[ends[-1] :].strip() else end


def _locate_by_prefix(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, messages: list[Message], scored: list[int], text: str
) -> Rendering:
    """Without marks: an answer is what follows the rendering of all before it, where the template rewrites nothing."""
    special = _special_tokens(tokenizer)
    answers: list[tuple[int, int]] = []
    needs_eos = False
    for index in scored:
        begun = begin_answer(tokenizer, dialogue, messages[:index])
        closed = render(tokenizer, dialogue, messages[: index + 1])
        start, stop = len(begun), _common(closed, text)
        if not text.startswith(begun):
            if index != scored[-1]:
                continue
            start = _common(begun, text)
        ends = [token.end() for token in special.finditer(text, start, stop)] if special else []
        needs_eos = not ends
        answers.append((start, ends[-1] if ends else start + len(text[start:stop].rstrip())))
    return Rendering(text, answers, needs_eos)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """A pattern of all added tokens: every row asks for it, and some tokenizers have a thousand."""
    return _pattern_of_added(tokenizer, len(tokenizer), tokenizer.eos_token)


@lru_cache(4)
def _pattern_of_added(tokenizer: PreTrainedTokenizerBase, *state: Any) -> re.Pattern[str] | None:
    words = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if str(token.content).strip()}
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))) if words else None


def _common(first: str, second: str) -> int:
    return len(os.path.commonprefix([first, second]))  # noqa: RUF071  # characters are meant
