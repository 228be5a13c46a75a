"""A chat template with the tools and options of one row: from messages to text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, UndefinedError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf.data.formats import Dialogue
from rlhf.data.messages import Message
from rlhf.data.template_limits import limit_templates

limit_templates()

PROBE = "\U000ffffd"  # a private character of Unicode: stands for a text whose place in a rendering is wanted
# Besides Jinja's own errors, those of Python where a message lacks what the template reads.
_TEMPLATE_ERRORS = (
    TemplateError, TypeError, LookupError, AttributeError, ValueError, ArithmeticError, RecursionError,
)  # fmt: skip
_OWN_KEYS = ("weight",)  # keys of a message that are ours; no template gets them


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, with the tools and options of one dialogue.

    Args:
        tokenizer: Has a chat template.
        tools: JSON schemas, or None.
        options: Further arguments of the template.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: list[Any] | None
    options: Mapping[str, Any]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> "ChatTemplate":
        """Read the template of a tokenizer for one dialogue.

        Args:
            tokenizer: The tokenizer.
            dialogue: Its tools and options are used.

        Returns:
            The template.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise ValueError(
                "the data is conversational but the tokenizer has no chat template: pass --chat_template_path "
                "(a .jinja file or a model folder), or use plain 'prompt' and 'completion' text"
            )
        return cls(tokenizer, dialogue.tools, dialogue.template_kwargs)

    @property
    def source(self) -> str:
        """The text of the template; a tokenizer may have one for tools and one for chat."""
        return str(self.tokenizer.get_chat_template(tools=self.tools))

    def render(self, messages: list[Message], begin_answer: bool = False, continue_last: bool = False) -> str:
        """Render messages.

        Args:
            messages: The conversation; may be empty.
            begin_answer: Whether to end with the text that begins the assistant's answer.
            continue_last: Whether to leave the last message open.

        Returns:
            The text.

        Raises:
            ValueError: The template refuses the conversation.
        """
        # Many templates read the first message without a test.
        if not messages:
            return ""
        readable = self.readable(messages)
        try:
            return self._apply(readable, begin_answer, continue_last)
        except _TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            roles = ", ".join(str(message.get("role")) for message in readable[:8])
            raise ValueError(f"the chat template refuses this conversation ({reason[:200]}); roles: {roles}") from error

    def render_prompt(self, messages: list[Message]) -> str:
        """Render messages up to the place where the assistant begins to write.

        A template that knows no ``add_generation_prompt`` ends there with the header that it writes before an answer.

        Args:
            messages: The conversation before the answer.

        Returns:
            The text.

        Raises:
            ValueError: The template refuses the conversation.
        """
        rendered_prompt = self.render(messages, begin_answer=True)
        if "add_generation_prompt" in self.source:
            return rendered_prompt
        # Render an answer, and take what stands before it.
        answered = self.render([*messages, {"role": "assistant", "content": PROBE}])
        if PROBE not in answered or not answered.startswith(rendered_prompt):
            return rendered_prompt
        with_header = answered[: answered.find(PROBE)]
        header = with_header[len(rendered_prompt) :]
        # A space before the answer belongs to the answer's first token.
        return with_header.rstrip(" ") if header.strip() else rendered_prompt

    def render_with_spans(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Render messages, and read the template's own marks of answers, ``{% generation %}``.

        Args:
            messages: The conversation.

        Returns:
            The text, and the first and last character (exclusive) of each marked span.
        """
        options = {**self.tokenizer.special_tokens_map, **self.options}
        # Called directly: `apply_chat_template` returns these spans for tokens only, and needs offsets for that.
        rendered: Any = render_jinja_template(  # its annotation is text; it returns a list of texts and one of spans
            [self.readable(messages)],
            tools=self.tools,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **options,
        )
        (rendered_text,), (marked_spans,) = rendered
        return rendered_text, marked_spans

    def readable(self, messages: list[Message]) -> list[Message]:
        """Messages as the template reads them: without our keys, and with content as parts if it reads nothing else."""
        readable = [{key: item for key, item in message.items() if key not in _OWN_KEYS} for message in messages]
        if _wants_parts(self.tokenizer, self.source):
            return [_with_parts(message) for message in readable]
        return readable

    def _apply(self, messages: list[Message], begin_answer: bool, continue_last: bool) -> str:
        """Render, with the arguments of calls as objects, or as JSON text if the template wants text."""

        def apply(messages: list[Message]) -> str:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
                messages,
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=begin_answer,
                continue_final_message=continue_last,
                **self.options,
            )

        try:
            rendered_text = apply(messages)
        except (TypeError, UndefinedError):
            if "tool_calls" not in self.source:
                raise
            # Some templates join a call to its content, so that content must be text ...
            messages = [{**message, "content": message.get("content") or ""} for message in messages]
            try:
                rendered_text = apply(messages)
            except TypeError:
                # ... and some join the arguments, so that they must be text too.
                return apply([_with_json_arguments(message) for message in messages])
        # A template that prints an object as it is would teach Python's notation, with single quotes.
        if any(arguments and str(arguments) in rendered_text for arguments in _arguments_of(messages)):
            return apply([_with_json_arguments(message) for message in messages])
        return rendered_text


def _arguments_of(messages: list[Message]) -> list[dict[str, Any]]:
    """The arguments of all calls that have an object of them."""
    tool_calls = [call for message in messages for call in message.get("tool_calls", [])]
    functions = [call["function"] for call in tool_calls if isinstance(call.get("function"), dict)]
    return [function["arguments"] for function in functions if isinstance(function.get("arguments"), dict)]


def _with_json_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as JSON text."""
    if "tool_calls" not in message:
        return message
    tool_calls = []
    for call in message["tool_calls"]:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": arguments}}
        tool_calls.append(call)
    return {**message, "tool_calls": tool_calls}


def _with_parts(message: Message) -> Message:
    """The message with text content as a list of one part."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


# Every row asks for it, and the answer takes two renderings.
@lru_cache(8)
def _wants_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template writes content that is a list of parts, but not content that is text (vision models)."""
    question: Message = {"role": "user", "content": PROBE}
    special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)

    def is_written(message: Message) -> bool:
        try:
            rendered: Any = render_jinja_template([[message]], chat_template=template, **special_tokens)
        except _TEMPLATE_ERRORS:
            return False
        rendered_texts, _ = rendered
        return PROBE in rendered_texts[0]

    # Such a template tests the type of a part. One that does not, and fails on text, has a fault that must be reported.
    return "type" in template and not is_written(question) and is_written(_with_parts(question))
