"""Where each answer begins and ends in a rendering: the characters that the model is to write.

In a rendering with marks (``·``), the answer ``yes`` is the text between the arrows::

    <|user|>wh·y<|end|><|assistant|>ye·s<|end|><|user|>ho·w<|end|>
                                    ^          ^

The start is the place where the rendering of all messages before the answer ends. The end is the place up to which the
rendering that ends with the answer is the same. Both are compared from a mark on, not from the beginning: a template
may write earlier turns in another form when more messages follow.
"""

import re
from bisect import bisect_left
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.data.marks import MARKS, Marked, Part
from rlhf.data.messages import Message
from rlhf.data.prompts import common_length
from rlhf.data.templates import ChatTemplate

# A thought without content, as templates write it by themselves before an answer. It ends with at most two line breaks:
# a third begins what comes next, such as a call.
_EMPTY_THOUGHT = re.compile(
    r"\s*(?:<([\w:|]*think\w*)>\s*</\1>|\[THINK\]\s*\[/THINK\]|<\|START_THINKING\|>\s*<\|END_THINKING\|>"
    r"|<\|channel>thought\s*<channel\|>)\n{0,2}",
    re.IGNORECASE,
)
# A tag at the end of a header that opens a thought, or nothing.
_OPEN_THOUGHT = re.compile(r"(?:<[\w:]*think\w*>\s*)?$", re.IGNORECASE)
_NEVER = r"(?!)"  # a pattern that matches nothing
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class AnswerEnd(NamedTuple):
    """The place behind an answer; ``has_token`` if a special token of the template ends the answer there."""

    position: int
    has_token: bool


