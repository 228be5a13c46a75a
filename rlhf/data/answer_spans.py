"""Where each answer begins and ends in a rendering: the characters that the model is to write."""

import re
from bisect import bisect_left
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.data.formats import Message
from rlhf.data.marks import MARKS, Marked, Part
from rlhf.data.prompts import common_length
from rlhf.data.templates import ChatTemplate

# A thought without content, as templates write it by themselves before an answer. It ends with at most two line breaks:
# a third begins what comes next, such as a call.
_EMPTY_THOUGHT = re.compile(
    r"\s*(?:<([\w:|]*think\w*)>\s*</\1>|\[THINK\]\s*\[/THINK\]|<\|START_THINKING\|>\s*<\|END_THINKING\|>"
    r"|<\|channel>thought\s*<channel\|>)\n{0,2}",
    re.IGNORECASE,
)
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
        matches = list(MARKS.finditer(rendering))
        self.mark_starts = [match.start() for match in matches]
        # A template may write a text twice: its first place counts, so it is entered last.
        self.mark_positions = {match.group(): match.start() for match in reversed(matches)}

    def without_marks(self, position: int) -> int:
        """The same position in the rendering without marks."""
        return position - bisect_left(self.mark_starts, position)

    def written_parts(self, index: int) -> list[Part]:
        """The parts of message ``index`` that are in the rendering, in its order."""
        written = [part for part in self.parts[index] if part.mark in self.mark_positions]
        return sorted(written, key=self._position)

    def _position(self, part: Part) -> int:
        return self.mark_positions[part.mark]

    # The start

    def start(self, index: int) -> int:
        """The place where the model begins to write answer ``index``: behind the text it is given to begin with."""
        content_start = self._content_start(index)
        if index == 0:
            return content_start
        # The last text before the answer that both renderings have: from there on, they are compared. (A template may
        # move a turn, such as the system's, behind an answer.)
        earlier = [part for before in range(index) for part in self.written_parts(before)]
        earlier = [part for part in earlier if self._position(part) < content_start]
        anchor = max(earlier, key=self._position, default=Part("", "", "", ""))
        prompt = self.template.render_prompt(self.messages[:index])
        if anchor.mark not in prompt:
            return content_start

        anchor_end = self.mark_positions.get(anchor.mark, 0) + len(anchor.mark)
        given = prompt[prompt.index(anchor.mark) + len(anchor.mark) :]
        region = self.rendering[anchor_end:content_start]
        shared = common_length(given, region)
        if shared < len(given):
            # The template writes something else than it gives to begin with: go back to a whole token, and let the
            # model write a tag that opens a thought.
            least = len(anchor.after) if region.startswith(anchor.after) else 0
            shared = self._whole_tokens(region, shared, least)
            open_thought = _OPEN_THOUGHT.search(region[:shared])
            shared -= len(open_thought.group()) if open_thought else 0
        return anchor_end + self._behind_empty_thought(index, region, shared)

    def _content_start(self, index: int) -> int:
        """The place where the first text of a message begins, as far as the template writes it unchanged."""
        part = self.written_parts(index)[0]
        position = self._position(part)
        start = position - len(part.before)
        is_unchanged = start >= 0 and self.rendering[start:position] == part.before
        return start if is_unchanged else position

    def _behind_empty_thought(self, index: int, region: str, position: int) -> int:
        """Move ``position`` in the text before an answer behind a thought that the template left empty."""
        content = str(self.messages[index].get("content") or "")
        if _EMPTY_THOUGHT.search(content):  # the user wrote it, so it is trained
            return position
        leading_space = content[: len(content) - len(content.lstrip())]
        stop = len(region)
        if region.endswith(leading_space):
            stop -= len(leading_space)
        for thought in _EMPTY_THOUGHT.finditer(region, 0, stop):
            if thought.start() <= position <= thought.end():
                position = thought.end()
        return position

    def _whole_tokens(self, text: str, stop: int, least: int) -> int:
        """Move ``stop`` back to a place, not before ``least``, that splits neither a special token nor a word."""
        ends = [least]
        ends += [match.end() for match in re.finditer(r"[\s>\]]", text[:stop])]
        ends += [end for end in self._special_ends(text, 0, len(text)) if end <= stop]
        return max(ends)

    # The end

    def end(self, index: int) -> AnswerEnd:
        """The place behind the token that ends answer ``index``, or behind its text where no token ends it."""
        part = self.written_parts(index)[-1]
        base = self._position(part) + 1
        follows = self.rendering[base:]
        content_end = len(part.after) if follows.startswith(part.after) else 0
        later = range(index + 1, len(self.messages))
        later_positions = [self._position(other) for turn in later for other in self.written_parts(turn)]

        # The closing of a turn is the text behind it that two renderings share: this one, and one that ends there.
        if later_positions:
            closing = self._closing(part, self.messages[: index + 1])
            shared = common_length(closing, follows[: min(later_positions) - base])
        else:
            shared = self._end_of_last(index, part, follows, content_end)
        token_ends = self._special_ends(follows, content_end, shared)
        if not token_ends and later_positions:
            token_ends = self._end_before_more(index, part, follows, content_end)
        if token_ends:
            return AnswerEnd(base + token_ends[-1], True)

        if later_positions and shared < len(follows):
            # Plain text closes the turn, and more follows: stop where a line or a tag is surely complete.
            line_end = follows.rfind("\n", content_end, shared)
            tag_end = follows.rfind(">", content_end, shared) + 1
            return AnswerEnd(base + max(line_end, tag_end, content_end), False)
        stop = content_end + len(follows[content_end:shared].rstrip())
        return AnswerEnd(base + stop, False)

    def _end_of_last(self, index: int, part: Part, follows: str, content_end: int) -> int:
        """How far the closing of the last turn goes: a template may write more behind the end of a conversation."""
        ends = self._special_ends(follows, content_end, len(follows))
        if len(ends) < 2:
            return len(follows)
        question: Message = {"role": "user", "content": "?"}
        try:
            closing = self._closing(part, [*self.messages[: index + 1], question])
        except ValueError:
            return len(follows)
        shared = common_length(closing, follows)
        return shared if any(end <= shared for end in ends) else len(follows)

    def _end_before_more(self, index: int, part: Part, follows: str, content_end: int) -> list[int]:
        """The end of a turn, for a template that ends the last turn of a conversation with another token."""
        continued = self.template.render(self.messages[: index + 1], begin_answer=True)
        shared = common_length(_text_behind(part, continued), follows)
        return self._special_ends(follows, content_end, shared)[:1]

    def _closing(self, part: Part, messages: list[Message]) -> str:
        return _text_behind(part, self.template.render(messages))

    def _special_ends(self, text: str, start: int, stop: int) -> list[int]:
        return special_token_ends(self.template.tokenizer, text, start, stop)

    # The template's own marks

    def generation_spans(self, scored: list[int]) -> list[tuple[int, int]] | None:
        """The spans of the answers in ``scored`` that the template marks itself; None if it has no such marks."""
        if not _GENERATION.search(self.template.source):
            return None
        text, marked_spans = self.template.render_with_spans(self.messages)
        if text != self.rendering:
            return None
        spans = []
        for start, end in marked_spans:
            answers = [index for index in scored if self._is_inside(index, start, end)]
            if answers:  # some templates mark a header, or an empty thought of their own
                spans.append((max(start, self.start(answers[0])), self._without_trailing_space(start, end)))
        return spans

    def leaves_out_end(self, index: int, stop: int) -> bool:
        """Whether the token that ends answer ``index`` comes behind ``stop``."""
        end = self.end(index)
        return end.has_token and end.position > stop

    def _is_inside(self, index: int, start: int, end: int) -> bool:
        return any(start <= self._position(part) < end for part in self.written_parts(index))

    def _without_trailing_space(self, start: int, end: int) -> int:
        """``end`` without the white space behind a special token: generation stops at the token."""
        text = self.rendering[start:end]
        ends = self._special_ends(text, 0, len(text))
        if ends and not text[ends[-1] :].strip():
            return start + ends[-1]
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
