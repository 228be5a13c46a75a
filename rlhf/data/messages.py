"""Messages of a conversation: the many forms that people write, brought to the one that chat templates read."""

import ast
import json
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

Message = dict[str, Any]
Turns = str | list[Message]  # plain text, or a conversation
ASSISTANT = "assistant"

# Names of roles in public data sets, and the role that chat templates know.
_CALL_ROLES = ("function_call", "tool_call")  # ShareGPT: an assistant's turn whose content is a call
_USER_ROLES = ("user", "human", "prompter")
_ASSISTANT_ROLES = ("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "ai", "chatbot", *_CALL_ROLES)
_TOOL_ROLES = ("tool", "observation", "function", "function_response", "tool_response", "tool_result")
_ROLES = {
    **dict.fromkeys(_USER_ROLES, "user"),
    **dict.fromkeys(_ASSISTANT_ROLES, ASSISTANT),
    **dict.fromkeys(_TOOL_ROLES, "tool"),
    "system": "system",
    "developer": "developer",
}
# Each toolkit has another word for it: OpenAI's files `weight`, axolotl's `training`.
_WEIGHT_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight", "mask")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_MEDIA = ("image", "video", "audio")


def as_messages(
    value: Iterable[Any], column: str, roles: Mapping[str, str] | None = None, template: str = "", exact: bool = False
) -> list[Message]:
    """Bring messages to ``role``, ``content`` and the further keys that templates read.

    An assistant's message that is not trained has ``"weight": 0``.

    Args:
        value: Messages, or exchanges with ``input`` and ``output``.
        column: The column that holds them, for error messages.
        roles: Further names of roles, each with the role that it stands for.
        template: The chat template. Reasoning gets the key that it reads. A call that is written as text stays text if
            it reads no calls.
        exact: Whether nulls inside the values were written by the user. Otherwise they come from Arrow and are removed.

    Returns:
        New messages; ``value`` is not changed.

    Raises:
        ValueError: A message is malformed; the error names it.
    """
    messages: list[Message] = []
    for message_number, turn in enumerate(value, start=1):
        location = f"{column!r}, message {message_number}"
        if not isinstance(turn, Mapping):
            raise ValueError(f"{location} is {describe_type(turn)}, expected an object with 'role' and 'content'")
        # A key without a value is no key, in any file format.
        given_values = {key: item for key, item in turn.items() if item is not None}
        message = given_values if exact else without_nulls(given_values)
        if _is_exchange(message):
            question = {"role": "user", "content": message["input"]}
            answer = {"role": ASSISTANT, "content": message["output"]}
            messages += [_normalise(part, location, {}, template) for part in (question, answer)]
        else:
            messages.append(_normalise(message, location, roles or {}, template))
    return messages


def _is_exchange(message: Message) -> bool:
    """Whether a message is a question and its answer (Capybara)."""
    return {"input", "output"} <= message.keys() and not {"role", "from"} & message.keys()


def _normalise(message: Message, location: str, roles: Mapping[str, str], template: str) -> Message:
    """Bring one message to the common form; changes and returns ``message``."""
    _rename_sharegpt_keys(message)
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{location} has no 'role'")
    # Names are compared in lower case; an unknown role stays as it is written, as the template may know it.
    given_role = roles.get(message["role"], message["role"]).strip()
    is_call_turn = given_role.lower() in _CALL_ROLES
    message["role"] = _ROLES.get(given_role.lower(), given_role)

    if is_call_turn and "tool_calls" in template:
        _read_call_turn(message)
    _join_parts(message, location)  # parts may hold calls and reasoning, so they come before these
    _read_calls(message, location)
    _read_weight(message, location)
    if message["role"] == ASSISTANT:
        _rename_reasoning(message, template)
    if is_call_turn or message["role"] == "tool":
        _write_content_as_json(message)
    _check_content(message, location)
    return message


def _rename_sharegpt_keys(message: Message) -> None:
    for sharegpt_key, key in (("from", "role"), ("value", "content")):
        if key not in message and sharegpt_key in message:
            message[key] = message.pop(sharegpt_key)


def _check_content(message: Message, location: str) -> None:
    content = message.get("content")
    if content is None and "tool_calls" in message:
        message["content"] = None  # templates test `content is none`: the key must be there
        return
    if not isinstance(content, str):
        raise ValueError(f"{location}: 'content' is {describe_type(content)}, expected text")
    if message["role"] != ASSISTANT or "tool_calls" in message:
        return
    # An answer that is not trained may be empty: some data sets mask their failed answers so.
    has_text = any(str(message.get(key, "")).strip() for key in ("content", *REASONING_KEYS))
    if not has_text and message.get("weight", 1):
        raise ValueError(f"{location}: the assistant's answer is empty")


def is_trained(message: Message) -> bool:
    """Whether a message is an answer that is trained: the assistant's, with a weight that is not 0."""
    return message["role"] == ASSISTANT and bool(message.get("weight", 1))


# Content


def _join_parts(message: Message, location: str) -> None:
    """Join content that is a list of parts: text to one text, reasoning and calls under their own keys."""
    content_parts = message.get("content")
    if isinstance(content_parts, Mapping) and "type" in content_parts:
        content_parts = [content_parts]
    if not isinstance(content_parts, list):
        return
    if message["role"] == "tool" and not all(map(_is_part, content_parts)):
        return  # a tool's result that is a list, not a list of parts
    part_texts: list[str] = []
    for part in content_parts:
        _read_part({"type": "text", "text": part} if isinstance(part, str) else part, message, part_texts, location)
    # Nothing between the parts: templates that read parts write them one after the other.
    message["content"] = "".join(part_texts)


def _is_part(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, Mapping) and "type" in part)


