"""FSDP2's sharding on two CPU processes; accelerate itself turns FSDP on for accelerators only."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_sharded_models_score_like_whole_ones():
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", HERE / "sharded.py"]
    paths = os.pathsep.join([str(HERE.parent), *sys.path])
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
