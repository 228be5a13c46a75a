"""What a GPU would be given, seen by tensors without numbers: devices, waits of the host, kernels, types."""

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


@pytest.fixture(scope="module")
def seen(guard):
    """What ``tests/fake_gpu.py`` prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    words = [sys.executable, str(TESTS / "fake_gpu.py"), str(guard)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_losses_stay_on_their_device_and_do_not_wait(seen):
    outcomes = dict(seen["losses"])
    # The stand-in itself finds both faults.
    assert outcomes.pop("a wait").startswith("waits: ") and "device" in outcomes.pop("two devices")
    assert {name for name, outcome in outcomes.items() if outcome.startswith("waits: ")} == WAIT
    assert {name: outcome for name, outcome in outcomes.items() if name not in WAIT and outcome != "cuda:0"} == {}


def test_kernels_and_types_on_a_gpu(seen):
    """Float32 weights under autocast take the paths of bfloat16 weights: one kernel a layer, no float32 product."""
    flow = seen["flow"]
    assert {(case["device"], case["log-probs"]) for case in flow.values()} == {("cuda:0", "torch.float32")}
    for case in ("texts, float32, autocast True", "pairs, float32, autocast True", "texts, bfloat16, autocast False"):
        assert flow[case]["attention"] == {"varlen_attn bfloat16": 2}
        assert flow[case]["head"] == {"bfloat16": 1} and flow[case]["layers"]["bfloat16"] == 14
        assert "float32" not in flow[case]["layers"]
    found = flow["texts, float32, autocast False"]
    assert found["layers"].keys() == found["head"].keys() == {"float32"}
