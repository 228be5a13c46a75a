"""Options from a YAML file and the command line, into data classes; and their help."""

from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from rlhf.cli.options import RaisingParser, check_options, expand_aliases, read_config
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.ranges import annotation

TRAINING = "training"  # title of the options that all trainers have
# Options of transformers that nearly every run sets.
COMMON = frozenset(
    {
        "output_dir",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
    }
)
# Options that are text on the command line, and may be a mapping in a file.
_MAPPINGS = ("columns", "roles", "chat_template_kwargs")
# Options that belong to one call: a file that repeats a run does not have them.
_HOW = ("config", "resume", "resume_from_checkpoint", "overwrite", "allow_changes")


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Each option once, with a value by its type: ``--lora_r INT``. Dashes for underscores work, and are not shown."""

    def _format_action_invocation(self, action: Action) -> str:
        # The second spelling of an option has dashes; argparse would show both.
        name = action.option_strings[0]
        if action.dest in ("help", "config"):
            return super()._format_action_invocation(action)
        if action.type is string_to_bool:
            return f"{name} [true|false]"
        if action.choices is not None:
            value = "{" + ",".join(map(str, action.choices)) + "}"
        elif action.type in (int, float):
            value = action.type.__name__.upper()
        else:
            value = "TEXT"
        return f"{name} {value} ..." if action.nargs == "+" else f"{name} {value}"

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        # None says nothing; what happens then is in the text.
        if action.default in (None, SUPPRESS) or "%(default)" in text:
            return text
        return f"{text} (default: %(default)s)"


class _OptionParser(RaisingParser, HfArgumentParser):
    """transformers' parser of data classes, raising where it would end the program."""


def parse(command: str, classes: Sequence[Any], argv: list[str]) -> tuple[Any, ...]:
    """Fill data classes from ``--config`` and then from the command line, which wins.

    Args:
        command: name of the command, for the help.
        classes: data classes; their fields are the options.
        argv: words of the command line, after the command.

    Returns:
        An instance of each class, in their order.

    Raises:
        ValueError: an unknown option or key (with the nearest known one), or a value that does not fit.
    """
    parser, argv, file_values = _read(command, classes, argv)
    # As defaults, so that the command line wins.
    parser.set_defaults(**file_values)
    *parsed, _, remaining = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    if remaining:
        raise ValueError(f"unknown option {remaining[0]}")
    return tuple(parsed)


def given_options(command: str, classes: Sequence[Any], argv: list[str]) -> dict[str, Any]:
    """The options that a command was given, as ``--config`` takes them.

    Args:
        command: name of the command.
        classes: data classes; their fields are the options.
        argv: words of the command line, after the command; :func:`parse` has accepted them.

    Returns:
        Values by the names of their options, in the order of the classes.
    """
    parser, argv, file_values = _read(command, classes, argv)
    for action in parser._actions:
        action.default = SUPPRESS
    parser.set_defaults(**file_values)
    given, _ = parser.parse_known_args(argv)
    return {name: value for name, value in vars(given).items() if name not in _HOW}


def _read(command: str, classes: Sequence[Any], argv: list[str]) -> tuple[HfArgumentParser, list[str], dict[str, Any]]:
    """The parser, the words with full names, and the values of the file as if they were typed."""
    parser = _make_parser(command, classes)
    known_names = frozenset(option.name for cls in classes for option in fields(cls) if option.init)
    # The commands did the next two already. Scripts of users, which call this alone, did not.
    argv = expand_aliases(argv, known_names)
    file = check_options(argv, known_names | {"config", "help"})
    if file is None:
        return parser, argv, {}
    kinds = {option.name: annotation(cls, option.name) for cls in classes for option in fields(cls)}
    return parser, argv, _as_typed(file, read_config(file, known_names), parser, kinds)


def _make_parser(command: str, classes: Sequence[Any]) -> HfArgumentParser:
    # Words that come first without an option, as a class of options names them.
    words = [f"rlhf {command}", *(cls.positional for cls in classes if hasattr(cls, "positional"))]
    parser = _OptionParser(
        list(classes),
        prog=f"rlhf {command}",
        usage=f"{' '.join(words)} [--config FILE] [--OPTION VALUE ...]",
        epilog="Short names: --model, --data, --lr, --epochs. In a config file, use the whole names.",
        # An abbreviation would be guessed, and could mean another option in a later version.
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options; the command line wins.")
    for action in parser._actions:
        # A switch that is None by default needs no value either.
        if action.type is string_to_bool and action.nargs is None:
            action.nargs = "?"
            action.const = True
    _sort_help(parser, command, classes)
    return parser


def _as_typed(file: str, values: dict[str, Any], parser: HfArgumentParser, kinds: dict[str, str]) -> dict[str, Any]:
    """Values of a YAML file as if they were typed on the command line: argparse then converts and checks them.

    Args:
        file: its name, for messages.
        values: by the names of their options.
        parser: has an action for each option.
        kinds: the annotations of the options.
    """
    actions = {action.dest: action for action in parser._actions}
    typed: dict[str, Any] = {}
    for key, value in values.items():
        action, place = actions[key], f"{file}: {key!r}"
        # Shares of a mixture may be a dictionary: {a.jsonl: 0.7, b.jsonl: 0.3}.
        if isinstance(value, dict) and key.endswith("dataset_name"):
            value = [f"{name}:{share}" for name, share in value.items()]
        if isinstance(value, list) and key in ("columns", "roles"):
            value = ",".join(map(str, _scalars(place, value)))
        if value is None and "None" not in kinds[key]:
            raise ValueError(f"{place} is empty: give a value, or delete the line")
        if value is None or (isinstance(value, dict) and ("dict" in kinds[key] or key in _MAPPINGS)):
            typed[key] = value
        elif action.nargs in ("+", "*"):
            items = _scalars(place, value if isinstance(value, list) else [value])
            typed[key] = [_converted(place, item, action) for item in items]
        elif isinstance(value, list):
            raise ValueError(f"{place} takes one value, got a list")
        else:
            (scalar,) = _scalars(place, [value])
            _check_choice(place, scalar, action)
            # argparse converts and checks a default only where it is text.
            typed[key] = str(scalar)
    return typed


def _scalars(place: str, values: list[Any]) -> list[Any]:
    """The same values; refused where one is nothing that could be typed, such as a dictionary or a date."""
    for value in values:
        if not isinstance(value, str | bool | int | float):
            kind = "null" if value is None else f"a {type(value).__name__}"
            raise ValueError(f"{place} has {kind}, expected text or a number; put text into quotes")
    return values


def _converted(place: str, value: Any, action: Action) -> Any:
    """An entry of a list, which argparse does not convert."""
    _check_choice(place, value, action)
    convert: Any = action.type or str
    try:
        return convert(str(value))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _check_choice(place: str, value: Any, action: Action) -> None:
    """argparse does not compare a default with the choices."""
    choices = [str(choice) for choice in action.choices or []]
    if choices and str(value) not in choices:
        # YAML reads a bare no as false.
        hint = ' (write "no" in quotes)' if value is False and "no" in choices else ""
        raise ValueError(f"{place} must be one of {', '.join(choices)}, got {value!r}{hint}")


def _sort_help(parser: HfArgumentParser, command: str, classes: Sequence[Any]) -> None:
    """Sort the options of the help by subject: those of the command first, what transformers brings last."""
    command_title, inherited = f"options of rlhf {command}", "inherited from transformers.TrainingArguments"
    titles = {"help": command_title, "config": command_title}
    for cls in classes:
        for option in fields(cls):
            titles[option.name] = getattr(cls, "title", None) or _title_in_config(option, command_title, inherited)
    subjects = [title for title in dict.fromkeys(titles.values()) if title not in (command_title, TRAINING, inherited)]
    # argparse has no public way to move an option to another group.
    for group in parser._action_groups:
        group._group_actions.clear()
    groups = {title: parser.add_argument_group(title) for title in (command_title, *subjects, TRAINING, inherited)}
    for action in parser._actions:
        # --no_NAME is left out: --NAME false is the same.
        if not action.option_strings[0].startswith("--no_"):
            groups[titles[action.dest]]._group_actions.append(action)


def _title_in_config(option: Field[Any], command_title: str, inherited: str) -> str:
    """The group of an option of a trainer's configuration: its own, that of all trainers, or transformers'."""
    shared = {field.name for field in fields(BaseConfig)}
    if option.name not in shared:
        return command_title
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    # An option that has another default here is worth a look, as one that is new.
    differs = option.name not in defaults or option.default != defaults[option.name]
    return TRAINING if differs or option.name in COMMON else inherited
