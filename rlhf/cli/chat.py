"""``rlhf chat``: talk to a model, or to two side by side."""

import contextlib
import json
import logging
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.cli.options import RaisingParser, underscored

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")


def run(argv: list[str]) -> None:
    """Chat in the terminal, or answer the lines of a file or pipe.

    Args:
        argv: words of the command line, after the command.

    Raises:
        ValueError, OSError: a bad option, no such model, or a model that cannot answer.
    """
    options = _parser().parse_args(underscored(argv))
    if len(options.models) > 2:
        raise ValueError(f"one model or two, got {len(options.models)}")
    for name in options.models:
        # Before torch is imported, which takes seconds.
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
            raise FileNotFoundError(f"{name}: no such model folder")
    tools = None if options.tools is None else _read_tools(Path(options.tools))
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if is_interactive:
        print(f"loading {' and '.join(options.models)} …", flush=True)
    chat = _make_chat(options, tools, is_interactive)
    if is_interactive:
        _talk(chat)
    else:
        _answer_lines(chat)


def _parser() -> RaisingParser:
    parser = RaisingParser(
        "rlhf chat",
        description="Talk to a model, or to two side by side. /help lists the commands inside. Without a terminal, "
        "each line of the input is a prompt.",
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder (model or adapter), or a hub name")
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--tools", metavar="FILE", help="a JSON file with a list of tools")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most likely token (default: 0.7)")
    parser.add_argument("--top_p", type=float, default=0.95, help="probability that is kept (default: 0.95)")
    parser.add_argument("--top_k", type=int, default=0, help="tokens that are kept; 0 keeps all (default: 0)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto is the checkpoint's")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code of the model's repository")
    return parser


def _read_tools(file: Path) -> list[Any]:
    from rlhf.data.messages import read_tools

    try:
        tools = read_tools(json.loads(file.read_text(encoding="utf-8")), "tools", exact=True)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no list of tools in JSON ({error})") from error
    if tools is None:
        raise ValueError(f"{file}: holds no tools")
    return tools


def _make_chat(options: Namespace, tools: list[Any] | None, is_interactive: bool) -> Any:
    # torch and transformers take seconds to import; wrong options are told before.
    from transformers.utils import logging as transformers_logging

    from rlhf.rollouts import Sampling
    from rlhf.serving import Chat, ChatModel, Display

    transformers_logging.disable_progress_bar()
    sampling = Sampling(
        temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, max_tokens=options.max_new_tokens
    )
    if options.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {options.seed}")
    kwargs = {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    if options.revision is not None:
        kwargs["revision"] = options.revision
    models = [ChatModel.load(name, **kwargs) for name in options.models]
    _name_apart(models, options.models)
    display = Display()
    for model in models:
        if is_interactive:
            display.note(f"{model.name}: {model.size}")
        if not model.has_template:
            _check_text_options(model.name, options)
            logger.warning("%s: no chat template, so it continues each text by itself, without turns", model.name)
    return Chat(models, sampling, options.seed, display, options.system, tools)


def _check_text_options(name: str, options: Namespace) -> None:
    for option in ("system", "tools"):
        if getattr(options, option) is not None:
            raise ValueError(f"--{option}: {name} has no chat template, so there is no place for it; leave it out")


def _name_apart(models: list[Any], given: list[str]) -> None:
    """Two checkpoints of two runs may have the same name: then the whole paths are shown."""
    if len({model.name for model in models}) < len(models):
        for model, name in zip(models, given, strict=True):
            model.name = name


def _talk(chat: Any) -> None:
    from rlhf.serving import read_prompt

    # Importing it gives `input` a history and the keys of a line editor; it is missing on Windows.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    chat.display.note("/help lists the commands; Ctrl-D ends")
    while True:
        try:
            goes_on = chat.handle(read_prompt(_line_of_terminal))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()  # the line that was begun is dropped
        except (ValueError, OSError, FloatingPointError) as error:
            chat.display.note(" ".join(str(error).split()))
        else:
            if not goes_on:
                return


def _line_of_terminal(goes_on: bool) -> str:
    return input("… " if goes_on else "> ")


def _answer_lines(chat: Any) -> None:
    from rlhf.serving import lines_of, read_prompt

    read_line: Callable[[bool], str] = lines_of(iter(sys.stdin))
    with contextlib.suppress(EOFError):
        while chat.handle(read_prompt(read_line)):
            pass
