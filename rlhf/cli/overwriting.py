"""``--overwrite``: what a command wrote before is kept aside until the new files are whole."""

import re
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rlhf.trainers.checkpoint_files import MARK, checkpoints_by_step, read_mark

# What a run writes into its folder, besides the files that its mark lists.
WRITTEN_BY_RUN = (
    "checkpoint-[0-9]*", "base", "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template.jinja", "additional_chat_templates", "README.md", "training_args.bin", "trainer_state.json",
    "all_results.json", "completions.jsonl", "profile.json", "trace.json", "runs", "wandb", "trackio", MARK,
    "run.yaml", "metrics.jsonl", "samples.jsonl", "report.html",
)  # fmt: skip
_OLD = re.compile(r"\.old-(\d+)")
# Options whose value is a place to write to.
_OUTPUTS = {"output_dir", "logging_dir", "cache_dir", "rollout_weights_dir", "run_name", "project"}


def refuse_inputs_inside(folder: Path, options: Mapping[str, Any]) -> None:
    """Refuse to overwrite a folder that holds what a command reads.

    Args:
        folder: the output folder.
        options: all options by name, with ``config``; a value that is the path of something that exists counts.

    Raises:
        ValueError: an input lies in the folder, or the folder holds the working directory.
    """
    if not folder.exists():
        return
    output = folder.resolve()
    if Path.cwd().is_relative_to(output):
        raise ValueError(f"{folder}: --overwrite of the working directory or a folder around it; choose another folder")
    for name, value in options.items():
        if name in _OUTPUTS:
            continue
        for text in _texts(value):
            # A reward function is given as FILE.py:NAME.
            path = Path(text.partition(".py:")[0] + ".py" if ".py:" in text else text).expanduser()
            if _exists(path) and path.resolve().is_relative_to(output):
                raise ValueError(f"{folder}: --overwrite would replace {text} (--{name}); choose another --output_dir")


def config_of(words: list[str]) -> str | None:
    """The file of options that a command line names.

    Args:
        words: of the command line.

    Returns:
        Its path as it was given; None without ``--config``.
    """
    for word, next_word in zip(words, [*words[1:], ""], strict=True):
        if word == "--config":
            return next_word
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None


def set_aside(folder: Path, patterns: Iterable[str]) -> Path | None:
    """Move what a command wrote into ``.old-N`` in its folder; other files stay where they are.

    Args:
        folder: the output folder.
        patterns: names of what the command writes.

    Returns:
        The folder that holds it now; None where there was nothing.

    Raises:
        OSError: it cannot be moved.
    """
    marked = set()
    if (folder / MARK).exists():
        try:
            marked = {Path(name).parts[0] for name in read_mark(folder)["files"]}
        except ValueError:  # a damaged mark lists nothing
            marked = set()
    patterns = tuple(patterns)
    entries = [
        path for path in folder.iterdir()
        if path.name in marked or any(fnmatch(path.name, pattern) for pattern in patterns)
    ]  # fmt: skip
    if not entries:
        return None
    numbers = [int(match[1]) for path in folder.iterdir() if (match := _OLD.fullmatch(path.name))]
    aside = folder / f".old-{max(numbers, default=0) + 1}"
    aside.mkdir()
    for path in entries:
        path.rename(aside / path.name)
    return aside


def delete_set_aside(folder: Path) -> None:
    """Delete what :func:`set_aside` moved, now that the new files are whole.

    Files that may be somebody else's, such as a ``completions.jsonl`` alone, stay.

    Args:
        folder: the output folder.
    """
    for path in folder.iterdir():
        if _OLD.fullmatch(path.name) and _is_known(path):
            shutil.rmtree(path, ignore_errors=True)


def is_set_aside(name: str) -> bool:
    """Whether an entry of an output folder was made by :func:`set_aside`.

    Args:
        name: of the entry.

    Returns:
        True for ``.old-N``.
    """
    return _OLD.fullmatch(name) is not None


def _is_known(folder: Path) -> bool:
    """Whether a folder holds what only a run or a teacher writes."""
    signs = ("training_args.bin", "teacher.json", MARK)
    return any((folder / name).exists() for name in signs) or bool(checkpoints_by_step(folder))


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) and value else []


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or with a null character
        return False
