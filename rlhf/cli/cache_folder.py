"""``--cache_dir``: one folder for all that is kept between runs and lies outside ``output_dir``."""

import os
import sys
from pathlib import Path
from typing import Any

# Of each variable, the folder below `cache_dir`. Their defaults are in the home folder or in /tmp.
PLACES = {
    "HF_HOME": "",  # the log-probs of references too, in rlhf/ref_logps
    "HF_HUB_CACHE": "hub",
    "HF_ASSETS_CACHE": "assets",
    "HF_XET_CACHE": "xet",
    "HF_DATASETS_CACHE": "datasets",
    "HF_MODULES_CACHE": "modules",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "WANDB_CACHE_DIR": "wandb",
    "WANDB_DATA_DIR": "wandb",
}


def move_caches(given: Any) -> None:
    """Let all caches be below one folder.

    Args:
        given: The folder; None leaves them where they are.

    Raises:
        ValueError: It is a file, or a package has read the places of its caches already.
    """
    if given is None:
        return
    folder = Path(str(given)).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--cache_dir {given}: is a file; choose a folder")
    wanted = {name: str(folder / place) for name, place in PLACES.items()}
    # As in a process that the launcher started, which has the variables from its parent.
    if wanted.items() <= os.environ.items():
        return
    if "huggingface_hub" in sys.modules:
        raise ValueError(f"--cache_dir {given}: too late in a program that loads models already; set HF_HOME before")
    # The token of `hf auth login` stays where it is: it is no cache.
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    old_home = Path(os.environ.get("HF_HOME", f"{cache}/huggingface")).expanduser()
    os.environ.setdefault("HF_TOKEN_PATH", str(old_home / "token"))
    os.environ.update(wanted)
