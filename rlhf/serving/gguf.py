"""A GGUF file for llama.cpp, made by llama.cpp's own converter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP"  # of the environment: the folder of llama.cpp
_PACKAGED = "convert-hf-to-gguf"  # the same script as an installed command
_MAGIC = b"GGUF"
_LINES_SHOWN = 3


def find_converter() -> list[str]:
    """Find llama.cpp's converter.

    Returns:
        The words of the command.

    Raises:
        ImportError: it is not installed.
    """
    folder = os.environ.get(VARIABLE)
    if folder:
        script = Path(folder).expanduser() / SCRIPT
        if not script.is_file():
            raise ImportError(f"{VARIABLE}={folder}: there is no {SCRIPT} in that folder")
        return [sys.executable, str(script)]
    for name in (SCRIPT, _PACKAGED):
        found = shutil.which(name)
        if found is not None:
            return [found]
    raise ImportError(
        f"{SCRIPT} of llama.cpp is not here: git clone https://github.com/ggml-org/llama.cpp, pip install -r "
        f"llama.cpp/requirements/requirements-convert_hf_to_gguf.txt, and export {VARIABLE}=llama.cpp"
    )


def convert(folder: Path, file: Path, outtype: str, converter: list[str]) -> None:
    """Convert a model folder to a GGUF file.

    Args:
        folder: of a causal LM with its tokenizer.
        file: is written; new.
        outtype: of the converter, such as ``"q8_0"``.
        converter: words of its command.

    Raises:
        ValueError: the file exists, or the converter fails.
    """
    if file.exists():
        raise ValueError(f"{file}: exists already; choose another file with -o")
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}")
    words = [*converter, str(folder), "--outfile", str(unfinished), "--outtype", outtype]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last_lines = " ".join((done.stderr or done.stdout).strip().splitlines()[-_LINES_SHOWN:])
            raise ValueError(f"{folder}: llama.cpp's converter ended with status {done.returncode}: {last_lines}")
        if not unfinished.is_file() or unfinished.open("rb").read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{folder}: llama.cpp's converter wrote no GGUF file ({' '.join(words)})")
        unfinished.rename(file)
    finally:
        unfinished.unlink(missing_ok=True)
