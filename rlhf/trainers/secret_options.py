"""Tokens and passwords among options: no file of a run and no tracker gets them."""

import copy
from typing import Any

from rlhf.data.http_client import shown_address
from rlhf.secret_names import MASK, VOCABULARY, is_secret, without_hub_tokens


def without_secrets(value: Any, name: str = "") -> Any:
    """Replace tokens and passwords by ``***``, and cut addresses down to host and path.

    Args:
        value: an option; a dictionary, a list or a tuple is searched.
        name: of the option, or the key of a dictionary, which tells a token.
    Returns:
        The value, or a copy where it has a secret.
    """
    if isinstance(value, str):
        return MASK if value and is_secret(name) else without_hub_tokens(shown_address(value))
    # No subclasses, which may be made in another way.
    if type(value) is dict:
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_secrets(item, name) for item in value)
    return value


class SecretOptions:
    """A configuration whose secrets stay in memory: what is written, printed or pickled has none."""

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, for trackers; without secrets, and with the tokens of the vocabulary."""
        options = super().to_dict()  # type: ignore[misc]  # of TrainingArguments
        # transformers hides whatever is called a token.
        options |= {name: getattr(self, name) for name in VOCABULARY if name in options}
        return without_secrets(options)

    def __str__(self) -> str:
        options = "".join(f"{name}={value},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{options})"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Set on each class: `dataclass` writes one that prints all fields where a class has none.
        cls.__repr__ = SecretOptions.__str__  # type: ignore[assignment,method-assign]

    def __getstate__(self) -> dict[str, Any]:
        """For ``training_args.bin``."""
        return without_secrets(self.__dict__)

    # A copy in memory stays whole.

    def __copy__(self) -> "SecretOptions":
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> "SecretOptions":
        clone = object.__new__(type(self))
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone
