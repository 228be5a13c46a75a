"""Limits of time and of size for chat templates, which come from the folder of a model.

``transformers`` compiles a template in a sandbox of Jinja: no code of Python runs, but a template may loop or grow
without end. Here each rendering has a budget of characters, and a limit of processor time.
"""

import re
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

MAX_SOURCE = 2**20  # characters of a template; those of known models have at most 30,000
MAX_CHARACTERS = 2**27  # of all texts that one rendering makes on its way
MAX_OUTPUT = 2**24  # characters of a rendering: about four million tokens
MAX_BITS = 4096  # of a whole number
MAX_WIDTH = 10_000  # that a text is padded or indented to
MAX_SECONDS = 5  # of processor time; a rendering takes about a thousandth of one

_PADDING_METHODS = ("center", "expandtabs", "format", "ljust", "rjust", "zfill")
_PADDING_FILTERS = ("batch", "center", "format", "indent", "slice", "tojson", "wordwrap")
_WIDE_FORMAT = re.compile(r"\d{5,}|\*")  # a width or a precision in a format, or one that comes with the values
_METHODS = (*_PADDING_METHODS, "format_map", "join", "replace")  # of a text, that may make a long one
_JOIN = "join_values"  # the filter that stands for Jinja's operator ~


class TemplateLimitError(SecurityError):
    """A template needs more time or more text than a rendering may."""


class _Budget(threading.local):
    """Characters that the rendering of this thread may still make."""

    left = MAX_CHARACTERS

    def spend(self, characters: int) -> None:
        if characters > self.left:
            raise TemplateLimitError(f"it makes more than {MAX_CHARACTERS:,} characters of text")
        self.left -= characters


_BUDGET = _Budget()


def limit_templates() -> None:
    """Let ``transformers`` compile all chat templates of this process with the limits of this file."""
    # `apply_chat_template` takes no environment, so its compiler is replaced; reward functions call it too.
    chat_template_utils._compile_jinja_template = _compile


@lru_cache
def _compile(source: str) -> Template:
    """A template that counts what it makes.

    Raises:
        TemplateError: The text is no template.
    """
    if len(source) > MAX_SOURCE:
        raise TemplateLimitError(f"it has {len(source):,} characters, and a template may have {MAX_SOURCE:,}")
    # An environment of its own for each template, with the filters and functions of transformers.
    environment = chat_template_utils._cached_compile_jinja_template("").environment
    environment.__class__ = _LimitedEnvironment
    environment.concat = _concatenate
    environment.filters = {name: _limited_filter(name, call) for name, call in environment.filters.items()}
    environment.filters[_JOIN] = _join_values
    environment.globals.pop("lipsum", None)  # makes as much text as it is asked for
    try:
        # Jinja computes constants while it compiles.
        with _limits():
            template = environment.from_string(source)
    except (RecursionError, MemoryError, SyntaxError) as error:
        raise TemplateError(f"it is nested too deeply ({type(error).__name__})") from error
    template.root_render_func = _limited_rendering(template.root_render_func)
    return template


class _LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of Jinja, where operators, calls and filters spend from the budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operator(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        if operator == "+":
            _BUDGET.spend(_size(result))
        return result

    # Jinja's own names of the arguments: a template may pass `context=` to a macro.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(__obj, "__name__", None) in _METHODS:
            args = tuple(map(_whole, args))
            _check_method(__obj, [*args, *kwargs.values()])
        result = super().call(__context, __obj, *args, **kwargs)
        _BUDGET.spend(_size(result))
        return result

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_JoinByFilter().visit(source), *args, **kwargs)


class _JoinByFilter(NodeTransformer):
    """Write ``a ~ b`` as a filter: Jinja lets nobody intercept this operator."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        place = {"lineno": node.lineno, "environment": node.environment}
        return nodes.Filter(nodes.List(node.nodes, **place), _JOIN, [], [], None, None, **place)


def _concatenate(parts: Any) -> str:
    """What the body of a macro or of a block yields, as one text."""
    # Another iterator is a whole rendering, which counts for itself.
    if isinstance(parts, list):
        _BUDGET.spend(sum(map(len, parts)))
    return "".join(parts)


def _join_values(values: list[Any]) -> str:
    """The operator ``~``; no longer than what was counted before, times the number of values in the source."""
    text = "".join(map(str, values))
    _BUDGET.spend(len(text))
    return text


def _limited_filter(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja, within the budget."""
    # Jinja passes some filters the environment or the context before the value.
    value_at = 1 if hasattr(call, "jinja_pass_arg") else 0

    @wraps(call)
    def limited(*args: Any, **kwargs: Any) -> Any:
        whole_args = [_whole(argument) for argument in args]
        value, others = whole_args[value_at], [*whole_args[value_at + 1 :], *kwargs.values()]
        if name in _PADDING_FILTERS:
            _check_widths(value, others)
        if name == "format":
            _check_format(str(value))
        elif name == "replace":
            _check_replacement(str(value), others)
        elif name == "join":
            _check_join(others, value)
        result = call(*whole_args, **kwargs)
        _BUDGET.spend(_size(result))
        return result

    return limited


