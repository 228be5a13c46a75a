"""Every loss of the catalogue with arguments: those of the example in its docstring."""

import doctest
import sys
from dataclasses import fields, is_dataclass

import torch

from rlhf.losses.catalogue import entries

NO_TENSORS = ("AdaptiveKLController",)
ENTRIES = [entry for entry in entries() if entry.name not in NO_TENSORS]


def documented_call(entry):
    """The arguments with which the docstring's example calls the function."""
    calls = []
    name = entry.function.__name__

    def record(*args, **options):
        calls.append((args, options))
        return entry.function(*args, **options)

    module = sys.modules[entry.function.__module__]
    names = dict(vars(module), **{name: record})
    for example in doctest.DocTestParser().get_examples(entry.documentation):
        exec(compile(example.source, entry.name, "exec"), names)
    assert calls, f"the example of {entry.name} does not call {name}"
    return calls[0]


def tensors_in(value):
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    elif is_dataclass(value):
        value = tuple(getattr(value, field.name) for field in fields(value))
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [torch.tensor(value)] if isinstance(value, float) else []