def _read_part(part: Any, message: Message, texts: list[str], location: str) -> None:
    """Add one part of a content to ``texts``, or to the key of ``message`` that it belongs to."""
    prefix = f"{location}: a part of 'content' is"
    if not isinstance(part, Mapping):
        raise ValueError(f"{prefix} {describe_type(part)}, expected an object with 'type' and 'text'")
    part_type = str(part.get("type", "text"))
    if any(media_type in part_type for media_type in _MEDIA):
        raise ValueError(f"{prefix} {part_type!r}: only text is supported; leave such rows out")

    # The key that is named like the type comes first: {"type": "thinking", "thinking": ...}.
    value_keys = (part_type, "text", "value", "content", "thinking")
    part_value = next((part[value_key] for value_key in value_keys if value_key in part), None)
    if part_type in ("tool_call", "tool_calls") and part_value is not None:
        tool_calls = from_json(part_value) if isinstance(part_value, str) else part_value
        tool_calls = tool_calls if isinstance(tool_calls, list) else [tool_calls]
        message["tool_calls"] = [*message.get("tool_calls", []), *tool_calls]
    elif part_type in ("reasoning", "thinking") and isinstance(part_value, str):
        message["reasoning_content"] = message.get("reasoning_content", "") + part_value
    elif part_type in ("text", "input_text", "output_text") and isinstance(part_value, str):
        texts.append(part_value)
    else:
        raise ValueError(f"{prefix} {part_type!r} without text: only text is supported")


def _rename_reasoning(message: Message, template: str) -> None:
    """Move reasoning to the key that the template reads."""
    reasoning = next((message.pop(key) for key in REASONING_KEYS if key in message), None)
    if reasoning is not None:
        key_of_template = next((key for key in REASONING_KEYS if key in template), REASONING_KEYS[0])
        message[key_of_template] = reasoning


def _write_content_as_json(message: Message) -> None:
    if isinstance(message.get("content"), Mapping | list | bool | int | float):
        message["content"] = json.dumps(message["content"], ensure_ascii=False)


def _read_weight(message: Message, location: str) -> None:
    """Read whether an assistant's message is trained, under any of the usual keys."""
    for weight_key in _WEIGHT_KEYS:
        if weight_key not in message:
            continue
        weight = message.pop(weight_key)
        # Other turns are never trained; some files still give each message a weight.
        if message["role"] != ASSISTANT:
            continue
        # A fraction cannot be kept: a label can only score a token or leave it out.
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise ValueError(f"{location}: {weight_key!r} is {weight!r}, expected 0 or 1 (or true, false)")
        if not weight:
            message["weight"] = 0


# Tool calls and tools


def _read_call_turn(message: Message) -> None:
    """Read ShareGPT's turn whose content is one call or several in JSON; any other text stays content."""
    content = message.get("content")
    parsed_content = from_json(content) if isinstance(content, str) else content
    tool_calls = parsed_content if isinstance(parsed_content, list) else [parsed_content]
    if tool_calls and all(isinstance(call, Mapping) and "name" in call for call in tool_calls):
        message["tool_calls"] = tool_calls
        message["content"] = None


