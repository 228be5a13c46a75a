"""Facts for the record of a run and for a bug report: versions, git, the machine, and the files of data sets."""

import glob
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from rlhf import __version__
from rlhf.data.tables import hash_of_file

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "safetensors")
_GIBIBYTE = 2**30


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of this package, of Python, and of libraries.

    Args:
        libraries: names of distributions; those that are not installed are left out.

    Returns:
        From a name to a version.
    """
    found = {"rlhf": __version__, "python": platform.python_version()}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def git_state(folder: Path | str = ".") -> dict[str, Any] | None:
    """The state of the git repository around a folder.

    Args:
        folder: by default the working directory: a run is usually started in the repository of its user.

    Returns:
        ``commit``, ``branch`` (None where none is checked out), and ``dirty``: whether tracked files differ from the
        commit. None outside a repository, or without git.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    branch = _git(folder, "symbolic-ref", "--short", "-q", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "branch": branch or None, "dirty": bool(changes)}


def _git(folder: Path | str, *words: str) -> str | None:
    """The output of a git command; None where it fails. The repository may be huge, or on a slow disk."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine(num_processes: int = 1) -> dict[str, Any]:
    """The machine that this process runs on; without its name.

    Args:
        num_processes: of the run, on all machines.

    Returns:
        ``system``, ``processor``, ``cores`` that this process may use, ``memory_gib``, ``accelerator`` (None on a CPU),
        and ``processes``.
    """
    return {
        "system": platform.platform(terse=True),
        "processor": _processor(),
        "cores": num_cores(),
        "memory_gib": round(psutil.virtual_memory().total / _GIBIBYTE, 1),
        "accelerator": _accelerator(),
        "processes": num_processes,
    }


def num_cores() -> int:
    """Cores that this process may use: a container or ``taskset`` may give it a part of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _accelerator() -> str | None:
    if not torch.cuda.is_available():
        return "mps" if torch.backends.mps.is_available() else None
    properties = torch.cuda.get_device_properties(0)
    memory_gib = properties.total_memory / _GIBIBYTE
    return f"{torch.cuda.device_count()} × {properties.name} ({memory_gib:.0f} GiB)"


def data_files(source: str) -> list[dict[str, Any]]:
    """The files that a data set is read from, hashed.

    Args:
        source: a file, a pattern, or a folder; or anything else, such as a name on the hub.

    Returns:
        ``path``, ``xxh3`` and ``bytes`` of each file; none where the source is no file here.
    """
    path = Path(source).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    return [{"path": str(file), "xxh3": hash_of_file(file), "bytes": file.stat().st_size} for file in files]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
