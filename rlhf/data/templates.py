"""A chat template applied to messages: tools, options, and the forms that templates want contents and calls in."""

import json
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, UndefinedError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf.data.formats import Dialogue, Message
from rlhf.data.marks import PROBE

_NOT_RENDERED = ("weight",)  # what our own reading leaves in a message


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise where there is no chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the data is conversational but the tokenizer has no chat template: pass --chat_template_path "
            "(a .jinja file or a model folder), or use plain 'prompt' and 'completion' text"
        )


def render(
    tokenizer: PreTrainedTokenizerBase,
    dialogue: Dialogue,
    messages: list[Message],
    generate: bool = False,
    resume: bool = False,
) -> str:
    """Messages in the chat template, with the dialogue's tools and options.

    Args:
        generate: end with what begins the assistant's answer. resume: leave the last message open.
    Raises:
        ValueError: the template refuses them.
    """
    if not messages:
        return ""
    plain = plain_messages(tokenizer, str(tokenizer.get_chat_template(tools=dialogue.tools)), messages)
    try:
        return _apply(tokenizer, dialogue, plain, generate, resume)
    except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"the chat template refuses this conversation ({reason[:200]}); roles: "
            f"{', '.join(str(m.get('role')) for m in plain[:8])}"
        ) from error


def begin_answer(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, messages: list[Message]) -> str:
    """Render ``messages`` up to where the assistant begins to write, also with a template that knows no generation
    prompt: there, what it writes in front of an answer.

    Raises:
        ValueError: the template refuses them.
    """
    begun = render(tokenizer, dialogue, messages, generate=True)
    if "add_generation_prompt" in str(tokenizer.get_chat_template(tools=dialogue.tools)):
        return begun
    probe = render(tokenizer, dialogue, [*messages, {"role": "assistant", "content": PROBE}])
    header = probe[: probe.find(PROBE)] if probe.startswith(begun) and PROBE in probe else begun
    # A space in front of the answer is of the answer's first token.
    return header.rstrip(" ") if header[len(begun) :].strip() else begun


def _apply(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, messages: list[Message], generate: bool, resume: bool
) -> str:
    """The rendering, with a call's arguments as objects, or as JSON text where the template wants text."""

    def apply(messages: list[Message]) -> str:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            messages, tools=dialogue.tools, tokenize=False, add_generation_prompt=generate,
            continue_final_message=resume, **dialogue.template_kwargs,
        )  # fmt: skip

    arguments = [
        call["function"]["arguments"]
        for message in messages
        for call in message.get("tool_calls", [])
        if isinstance(call.get("function"), dict) and isinstance(call["function"].get("arguments"), dict)
    ]
    try:
        text = apply(messages)
    except (TypeError, UndefinedError):
        # Some templates join a call to its content, and some want arguments as text.
        if "tool_calls" not in str(tokenizer.get_chat_template(tools=dialogue.tools)):
            raise
        messages = [{**message, "content": message.get("content") or ""} for message in messages]
        try:
            text = apply(messages)
        except TypeError:
            return apply([_with_text_arguments(message) for message in messages])
    if any(given and str(given) in text for given in arguments):  # written as Python would
        return apply([_with_text_arguments(message) for message in messages])
    return text


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        calls.append({**call, "function": function} if function is not None else call)
    return {**message, "tool_calls": calls}


def plain_messages(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[Message]) -> list[Message]:
    """Messages as ``template`` reads them: without what is ours, contents as parts where it reads nothing else."""
    plain = [{key: value for key, value in m.items() if key not in _NOT_RENDERED} for m in messages]
    return [_in_parts(message) for message in plain] if _wants_parts(tokenizer, template) else plain


def _in_parts(message: Message) -> Message:
    said = message.get("content")
    return {**message, "content": [{"type": "text", "text": said}]} if isinstance(said, str) else message


@lru_cache(8)
def _wants_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template writes a content of parts, and none that is text (those of some models that see)."""
    question: Message = {"role": "user", "content": PROBE}
    special: dict[str, Any] = dict(tokenizer.special_tokens_map)

    def shown(message: Message) -> bool:
        try:
            rendered: Any = render_jinja_template([[message]], chat_template=template, **special)
        except (TemplateError, TypeError, KeyError, AttributeError, ValueError):
            return False
        return PROBE in rendered[0][0]  # texts and spans, typed as text

    # A template for parts asks for their type; one that only fails on text has a fault that must be told.
    return "type" in template and not shown(question) and shown(_in_parts(question))
