"""What an option can name: a registered function, a callable, or ``file.py:name``."""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

Entry = TypeVar("Entry", bound=Callable[..., Any])


class Registry(dict[str, Entry], Generic[Entry]):
    """Functions of one kind by name.

    A decorator beside each function fills it. An option can also hold a callable, or ``file.py:name``. Both are
    remembered here under a text, so that a configuration holds text alone and can be written to a file.

    Args:
        option: the option of a trainer that is looked up here; it begins the errors.
        adapt: makes an entry of a callable that was not registered. Raises ValueError where that is impossible.
    """

    def __init__(self, option: str, adapt: Callable[[Any], Entry] = lambda function: function) -> None:
        super().__init__()
        self.option = option
        self._adapt = adapt
        # Apart from the registered entries: these belong to one run, and are not offered to others.
        self._given: dict[str, Entry] = {}

    def name_of(self, given: str | Callable[..., Any]) -> str:
        """The text that represents ``given`` in a configuration.

        Args:
            given: a registered name, ``file.py:name``, ``module:name``, or a callable.
        Returns:
            A name that :meth:`find` knows.
        Raises:
            ValueError: an unknown name, or a file that cannot be imported. FileNotFoundError: no such file.
        """
        if isinstance(given, str):
            self.find(given)
            return given
        if not callable(given):
            raise ValueError(f"{self.option} must be a name or a callable, got {given!r}")
        for name, entry in (self | self._given).items():
            # A decorated function is found by what it was before, too.
            if entry is given or getattr(entry, "__wrapped__", None) is given:
                return name
        name = f"{given.__module__}:{getattr(given, '__qualname__', type(given).__name__)}"
        if name in self._given:  # another function of the same name, such as a second lambda
            name = f"{name}#{len(self._given)}"
        self._given[name] = self._adapt(given)
        return name

    def find(self, name: str) -> Entry:
        """The function with a given name.

        Args:
            name: as :meth:`name_of` gives it.
        Returns:
            The registered function; a callable that was not registered is adapted first.
        Raises:
            ValueError: an unknown name, or a file that cannot be imported. FileNotFoundError: no such file.
        """
        if name in self:
            return self[name]
        if name not in self._given:
            if ":" not in name:
                raise ValueError(self._unknown(name))
            loaded = load_object(name, f"{self.option} {name!r}")
            # A decorator in the file has registered it already.
            self._given[name] = loaded if loaded in self.values() else self._adapt(loaded)
        return self._given[name]

    def _unknown(self, name: str) -> str:
        close_matches = difflib.get_close_matches(name, self, n=1)
        suggestion = f"; did you mean {close_matches[0]}?" if close_matches else ""
        return f"{self.option} {name!r} is unknown: one of {', '.join(self)}, or file.py:name{suggestion}"


def arguments_of(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that a function names.

    Args:
        function: its signature decides.
        offered: values by name.
    Returns:
        The part of ``offered`` that can be passed on as keywords.
    """
    named = inspect.signature(function).parameters
    return {name: value for name, value in offered.items() if name in named}


def load_object(name: str, what: str) -> Any:
    """What ``path/to/file.py:name``, ``package.module:name`` or ``package.module.name`` is.

    Args:
        name: a place and an attribute there.
        what: begins the errors.
    Returns:
        The attribute.
    Raises:
        ValueError: it cannot be imported, or there is nothing of that name. FileNotFoundError: no such file.
    """
    location, attribute = split_place(name)
    module = _import_file(what, location) if location.endswith(".py") else _import(what, location)
    if not hasattr(module, attribute):
        close_matches = difflib.get_close_matches(attribute, dir(module), n=1)
        suggestion = f"; did you mean {close_matches[0]}?" if close_matches else ""
        raise ValueError(f"{what}: no {attribute!r} in {module.__file__}{suggestion}")
    return getattr(module, attribute)


def split_place(name: str) -> tuple[str, str]:
    """``(file or module, attribute)`` of what :func:`load_object` takes; no file or module for a bare name."""
    location, _, attribute = name.rpartition(":") if ":" in name else name.rpartition(".")
    return location, attribute


def _import(what: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is missing inside the user's own module is another mistake than a wrong name.
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise ValueError(f"{what}: no module {error.name!r}; for a file write file.py:function") from error
        raise ValueError(f"{what}: importing {module} fails ({error})") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what}: importing {module} fails ({type(error).__name__}: {error})") from error


def _import_file(what: str, file: str) -> ModuleType:
    file_path = Path(file).expanduser().resolve()
    if not file_path.is_file():
        raise FileNotFoundError(f"{what}: {file}: no such file")
    # With a prefix: a user's file called json.py must not replace that module for everybody.
    module_spec = importlib.util.spec_from_file_location(f"_user_{file_path.stem}", file_path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # data classes in the file look themselves up
    try:
        module_spec.loader.exec_module(module)
    # A script that ends itself would end the training without a word.
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what}: running {file} fails ({type(error).__name__}: {error})") from error
    return module
