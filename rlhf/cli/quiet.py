"""Messages of other packages that tell a user nothing: left out of a command's output, each by its own words.

``--debug``, or the environment variable ``RLHF_DEBUG``, brings them back. A program that imports this package keeps
its configuration of warnings: only a command calls these functions.
"""

import logging
import os
import sys
import warnings

DEBUG_VARIABLE = "RLHF_DEBUG"
# The beginning of each warning, as a pattern, and its category.
WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # transformers' and PEFT's own use of names that are about to be dropped, and options that work as before.
    (r"`is_gradient_checkpointing` is deprecated", FutureWarning),
    (r"`gradient_checkpointing\w*` is deprecated", FutureWarning),
    # Each process of a group has one device.
    (r"barrier\(\): using the device under current context", UserWarning),
    # Offline, PEFT cannot ask whether the vocabulary of the base has grown; new tokens are saved anyway.
    (r"Could not find a config file in .* - will assume that the vocabulary was not modified", UserWarning),
)
# The beginning of each message, by the name of its logger.
MESSAGES: dict[str, tuple[str, ...]] = {
    "transformers.trainer_utils": ("The tokenizer has new PAD/BOS/EOS tokens",),
    "transformers.modeling_layers": ("Caching is incompatible with gradient checkpointing",),
    "transformers.generation.configuration_utils": ("The following generation flags are not valid",),
}


class _Without(logging.Filter):
    """Drops messages that begin with one of these texts."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().lstrip().startswith(self.beginnings)


def is_debugging(debug: bool) -> bool:
    """Whether all messages are wanted.

    Args:
        debug: whether the command has ``--debug``.

    Returns:
        True also where the environment variable is set.
    """
    return debug or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def leave_out_messages() -> None:
    """Leave out the warnings and messages of the tables, in this process."""
    for pattern, category in WARNINGS:
        warnings.filterwarnings("ignore", message=pattern, category=category)
    for name, beginnings in MESSAGES.items():
        messages_of = logging.getLogger(name)
        if not any(isinstance(old, _Without) for old in messages_of.filters):
            messages_of.addFilter(_Without(beginnings))


def leave_out_bars() -> None:
    """Leave out a bar for each file of weights, and all bars of other packages where nobody watches them.

    Nothing is imported for it: a package that a command does not use shows no bar.
    """
    is_watched = sys.stderr.isatty()
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        shows_downloads = is_watched and not are_progress_bars_disabled()
        if "transformers" in sys.modules:
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()  # those of downloads too
        if shows_downloads:
            enable_progress_bars()
        else:
            disable_progress_bars()
    if "datasets" in sys.modules and not is_watched:
        import datasets

        datasets.disable_progress_bars()
