"""Malformed inputs end in one line, or are accepted and right. ``make fuzz N=1000 SEED=7`` runs more of them."""

import subprocess
import sys
from pathlib import Path


def test_malformed_inputs_are_refused_in_one_line():
    # A process of its own: its children are forked, and this one has threads.
    words = [sys.executable, str(Path(__file__).with_name("fuzzer.py")), "--cases", "50", "--seed", "16"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=550)
    assert ended.returncode == 0 and " 0 faults" in ended.stdout, ended.stdout + ended.stderr[-2000:]