class AnswerSpans:
    """Finds answers in a rendering with marks. Positions are characters of that rendering.

    Args:
        template: Rendered the conversation.
        marked: The conversation with marks.
        rendering: Its text, with the marks that came out.
    """

    def __init__(self, template: ChatTemplate, marked: Marked, rendering: str) -> None:
        self.template = template
        self.messages = marked.messages
        self.parts = marked.parts
        self.rendering = rendering
        mark_matches = list(MARKS.finditer(rendering))
        self.mark_starts = [mark_match.start() for mark_match in mark_matches]
        # A template may write a text twice: its first place counts, so it is entered last.
        self.mark_positions = {mark_match.group(): mark_match.start() for mark_match in reversed(mark_matches)}

    def without_marks(self, position: int) -> int:
        """The same position in the rendering without marks."""
        return position - bisect_left(self.mark_starts, position)

    def written_parts(self, index: int) -> list[Part]:
        """The parts of message ``index`` that are in the rendering, in its order."""
        written = [part for part in self.parts[index] if part.mark in self.mark_positions]
        return sorted(written, key=self._position)

    def written_spans(self, scored: list[int], prefilled: int | None) -> tuple[list[tuple[int, int]], bool]:
        """Find the answers that the template writes.

        Args:
            scored: Indices of the messages that are trained.
            prefilled: Index of the message whose beginning is a part of the prompt, if there is one.

        Returns:
            Start and end of each answer, and whether the last one needs an EOS.
        """
        answer_spans = []
        needs_eos = False
        for message_index in scored:
            if not self.written_parts(message_index):
                continue  # the template leaves the answer out; a note says so
            answer_start, answer_end = self.start(message_index), self.end(message_index)
            if message_index == prefilled:
                prefill_mark = self.parts[message_index][0].mark
                answer_start = max(answer_start, self.mark_positions[prefill_mark])
            answer_spans.append((answer_start, max(answer_start, answer_end.position)))
            needs_eos = not answer_end.has_token
        return answer_spans, needs_eos

    def _position(self, part: Part) -> int:
        return self.mark_positions[part.mark]

    # The start

    def start(self, index: int) -> int:
        """The place where the model begins to write answer ``index``: behind the text it is given to begin with."""
        content_start = self._content_start(index)
        if index == 0:
            return content_start
        anchor_part = self._last_part_before(index, content_start)
        rendered_prompt = self.template.render_prompt(self.messages[:index])
        if anchor_part.mark not in rendered_prompt:
            return content_start

        # Behind the anchor: the text that the model is given to begin with, and what the template writes there.
        anchor_end = self.mark_positions.get(anchor_part.mark, 0) + len(anchor_part.mark)
        prompt_end = rendered_prompt[rendered_prompt.index(anchor_part.mark) + len(anchor_part.mark) :]
        answer_header = self.rendering[anchor_end:content_start]
        header_end = common_length(prompt_end, answer_header)
        if header_end < len(prompt_end):
            # The template writes another header than it gives. Go back to a whole token, and let the model write a tag
            # that opens a thought.
            least = len(anchor_part.after) if answer_header.startswith(anchor_part.after) else 0
            header_end = self._whole_tokens(answer_header, header_end, least)
            open_thought = _OPEN_THOUGHT.search(answer_header[:header_end])
            header_end -= len(open_thought.group()) if open_thought else 0
        return anchor_end + self._behind_empty_thought(index, answer_header, header_end)

    def _last_part_before(self, index: int, position: int) -> Part:
        """The last part of the messages before ``index`` that stands before ``position``; an empty one without any.

        A template may move a turn, such as the system's, behind an answer, so that the last message is not enough.
        """
        earlier_parts = [part for earlier in range(index) for part in self.written_parts(earlier)]
        earlier_parts = [part for part in earlier_parts if self._position(part) < position]
        return max(earlier_parts, key=self._position, default=Part("", "", "", ""))

    def _content_start(self, index: int) -> int:
        """The place where the first text of a message begins, as far as the template writes it unchanged."""
        part = self.written_parts(index)[0]
        position = self._position(part)
        content_start = position - len(part.before)
        is_unchanged = content_start >= 0 and self.rendering[content_start:position] == part.before
        return content_start if is_unchanged else position

    def _behind_empty_thought(self, index: int, header: str, position: int) -> int:
        """Move ``position`` in the header of an answer behind a thought that the template left empty.

        The model is given that thought when it is asked to answer without thinking, so it is not learned.
        """
        content = str(self.messages[index].get("content") or "")
        if _EMPTY_THOUGHT.search(content):  # the user wrote it, so it is trained
            return position
        leading_space = content[: len(content) - len(content.lstrip())]
        thought_limit = len(header)
        if header.endswith(leading_space):
            thought_limit -= len(leading_space)  # white space of the content is trained
        for empty_thought in _EMPTY_THOUGHT.finditer(header, 0, thought_limit):
            if empty_thought.start() <= position <= empty_thought.end():
                position = empty_thought.end()
        return position

    def _whole_tokens(self, text: str, stop: int, least: int) -> int:
        """Move ``stop`` back to a place, not before ``least``, that splits neither a special token nor a word."""
        possible_ends = [least]
        possible_ends += [match.end() for match in re.finditer(r"[\s>\]]", text[:stop])]
        possible_ends += [token_end for token_end in self._special_ends(text, 0, len(text)) if token_end <= stop]
        return max(possible_ends)

    # The end

    def end(self, index: int) -> AnswerEnd:
        """The place behind the token that ends answer ``index``, or behind its text where no token ends it."""
        last_part = self.written_parts(index)[-1]
        tail_start = self._position(last_part) + 1
        text_behind = self.rendering[tail_start:]  # the rest of the content, the closing of the turn, and later turns
        content_end = len(last_part.after) if text_behind.startswith(last_part.after) else 0
        later_turns = range(index + 1, len(self.messages))
        later_marks = [self._position(part) for turn_index in later_turns for part in self.written_parts(turn_index)]
        has_later_turns = bool(later_marks)

        if has_later_turns:
            closing = self._tail_of(last_part, self.messages[: index + 1])
            closing_end = common_length(closing, text_behind[: min(later_marks) - tail_start])
        else:
            closing_end = self._end_of_last_closing(index, last_part, text_behind, content_end)
        token_ends = self._special_ends(text_behind, content_end, closing_end)
        if not token_ends and has_later_turns:
            token_ends = self._end_before_later_turns(index, last_part, text_behind, content_end)
        if token_ends:
            return AnswerEnd(tail_start + token_ends[-1], True)

        if has_later_turns and closing_end < len(text_behind):
            # Plain text closes the turn. What later turns share with it by chance is not a part of it, so it ends where
            # a line or a tag is complete.
            line_end = text_behind.rfind("\n", content_end, closing_end)
            tag_end = text_behind.rfind(">", content_end, closing_end) + 1
            return AnswerEnd(tail_start + max(line_end, tag_end, content_end), False)
        text_end = content_end + len(text_behind[content_end:closing_end].rstrip())
        return AnswerEnd(tail_start + text_end, False)

    def _end_of_last_closing(self, index: int, last_part: Part, tail: str, content_end: int) -> int:
        """Where the closing of the last turn ends: a template may write more at the end of a conversation."""
        token_ends = self._special_ends(tail, content_end, len(tail))
        if len(token_ends) < 2:
            return len(tail)
        # With several tokens behind the answer, the ones that stay when a question follows belong to the turn.
        question: Message = {"role": "user", "content": "?"}
        try:
            closing = self._tail_of(last_part, [*self.messages[: index + 1], question])
        except ValueError:
            return len(tail)
        closing_end = common_length(closing, tail)
        return closing_end if any(end <= closing_end for end in token_ends) else len(tail)

    def _end_before_later_turns(self, index: int, last_part: Part, tail: str, content_end: int) -> list[int]:
        """The token that ends a turn, if the template ends the last turn of a conversation with another one."""
        continued = self.template.render(self.messages[: index + 1], begin_answer=True)
        closing_end = common_length(_text_behind(last_part, continued), tail)
        return self._special_ends(tail, content_end, closing_end)[:1]

    def _tail_of(self, part: Part, messages: list[Message]) -> str:
        """The text behind a mark in the rendering of other messages."""
        return _text_behind(part, self.template.render(messages))

    def _special_ends(self, text: str, start: int, stop: int) -> list[int]:
        return special_token_ends(self.template.tokenizer, text, start, stop)

    # The template's own marks

    def generation_spans(self, scored: list[int]) -> list[tuple[int, int]] | None:
        """The spans of the answers in ``scored`` that the template marks itself; None if it has no such marks."""
        if not _GENERATION.search(self.template.source):
            return None
        rendered_text, marked_spans = self.template.render_with_spans(self.messages)
        if rendered_text != self.rendering:
            return None  # rendered in another way, its positions would be wrong
        answer_spans = []
        for start, end in marked_spans:
            answers = [index for index in scored if self._is_inside(index, start, end)]
            if answers:  # some templates mark a header, or an empty thought of their own
                answer_spans.append((max(start, self.start(answers[0])), self._without_trailing_space(start, end)))
        return answer_spans

    def leaves_out_end(self, index: int, stop: int) -> bool:
        """Whether the token that ends answer ``index`` comes behind ``stop``."""
        end = self.end(index)
        return end.has_token and end.position > stop

    def _is_inside(self, index: int, start: int, end: int) -> bool:
        return any(start <= self._position(part) < end for part in self.written_parts(index))

    def _without_trailing_space(self, start: int, end: int) -> int:
        """``end`` without the white space behind a special token: generation stops at the token."""
        span_text = self.rendering[start:end]
        token_ends = self._special_ends(span_text, 0, len(span_text))
        if token_ends and not span_text[token_ends[-1] :].strip():
            return start + token_ends[-1]
        return end


def _text_behind(part: Part, text: str) -> str:
    """The text behind the mark of a part; empty if it is not there."""
    return text[text.index(part.mark) + 1 :] if part.mark in text else ""


def special_token_ends(tokenizer: PreTrainedTokenizerBase, text: str, start: int, stop: int) -> list[int]:
    """Find special tokens in a part of a text.

    Args:
        tokenizer: All of its added tokens are found.
        text: The text.
        start: First character of the part.
        stop: The character behind the part.

    Returns:
        The place behind each token, in order.
    """
    # The pattern is cached: every row needs it, and some tokenizers have a thousand added tokens. The further arguments
    # are a part of the key, as they change when tokens are added.
    pattern = _pattern_of_added_tokens(tokenizer, len(tokenizer), tokenizer.eos_token)
    return [token.end() for token in pattern.finditer(text, start, stop)]


@lru_cache(4)
def _pattern_of_added_tokens(tokenizer: PreTrainedTokenizerBase, *state: Any) -> re.Pattern[str]:
    contents = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    longest_first = sorted(filter(str.strip, contents), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or _NEVER)
