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
    return output_of(str(TESTS / "fake_gpu.py"), str(guard))


def output_of(*words):
    """What a command prints as JSON. Here Triton compiles: this process has imported it as an interpreter."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
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


SHARED_MEMORY = {"A100": 163 * 2**10, "H100": 227 * 2**10, "B200": 227 * 2**10, "MI300X": 64 * 2**10}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_compiled(kernel):
    assert kernel["spilled"] == 0, kernel
    assert kernel["shared_memory"] <= SHARED_MEMORY[kernel["card"]], kernel
    if kernel["vocabulary"] < 4096:  # less than a block: no thread has 16 bytes to load
        return
    is_comparison = kernel["kernel"] in ("compare_kernel", "divergence_gradient_kernel")
    matrices = 2 if is_comparison else 1
    # The scores of the teacher's plain head are compiled for the student's case too.
    bias = BYTES["float32"] if kernel["head"] == "full" else 0
    product = BYTES[kernel["product"]]
    read = {matrices * product + bias} | ({product} if kernel["divergence"] and not is_comparison else set())
    assert kernel["bytes_read"] in read, kernel
    writes = kernel["kernel"].endswith("gradient_kernel")
    assert kernel["bytes_written"] == (BYTES[kernel["gradient"]] if writes else 0), kernel
    # Each thread writes what it has read, so the gradient may take the memory of the product.
    assert not writes or kernel["shared_memory"] == 0, kernel
    # The numbers of the row, and of its token.
    assert kernel["narrow"] <= 10, kernel
    # Two programs of 8 warps: one loads while the other waits for the sums of its row.
    assert kernel["warps"] is None or kernel["warps"] >= 16, kernel


def test_kernels_are_compiled_for_a_card(seen):
    kernels = {kernel["kernel"] for kernel in seen["compiled"]}
    assert kernels == {"score_kernel", "gradient_kernel", "compare_kernel", "divergence_gradient_kernel"}
    for kernel in seen["compiled"]:
        check_compiled(kernel)
    # Each once for the plain head and once for the full one, though three chunks of each began at other tokens.
    # The scores of the teacher's plain head and of the student's full one need no entropy: others than those before.
    names = [kernel["kernel"] for kernel in seen["compiled"]]
    assert {name: names.count(name) for name in kernels} == {
        "score_kernel": 3, "gradient_kernel": 1, "compare_kernel": 1, "divergence_gradient_kernel": 1,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("card", SHARED_MEMORY)
def test_every_case_is_compiled_for_every_card(card):
    compiled = output_of("-m", "benchmarks.gpu.compiled", "--json", "--cards", card)
    assert len(compiled) >= 130
    for kernel in compiled:
        check_compiled(kernel)


@pytest.mark.slow
def test_flex_attention_is_compiled_for_a_card(guard):
    """The forward pass: autograd asks torch's own library for a card, so the backward pass cannot be traced."""
    compiled = output_of(str(TESTS / "fake_gpu_compiler.py"), str(guard))
    assert set(compiled) == {"plain", "soft-cap", "sinks"}
    for kernels in compiled.values():
        attention = [kernel for kernel in kernels if "flex_attention" in kernel["name"]]
        assert attention and all(kernel["wgmma"] for kernel in attention), kernels
        assert all(kernel["shared"] <= SHARED_MEMORY["H100"] for kernel in kernels), kernels
