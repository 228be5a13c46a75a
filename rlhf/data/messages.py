"""One message of a conversation, as people write it, brought to what chat templates read."""

import ast
import json
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

Message = dict[str, Any]
Turns = str | list[Message]  # plain text, or a conversation
ASSISTANT = "assistant"

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "ai", "chatbot", "function_call", "tool_call"),
        ASSISTANT,
    ),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "tool_result"), "tool"),
    "system": "system",
    "developer": "developer",
}
_CALLS = ("function_call", "tool_call")  # roles of an assistant's turn that is a call
_WEIGHTS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight", "mask")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_MEDIA = ("image", "video", "audio")


def as_messages(
    value: Iterable[Any], column: str, roles: Mapping[str, str] | None = None, template: str = "", exact: bool = False
) -> list[Message]:
    """Messages with ``role`` and ``content``, and what templates read besides; ``weight`` 0 where one is not learned.

    Args:
        value: messages, or exchanges with ``input`` and ``output``. column: where they stand, for error messages.
        roles: further names of roles.
        template: the chat template; reasoning gets the key that it reads, a call that is text stays text where it reads
            no calls.
        exact: values are as they were written; else nulls inside them are Arrow's, and are taken out.
    Raises:
        ValueError: names the message and what is wrong with it.
    """
    messages: list[Message] = []
    for number, turn in enumerate(value, start=1):
        where = f"{column!r}, message {number}"
        if not isinstance(turn, Mapping):
            raise ValueError(f"{where} is {kind(turn)}, expected an object with 'role' and 'content'")
        message = {key: item if exact else without_nulls(item) for key, item in turn.items() if item is not None}
        if {"input", "output"} <= set(message) and not {"role", "from"} & set(message):
            both = (("user", message["input"]), (ASSISTANT, message["output"]))
            messages += [_message({"role": role, "content": text}, where, {}, template) for role, text in both]
        else:
            messages.append(_message(message, where, roles or {}, template))
    return messages


def _message(message: Message, where: str, roles: Mapping[str, str], template: str) -> Message:
    """``message`` is ours to change."""
    for theirs, ours in (("from", "role"), ("value", "content")):  # ShareGPT
        if ours not in message and theirs in message:
            message[ours] = message.pop(theirs)
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{where} has no 'role'")
    given = roles.get(message["role"], message["role"]).strip()
    message["role"] = _ROLES.get(given.lower(), given)
    if given.lower() in _CALLS and "tool_calls" in template:
        _read_call_turn(message)
    _read_parts(message, where)
    _read_calls(message, where)
    _read_weight(message, where)
    if message["role"] == ASSISTANT:
        _read_reasoning(message, template)
    if given.lower() in _CALLS or message["role"] == "tool":
        _write_objects(message)
    _check_content(message, where)
    return message


def _check_content(message: Message, where: str) -> None:
    content = message.get("content")
    if content is None and "tool_calls" in message:
        message["content"] = None  # templates ask whether it is none
        return
    if not isinstance(content, str):
        raise ValueError(f"{where}: 'content' is {kind(content)}, expected text")
    said = content.strip() or any(str(message.get(key, "")).strip() for key in _REASONING)
    if message["role"] == ASSISTANT and "tool_calls" not in message and not said and message.get("weight", 1):
        raise ValueError(f"{where}: the assistant's answer is empty")


def _read_call_turn(message: Message) -> None:
    """ShareGPT's turn that is a call, or several, in JSON; other text stays as it is."""
    content = message.get("content")
    found = from_json(content) if isinstance(content, str) else content
    calls = found if isinstance(found, list) else [found]
    if calls and all(isinstance(call, Mapping) and "name" in call for call in calls):
        message["tool_calls"], message["content"] = calls, None


def _read_parts(message: Message, where: str) -> None:
    """Content as a list of parts: text is joined, reasoning and calls get their keys; images are refused."""
    parts = message.get("content")
    if isinstance(parts, Mapping) and "type" in parts:
        parts = [parts]
    if not isinstance(parts, list) or (message["role"] == "tool" and not all(_is_part(part) for part in parts)):
        return
    text: list[str] = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, Mapping):
            raise ValueError(f"{where}: a part of 'content' is {kind(part)}, expected an object with 'type' and 'text'")
        name = str(part.get("type", "text"))
        if any(media in name for media in _MEDIA):
            raise ValueError(f"{where}: a part of 'content' is {name!r}: only text is supported; leave such rows out")
        said = next((part[key] for key in (name, "text", "value", "content", "thinking") if key in part), None)
        if name in ("tool_call", "tool_calls") and said is not None:
            said = from_json(said) if isinstance(said, str) else said
            message["tool_calls"] = [*message.get("tool_calls", []), *(said if isinstance(said, list) else [said])]
        elif name in ("reasoning", "thinking") and isinstance(said, str):
            message["reasoning_content"] = message.get("reasoning_content", "") + said
        elif name in ("text", "input_text", "output_text") and isinstance(said, str):
            text.append(said)
        else:
            raise ValueError(f"{where}: a part of 'content' is {name!r} without text: only text is supported")
    message["content"] = "".join(text)


