"""Run by tests under ``accelerate launch``: commands one after another, as imports take longer than a tiny run."""

import gc
import json
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator

from rlhf.cli.main import main

# All in one process group: a second one in the same processes would wait for ever at its start.
Accelerator.end_training = lambda self: None
for words in json.loads(Path(sys.argv[1]).read_text()):
    if status := main(words):
        sys.exit(status)
# A model that still holds the group may abort at the exit.
gc.collect()
dist.barrier()
dist.destroy_process_group()
