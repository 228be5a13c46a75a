"""``rlhf env``: what a report of a bug needs to tell of the machine and its software."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rlhf.cli.options import RaisingParser
from rlhf.runs.facts import LIBRARIES, git_state, machine, versions

# What a feature needs besides.
_OPTIONAL = (
    "bitsandbytes", "deepspeed", "liger-kernel", "vllm", "trl", "math-verify", "matplotlib", "lm_eval", "wandb",
    "tensorboard", "trackio", "numpy", "huggingface_hub",
)  # fmt: skip
# Environment variables that change how a run behaves; none of them holds a secret.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "HF_HOME",
    "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "WORLD_SIZE", "RANK", "LOCAL_RANK",
    "ACCELERATE_MIXED_PRECISION", "WANDB_MODE", "NO_COLOR", "TERM", "PYTHONWARNINGS",
)  # fmt: skip


def run(argv: list[str]) -> None:
    """Print versions, the machine and the variables that matter.

    Args:
        argv: words of the command line, after the command.

    Raises:
        ValueError: an unknown option.
    """
    parser = RaisingParser("rlhf env", description="What a report of a bug needs; it holds no tokens.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    facts = _facts()
    if options.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for subject, entries in facts.items():
        table.add_row(f"[bold]{subject}[/bold]")
        for name, value in entries.items():
            table.add_row(f"  {name}", str(value))
    Console().print(table)


def _facts() -> dict[str, dict[str, Any]]:
    return {
        "versions": versions((*LIBRARIES, *_OPTIONAL)),
        "torch": _torch_build(),
        "machine": machine(),
        "free space": _free_space(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "git": _checkout(),
    }


def _checkout() -> dict[str, Any]:
    """The commit of this package, where it runs from a clone."""
    root = Path(__file__).parents[2]
    # An installed package may lie in an environment inside another repository.
    state = git_state(root) if (root / ".git").exists() else None
    return state or {"commit": "not a clone"}


def _torch_build() -> dict[str, Any]:
    cuda = torch.version.cuda
    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "cuda": cuda, "hip": torch.version.hip}
    if torch.cuda.is_available():
        facts |= {
            "cudnn": torch.backends.cudnn.version(),
            "compute capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "bf16": torch.cuda.is_bf16_supported(),
        }
    return {name: value for name, value in facts.items() if value is not None}


def _free_space() -> dict[str, str]:
    places = {"working directory": Path.cwd(), "caches": Path(os.environ.get("HF_HOME", Path.home() / ".cache"))}
    return {name: f"{shutil.disk_usage(path).free / 2**30:.1f} GiB" for name, path in places.items() if path.exists()}
