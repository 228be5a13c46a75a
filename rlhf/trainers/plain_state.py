"""A trainer's state as two files that run no code when they are read: JSON, and safetensors for its tensors."""

import base64
import json
from collections.abc import Callable
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_Tensors = dict[int, tuple[str, Tensor]]  # by id(), with the name in the file: an object is stored once

# Values that JSON does not have, as {tag: text}.
_TEXT_OF: dict[type, tuple[str, Callable[[Any], str]]] = {
    bytes: ("bytes", lambda value: base64.b64encode(value).decode("ascii")),
    datetime: ("datetime", datetime.isoformat),
    date: ("date", date.isoformat),
    time: ("time", time.isoformat),
    Decimal: ("decimal", str),
}
_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "bytes": base64.b64decode,
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "decimal": Decimal,
}


def save_state(file: Path, state: dict[str, Any]) -> None:
    """Write a state.

    Args:
        file: ends with ``.json``; tensors are in a file beside it, of the same name with ``.safetensors``.
        state: of numbers, text, tensors, and lists, tuples, sets and dicts of them.

    Raises:
        ValueError: it holds an object of another type.
    """
    tensors: _Tensors = {}
    content = _encoded(state, tensors, "state")
    file.write_text(json.dumps(content), encoding="utf-8")
    # safetensors refuses tensors that share memory, so each is copied.
    stored = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.values()}
    save_file(stored, file.with_suffix(".safetensors"))


def load_state(file: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote.

    Args:
        file: ends with ``.json``.

    Returns:
        The state, with its tensors in the memory of the CPU.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        tensors = load_file(file.with_suffix(".safetensors"))
        state = _decoded(content, tensors)
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, SafetensorError,
    ) as error:  # fmt: skip
        raise ValueError(f"{file}: damaged, or no state of a trainer ({error!r})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file}: no state of a trainer")
    return state


def _encoded(value: Any, tensors: _Tensors, place: str) -> Any:
    """A value as JSON has it; its tensors are added to ``tensors``, each object once."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name, _ = tensors.setdefault(id(value), (str(len(tensors)), value))
        return {"tensor": name}
    if isinstance(value, dict):
        # As pairs: keys of JSON are text, and a key could be taken for a tag.
        pairs = []
        for key, item in value.items():
            pairs.append([_encoded(key, tensors, place), _encoded(item, tensors, f"{place}.{key}")])
        return {"dict": pairs}
    if isinstance(value, list | tuple | set):
        items = [_encoded(item, tensors, place) for item in value]
        return items if isinstance(value, list) else {"tuple" if isinstance(value, tuple) else "set": items}
    if type(value) in _TEXT_OF:
        tag, to_text = _TEXT_OF[type(value)]
        return {tag: to_text(value)}
    raise ValueError(f"{place}: a {type(value).__name__} cannot be kept in a checkpoint; leave it out of the data")


def _decoded(content: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(content, list):
        return [_decoded(item, tensors) for item in content]
    if not isinstance(content, dict):
        return content
    ((tag, value),) = content.items()
    if tag == "tensor":
        return tensors[value]
    if tag == "dict":
        return {_decoded(key, tensors): _decoded(item, tensors) for key, item in value}
    if tag in ("tuple", "set"):
        items = [_decoded(item, tensors) for item in value]
        return tuple(items) if tag == "tuple" else set(items)
    return _FROM_TEXT[tag](value)
