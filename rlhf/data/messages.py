"""One message of a conversation, as people write it, brought to what chat templates read."""

import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
ASSISTANT = "assistant"

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "ai", "chatbot", "answer"), ASSISTANT
    ),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "tool_result"), "tool"),
    "system": "system",
    "developer": "developer",
}
_CALLS = ("function_call", "tool_call")  # roles of an assistant's turn that is a call
_WEIGHTS = ("weight", "train", "loss", "loss_mask", "loss_weight", "trainable")
_KINDS = {int: "a number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "an object"}


def as_message(turn: Any, where: str, roles: Mapping[str, str], calls: bool) -> Message:
    """A message with ``role`` and ``content``, and what templates read besides; ``weight`` 0 where it is not learned.

    Args:
        roles: further names of roles. calls: whether the template reads ``tool_calls``.
    Raises:
        ValueError: begins with ``where``.
    """
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is {kind(turn)}, expected an object with 'role' and 'content'")
    message = without_nulls(turn)
    if "role" not in message and "from" in message:  # ShareGPT
        message["role"] = message.pop("from")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{where} has no 'role'")
    given = message["role"].strip()
    given = roles.get(given, given)
    role = _ROLES.get(given.lower(), given)
    if given.lower() in _CALLS:
        role, message = ASSISTANT, _call_turn(message, calls)
    message["role"] = role
    _read_parts(message, where)
    _read_calls(message, where)
    _read_weight(message, where)
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and "tool_calls" in message):
        raise ValueError(f"{where}: 'content' is {kind(content)}, expected text")
    said = any(str(message.get(key, "")).strip() for key in ("content", "reasoning_content"))
    if role == ASSISTANT and not message.get("tool_calls") and not said and message.get("weight", 1):
        raise ValueError(f"{where}: the assistant's answer is empty")
    return message


def _call_turn(message: Message, calls: bool) -> Message:
    """ShareGPT's turn that is a call: as a call where the template reads calls, else as the text that it is."""
    content = message.get("content")
    try:
        call = json.loads(content) if isinstance(content, str) else content
    except json.JSONDecodeError:
        return message
    listed = call if isinstance(call, list) else [call]
    if not calls or not all(isinstance(one, dict) and "name" in one for one in listed):
        return {**message, "content": content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)}
    return {**message, "content": "", "tool_calls": listed}


def _read_parts(message: Message, where: str) -> None:
    """Content as a list of parts: text is joined, reasoning gets its key; images and the like are refused."""
    parts = message.get("content")
    if isinstance(parts, dict):
        parts = [parts]
    if not isinstance(parts, list):
        return
    text: list[str] = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind_of = part.get("type", "text") if isinstance(part, dict) else kind(part)
        said = (
            next((part[key] for key in (kind_of, "text", "value", "content") if key in part), None)
            if isinstance(part, dict)
            else None
        )
        if kind_of in ("text", "input_text", "output_text") and isinstance(said, str):
            text.append(said)
        elif kind_of in ("reasoning", "thinking") and isinstance(said, str):
            message["reasoning_content"] = message.get("reasoning_content", "") + said
        elif kind_of in ("tool_call", "tool_calls") and said is not None:
            said = as_object(said, f"{where}: a tool call")
            message["tool_calls"] = [*message.get("tool_calls", []), *(said if isinstance(said, list) else [said])]
        else:
            raise ValueError(f"{where}: a part of 'content' is {kind_of!r}: only text is supported")
    message["content"] = "".join(text)


def _read_calls(message: Message, where: str) -> None:
    """Tool calls in OpenAI's form, with arguments as objects."""
    if isinstance(legacy := message.pop("function_call", None), dict):
        message["tool_calls"] = [legacy]
    if "tool_calls" not in message:
        return
    calls = as_object(message["tool_calls"], f"{where}: 'tool_calls'")
    if not isinstance(calls, list):
        raise ValueError(f"{where}: 'tool_calls' is {kind(calls)}, expected a list")
    if not calls:
        del message["tool_calls"]
        return
    found = []
    for call in calls:
        call = as_object(call, f"{where}: a tool call")
        if not isinstance(call, dict):
            raise ValueError(f"{where}: a tool call is {kind(call)}, expected an object with 'name' and 'arguments'")
        inner = call.get("function") if isinstance(call.get("function"), dict) else None
        function = dict(inner if inner is not None else {k: v for k, v in call.items() if k not in ("type", "id")})
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _arguments(function["arguments"])
        own = {k: v for k, v in call.items() if k in ("type", "id")} if inner is None else call
        found.append({"type": "function", **own, "function": function})
    message["tool_calls"] = found


def _arguments(text: str) -> Any:
    try:
        read = json.loads(text)
    except json.JSONDecodeError:
        return text
    return read if isinstance(read, dict) else text


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


def as_object(value: Any, name: str) -> Any:
    """What JSON text says; other values as they are; None for nothing."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name!r} is text that is not valid JSON ({error.msg} at character {error.pos + 1})"
        ) from None


def without_nulls(value: Any) -> Any:
    """Without keys that hold nothing: Arrow gives every row the keys of all."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def kind(value: Any) -> str:
    """What a value is, in the words of a data file."""
    return "missing" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")