def _is_part(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, Mapping) and "type" in part)


def _read_calls(message: Message, where: str) -> None:
    """Tool calls in OpenAI's form, with arguments as objects."""
    legacy = message.pop("function_call", None)
    calls = message.pop("tool_calls", None)
    calls = from_json(calls) if isinstance(calls, str) and calls.strip() else calls
    calls = [calls] if isinstance(calls, Mapping) else calls or ([legacy] if legacy else None)
    if not calls:
        return
    if not isinstance(calls, list):
        raise ValueError(f"{where}: 'tool_calls' is {kind(calls)}, expected a list")
    message["tool_calls"] = [_call(call, where) for call in calls]


def _call(call: Any, where: str) -> Message:
    call = from_json(call) if isinstance(call, str) else call
    if not isinstance(call, Mapping):
        raise ValueError(f"{where}: a tool call is {kind(call)}, expected an object with 'name' and 'arguments'")
    function = call.get("function")
    if isinstance(function, Mapping):
        function, beside = dict(function), {key: value for key, value in call.items() if key != "function"}
    else:
        beside = {key: value for key, value in call.items() if key in ("type", "id")}
        function = {key: value for key, value in call.items() if key not in beside}
        function |= {"name": function["function"]} if "function" in function else {}
    if "name" not in function:
        raise ValueError(f"{where}: a tool call has no 'name'")
    arguments = function.setdefault("arguments", function.pop("parameters", {}))
    read = from_json(arguments) if isinstance(arguments, str) else None
    if isinstance(read, Mapping):
        function["arguments"] = read
    return {"type": "function", **beside, "function": function}


def _read_weight(message: Message, where: str) -> None:
    """Whether an assistant's message is learned, under the names that people have for it."""
    for key in _WEIGHTS:
        if key not in message:
            continue
        value = message.pop(key)
        if message["role"] != ASSISTANT:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"{where}: {key!r} is {value!r}, expected 0 or 1 (or true, false)")
        if not value:
            message["weight"] = 0


def _read_reasoning(message: Message, template: str) -> None:
    """Reasoning under the key that the template reads."""
    thought = next((message.pop(key) for key in _REASONING if key in message), None)
    if thought is not None:
        message[next((key for key in _REASONING if key in template), _REASONING[0])] = thought


def _write_objects(message: Message) -> None:
    """A tool's answer, or a call that stays text, that is not text: as JSON."""
    if isinstance(message.get("content"), Mapping | list | bool | int | float):
        message["content"] = json.dumps(message["content"], ensure_ascii=False)


def read_tools(value: Any, column: str = "tools", exact: bool = False) -> list[Message] | None:
    """Tools as templates read them, from a list or its JSON text, each in OpenAI's form; None for none.

    Raises:
        ValueError: not a list of objects.
    """
    given = value
    if isinstance(value, str):
        value, exact = from_json(value) if value.strip() else None, True
        if value is None and given.strip():
            raise ValueError(f"{column!r} is text that is not valid JSON: expected a list of tools")
    value = [value] if isinstance(value, Mapping) else value
    if not value:
        return None
    if not isinstance(value, list):
        raise ValueError(f"{column!r} is {kind(value)}, expected a list of tools")
    value = [from_json(tool) if isinstance(tool, str) else tool if exact else without_nulls(tool) for tool in value]
    return [_tool(tool, column) for tool in value]


def _tool(tool: Any, column: str) -> Message:
    if not isinstance(tool, Mapping):
        raise ValueError(f"{column!r} holds {kind(tool)}, expected objects with 'name' and 'parameters'")
    tool = dict(tool) if "function" in tool or "name" not in tool else {"type": "function", "function": dict(tool)}
    function = tool.get("function")
    if isinstance(function, Mapping) and isinstance(function.get("parameters"), str):
        tool["function"] = {**function, "parameters": from_json(function["parameters"])}
    return tool


def from_json(text: str) -> Any:
    """The value that a text holds in JSON, or in Python's own writing (pandas writes it); None where in neither."""
    with suppress(ValueError):
        return json.loads(text)
    text = text.strip()
    if text[:1] + text[-1:] in ("[]", "{}"):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError), warnings.catch_warnings(action="ignore"):
            return ast.literal_eval(text)
    return None


def without_nulls(value: Any) -> Any:
    """Without keys that hold nothing: Arrow gives every object the keys of all."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


_KINDS = {int: "a number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "an object"}


def kind(value: Any) -> str:
    """What a value is, in the words of a data file."""
    return "missing" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")
