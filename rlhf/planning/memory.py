"""The memory that a run takes at its peak, and the memory that the machine has."""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import nn

GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """What takes memory at the peak of a run, in bytes of one process.

    Attributes:
        weights: of the trained model.
        others: of the reference, the teacher and the critic.
        optimizer: the state of the optimizer.
        gradients: of all trained weights.
        phases: the peak of each phase of the run: what it takes beside weights and the state of the optimizer.
        vllm: held by vLLM in this process, as long as the run goes on. Where it sleeps, it is a part of its phase.
        fixed: Python and its libraries on a CPU; 0 on an accelerator, whose context is not torch's memory.
        available: what the machine has, or the device.
        measured: the largest memory of this process during real steps, on a CPU; 0 without them. The C library keeps
            freed memory there, which no sum of tensors has.
        note: how far the figures are measured.
        changes: the peak with one option changed, by the option.
    """

    weights: int
    others: int
    optimizer: int
    gradients: int
    phases: dict[str, int]
    fixed: int
    available: int
    vllm: int = 0
    measured: int = 0
    note: str = ""
    changes: dict[str, int] = field(default_factory=dict)

    @property
    def phase(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def model_bytes(self) -> int:
        """All that stays in memory from step to step, without Python."""
        return self.weights + self.others + self.optimizer + self.vllm

    @property
    def peak(self) -> int:
        """The most that the process takes, without what the C library keeps."""
        return self.fixed + self.model_bytes + self.phases[self.phase]

    @property
    def expected(self) -> int:
        """The most that the process takes: as predicted, or as measured where that is more."""
        return max(self.peak, self.measured)

    @property
    def fits(self) -> bool:
        """Whether the machine has so much."""
        return self.peak <= self.available


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """The memory of parameters and buffers, exactly; those that are tied count once.

    Args:
        modules: models.

    Returns:
        Bytes.
    """
    sizes = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            # A part of a mapped file shares a storage with other weights.
            sizes[tensor.data_ptr()] = min(tensor.nbytes, storage.nbytes())
    return sum(sizes.values())


def gradient_bytes(model: nn.Module) -> int:
    """The memory of the gradients of all trained weights.

    Args:
        model: as it is trained.

    Returns:
        Bytes.
    """
    return sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)


def device_memory(device: torch.device) -> int:
    """All memory of an accelerator, in use or not.

    Args:
        device: of the training.
    Returns:
        Bytes; 0 for a CPU, where what other libraries hold is measured with the process.
    """
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0


def resident_memory() -> int:
    """Memory of this process that is in use now, in bytes; what the C library keeps for later is given back first."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """The most memory that this process had so far, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024


def available_memory(device: torch.device) -> int:
    """The memory that a process of a run may take.

    Args:
        device: of the training.

    Returns:
        Bytes: of the device; on a CPU, of the machine or of the container, divided by the processes that share it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    total = int(psutil.virtual_memory().total)
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    for limit in limits:
        text = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
        if text.isdigit():
            total = min(total, int(text))
    # Set by the launcher.
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
