"""``rlhf export``: a model for llama.cpp, Ollama or vLLM."""

import shlex
import tempfile
from argparse import Namespace
from pathlib import Path

from rlhf.cli.options import RaisingParser, underscored

_OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")


def run(argv: list[str]) -> None:
    """Export a model, or print the command that serves it.

    Args:
        argv: words of the command line, after the command.

    Raises:
        ValueError, OSError, ImportError: no such model, a file that exists, or a program that is missing.
    """
    options = _parser().parse_args(underscored(argv))
    _check(options)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    {"gguf": _to_gguf, "ollama": _to_ollama, "vllm": _to_vllm}[options.to](options)


def _parser() -> RaisingParser:
    parser = RaisingParser(
        "rlhf export",
        description="Make a model ready for llama.cpp (gguf) or Ollama, or print the command that serves it with vLLM. "
        "An adapter is merged first; vLLM serves a plain LoRA adapter as it is.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder: a model, or an adapter")
    parser.add_argument("--to", required=True, choices=("gguf", "ollama", "vllm"), help="what it is for")
    parser.add_argument(
        "-o", "--output", metavar="PATH", type=Path,
        help="gguf: the file (default: in the folder); ollama: the folder that an adapter is merged into",
    )  # fmt: skip
    parser.add_argument("--outtype", choices=_OUTTYPES, help="gguf: type of the weights (default: auto, 16 bits)")
    parser.add_argument("--system", help="ollama: the system message")
    return parser


def _check(options: Namespace) -> None:
    """An option of another target would be ignored without a word."""
    targets = {"output": ("gguf", "ollama"), "outtype": ("gguf",), "system": ("ollama",)}
    for name, of in targets.items():
        if getattr(options, name) is not None and options.to not in of:
            raise ValueError(f"--{name} is of --to {' or '.join(of)}, not of --to {options.to}; leave it out")


def _to_vllm(options: Namespace) -> None:
    from rlhf.serving.vllm import vllm_command

    print(vllm_command(options.model))


def _to_ollama(options: Namespace) -> None:
    from rlhf.serving import merge
    from rlhf.serving.model_folder import served_model
    from rlhf.serving.ollama import modelfile

    folder = Path(options.model)
    if _is_adapter(options.model):
        if options.output is None:
            raise ValueError(f"{folder}: an adapter; name the folder that it is merged into with -o")
        folder = merge(options.model, options.output).folder
    elif options.output is not None:
        raise ValueError("-o: the Modelfile of a model goes into its own folder; leave it out")
    if not folder.is_dir():
        raise ValueError(f"{options.model}: Ollama reads a folder; download the model first: hf download {folder}")
    model = served_model(str(folder))
    text = modelfile(model, options.system)
    file = folder / "Modelfile"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{file}: exists already, with other content; move or delete it")
    file.write_text(text, encoding="utf-8")
    if "TEMPLATE" not in text:
        print("no TEMPLATE: the chat template is not one that Ollama's language can say; Ollama looks for a known one")
    name = shlex.quote(model.name.lower())
    print(f"{file}: written\nollama create {name} -f {shlex.quote(str(file))}\nollama run {name}")


def _to_gguf(options: Namespace) -> None:
    from rlhf.serving import merge
    from rlhf.serving.gguf import convert, find_converter
    from rlhf.serving.model_folder import served_model

    converter = find_converter()
    outtype = options.outtype or "auto"
    folder = Path(options.model)
    name = folder.resolve().name
    file = options.output or folder / (f"{name}.gguf" if outtype == "auto" else f"{name}-{outtype}.gguf")
    if file.exists():
        raise ValueError(f"{file}: exists already; choose another file with -o")
    if _is_adapter(options.model):
        file.parent.mkdir(parents=True, exist_ok=True)
        # Beside the file, as the folder for temporary files may be too small for a model.
        with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
            merged = merge(options.model, Path(temporary) / name)
            convert(merged.folder, file, outtype, converter)
    else:
        if not folder.is_dir():
            raise ValueError(f"{options.model}: the converter reads a folder; download it first: hf download {folder}")
        served_model(options.model)
        convert(folder, file, outtype, converter)
    print(f"{file}: {file.stat().st_size / 1e6:,.0f} MB\nllama-server -m {shlex.quote(str(file))}")


def _is_adapter(name: str) -> bool:
    from rlhf.models.adapter_files import adapter_config
    from rlhf.models.places import resolve

    return adapter_config(resolve(name)) is not None