def _limited_rendering(render: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
    """The function of a compiled template that yields its text, with all limits."""
    took_too_long = False

    def limited(context: Context) -> Iterator[str]:
        nonlocal took_too_long
        # Once is enough: a command that goes on after a bad row would wait for each.
        if took_too_long:
            raise _too_long()
        num_characters = 0
        try:
            with _limits():
                for text in render(context):
                    num_characters += len(text)
                    if num_characters > MAX_OUTPUT:
                        raise TemplateLimitError(f"its rendering has more than {MAX_OUTPUT:,} characters")
                    yield text
        except _TooLongError as error:
            took_too_long = True
            raise _too_long() from error

    return limited


class _TooLongError(Exception):
    """Raised by the signal of the timer."""


def _too_long() -> TemplateLimitError:
    return TemplateLimitError(f"it takes more than {MAX_SECONDS} seconds of processor time")


@contextmanager
def _limits() -> Iterator[None]:
    """A whole budget and a timer for what runs inside."""
    budget_before, _BUDGET.left = _BUDGET.left, MAX_CHARACTERS
    # Only the main thread gets signals; workers that tokenise are processes. Windows has no such timer.
    has_timer = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if has_timer:
        # Processor time: a machine that is busy or asleep stops no rendering.
        handler_before = signal.signal(signal.SIGVTALRM, _raise_too_long)
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        yield
    finally:
        if has_timer:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler_before)
        _BUDGET.left = budget_before


def _raise_too_long(signal_number: int, frame: Any) -> None:
    raise _TooLongError


# What an operation will make, before it is made


def _check_operator(operator: str, left: Any, right: Any) -> None:
    are_numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "%" and isinstance(left, str):
        _check_format(left)
    elif operator == "**" and are_numbers:
        _check_bits(left.bit_length() * max(right, 0))
    elif operator == "*" and are_numbers:
        _check_bits(left.bit_length() + right.bit_length())
    elif operator == "*":
        # A text or a list times a number, in any order.
        count = left if isinstance(left, int) else right
        if isinstance(count, int):
            _BUDGET.spend(max(_size(left), _size(right)) * max(count, 0))


def _check_bits(num_bits: int) -> None:
    if num_bits > MAX_BITS:
        raise TemplateLimitError(f"it computes a whole number of more than {MAX_BITS} bits")


def _check_method(method: Any, arguments: list[Any]) -> None:
    # The sandbox wraps `format`.
    text = getattr(getattr(method, "__wrapped__", method), "__self__", None)
    if not isinstance(text, str):
        return
    if method.__name__ in _PADDING_METHODS:
        _check_widths(text, arguments)
    if method.__name__ in ("format", "format_map"):
        _check_format(text)
    elif method.__name__ == "replace":
        _check_replacement(text, arguments)
    elif method.__name__ == "join" and arguments:
        _check_join([text], arguments[0])


def _check_format(text: str) -> None:
    wide = _WIDE_FORMAT.search(text) if "%" in text or "{" in text else None
    if wide is not None:
        raise TemplateLimitError(f"a format pads to more than {MAX_WIDTH:,} characters ({wide.group()[:20]})")


def _check_widths(value: Any, arguments: list[Any]) -> None:
    widths = [argument for argument in arguments if isinstance(argument, int)]
    if max(widths, default=0) > MAX_WIDTH:
        raise TemplateLimitError(f"it pads a text to more than {MAX_WIDTH:,} characters")
    _BUDGET.spend(_size(value) * max(widths, default=0))


def _check_replacement(text: str, arguments: list[Any]) -> None:
    if len(arguments) >= 2:
        old, new = str(arguments[0]), str(arguments[1])
        _BUDGET.spend(text.count(old) * len(new))


def _check_join(separators: list[Any], parts: Any) -> None:
    for separator in separators:
        if isinstance(separator, str):
            _BUDGET.spend(len(separator) * _size(parts))


def _whole(value: Any) -> Any:
    """What a filter such as ``map`` yields, as a list: its size has to be known."""
    return list(value) if isinstance(value, Generator) else value


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 1
