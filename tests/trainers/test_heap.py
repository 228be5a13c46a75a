"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from rlhf.trainers.heap import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.ones(2**24)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
start = faults()
for _ in range(20):
    torch.ones(2**24)
print(faults() - start)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_tensor_of_the_same_size_takes_the_freed_pages():
    """20 tensors of 64 MiB: 16384 faults each where the pages come anew."""
    kept, anew = (
        int(subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("keep", "anew")
    )
    assert kept < 16384
    assert anew > 10 * 16384
