"""Run by tests under ``accelerate launch``: commands one after another, as imports take longer than a tiny run."""

import gc
import json
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator

from rlhf.cli.main import main


def run_all(file: Path) -> int:
    # All in one process group: a second one in the same processes would wait for ever at its start.
    Accelerator.end_training = lambda self: None
    for words in json.loads(file.read_text()):
        if status := main(words):
            return status
    # A model that still holds the group may abort at the exit.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_all(Path(sys.argv[1])))