def _read_calls(message: Message, location: str) -> None:
    """Bring tool calls to OpenAI's form, with arguments as objects."""
    # OpenAI's older form, of a single call.
    legacy_call = message.pop("function_call", None)
    tool_calls = message.pop("tool_calls", None)
    if isinstance(tool_calls, str) and tool_calls.strip():
        tool_calls = from_json(tool_calls)
    if isinstance(tool_calls, Mapping):
        tool_calls = [tool_calls]
    if not tool_calls and legacy_call:
        tool_calls = [legacy_call]
    if not tool_calls:
        return
    if not isinstance(tool_calls, list):
        raise ValueError(f"{location}: 'tool_calls' is {describe_type(tool_calls)}, expected a list")
    message["tool_calls"] = [_normalise_call(call, location) for call in tool_calls]


def _normalise_call(call: Any, location: str) -> Message:
    call = from_json(call) if isinstance(call, str) else call
    if not isinstance(call, Mapping):
        raise ValueError(
            f"{location}: a tool call is {describe_type(call)}, expected an object with 'name' and 'arguments'"
        )
    if isinstance(call.get("function"), Mapping):  # OpenAI's form
        function = dict(call["function"])
        call_keys = {key: value for key, value in call.items() if key != "function"}
    else:  # a flat call: name and arguments beside type and id
        call_keys = {key: value for key, value in call.items() if key in ("type", "id")}
        function = {key: value for key, value in call.items() if key not in call_keys}
        if "function" in function:
            function["name"] = function["function"]
    if "name" not in function:
        raise ValueError(f"{location}: a tool call has no 'name'")
    # Llama 3 writes a call's arguments under the name that their schema has.
    parameters = function.pop("parameters", {})
    arguments = function.setdefault("arguments", parameters)
    # OpenAI gives arguments as JSON text; templates of open models loop over an object.
    if isinstance(arguments, str) and isinstance(parsed_arguments := from_json(arguments), Mapping):
        function["arguments"] = parsed_arguments
    return {"type": "function", **call_keys, "function": function}


def read_tools(value: Any, column: str = "tools", exact: bool = False) -> list[Message] | None:
    """Bring tools to OpenAI's form, as templates read them.

    Args:
        value: A list of tools, one tool, or the JSON text of either.
        column: The column that holds them, for error messages.
        exact: As in :func:`as_messages`.

    Returns:
        One object for each tool; None without tools.

    Raises:
        ValueError: ``value`` is no list of objects.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        value, exact = from_json(value), True
        if value is None:
            raise ValueError(f"{column!r} is text that is not valid JSON: expected a list of tools")
    if isinstance(value, Mapping):
        value = [value]
    if not value:
        return None
    if not isinstance(value, list):
        raise ValueError(f"{column!r} is {describe_type(value)}, expected a list of tools")
    return [_normalise_tool(tool, column, exact) for tool in value]


def _normalise_tool(tool: Any, column: str, exact: bool) -> Message:
    if isinstance(tool, str):
        tool = from_json(tool)
    elif not exact:
        tool = without_nulls(tool)
    if not isinstance(tool, Mapping):
        raise ValueError(f"{column!r} holds {describe_type(tool)}, expected objects with 'name' and 'parameters'")
    is_flat = "name" in tool and "function" not in tool
    openai_tool = {"type": "function", "function": dict(tool)} if is_flat else dict(tool)
    function = openai_tool.get("function")
    # Schemas of different tools have different keys, so some files hold them as JSON text.
    if isinstance(function, Mapping) and isinstance(function.get("parameters"), str):
        openai_tool["function"] = {**function, "parameters": from_json(function["parameters"])}
    return openai_tool


# Values of a data file


def from_json(text: str) -> Any:
    """Parse text as JSON, or as a Python literal (pandas writes objects so).

    Args:
        text: Any text.

    Returns:
        The value, or None if the text is neither.
    """
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    text = text.strip()
    if text[:1] + text[-1:] in ("[]", "{}"):
        # Python warns of invalid escapes in any text that it parses.
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError), warnings.catch_warnings(action="ignore"):
            return ast.literal_eval(text)
    return None


def without_nulls(value: Any) -> Any:
    """Remove keys without a value, at every depth. Arrow gives every object the keys of all objects in its column."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


_TYPE_NAMES = {
    int: "a number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "an object",
}


def describe_type(value: Any) -> str:
    """Name the type of a value in the words of a data file, for error messages."""
    if value is None:
        return "missing"
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")
