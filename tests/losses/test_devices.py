"""A loss stays on its device and never makes the host wait for it: seen without a GPU, by tensors without numbers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
# Once before training, or once for each rollout: they look at their numbers to find a mistake, or at groups of any ids.
WAIT = {"class_weights", "group_advantages", "gdpo_advantages", "reward_to_go_of_group", "rloo_advantages"}
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}
"""


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """A library that gives a torch without CUDA a guard for its devices."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("guard")
    (folder / "guard.cpp").write_text(GUARD)
    torch_folder = Path(torch.__file__).parent
    words = ["-shared", "-fPIC", "-std=c++20", f"-I{torch_folder}/include", f"-L{torch_folder}/lib"]
    subprocess.run([compiler, *words, "guard.cpp", "-o", "guard.so", "-lc10"], cwd=folder, check=True)
    return folder / "guard.so"


def test_losses_stay_on_their_device_and_do_not_wait(guard):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    script = TESTS / "losses/fake_gpu.py"
    done = subprocess.run(
        [sys.executable, script, guard], env=environment, capture_output=True, text=True, check=True
    )  # fmt: skip
    found = json.loads(done.stdout)
    # The stand-in itself finds both faults.
    assert found.pop("a wait").startswith("waits: ") and "device" in found.pop("two devices")
    assert {name for name, outcome in found.items() if outcome.startswith("waits: ")} == WAIT
    assert {name: outcome for name, outcome in found.items() if name not in WAIT and outcome != "cuda:0"} == {}
