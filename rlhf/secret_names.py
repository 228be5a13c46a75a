"""Which options are secrets, by their names; imported before torch is."""

import re
from collections.abc import Sequence

MASK = "***"
VOCABULARY = ("eos_token", "pad_token", "bos_token", "unk_token", "mask_token", "sep_token", "cls_token")
_SECRET_NAME = re.compile(r"(token|password|secret|api_key|access_key|authorization)$", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_\w{16,}")


def is_secret(name: str) -> bool:
    """Whether an option, or a key of a dictionary, holds a secret.

    Args:
        name: With underscores.

    Returns:
        False for the tokens of a vocabulary, too.
    """
    return name not in VOCABULARY and _SECRET_NAME.search(name) is not None


def without_hub_tokens(text: str) -> str:
    """Replace tokens of the hub, wherever they stand.

    Args:
        text: Any text.

    Returns:
        The text with ``***`` in their places.
    """
    return _HUB_TOKEN.sub(MASK, text)


def without_secret_words(words: Sequence[str]) -> list[str]:
    """Replace secrets on a command line, which some trackers store.

    Args:
        words: Of the command line.

    Returns:
        As many words.
    """
    masked: list[str] = []
    follows_secret = False
    for word in words:
        name, equals, _ = word.partition("=")
        is_option = word.startswith("--")
        names_secret = is_option and is_secret(name.removeprefix("--").replace("-", "_"))
        if names_secret and equals:
            word = f"{name}={MASK}"
        elif follows_secret and not is_option:
            word = MASK
        follows_secret = names_secret and not equals
        masked.append(without_hub_tokens(word))
    return masked
