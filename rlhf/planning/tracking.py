"""How much memory a piece of work takes: every allocation of torch while it runs, by phase."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_PREFIX = "rlhf memory phase: "
_HUGE_PAGE = 2**21


def resident_bytes(num_bytes: int, device: torch.device) -> int:
    """The memory that an allocation takes up.

    Args:
        num_bytes: that were asked for; negative where they are given back.
        device: where.

    Returns:
        On a CPU with huge pages (the default of ``rlhf``) a large tensor begins at a page of 2 MiB and takes whole
        ones.
    """
    size = abs(num_bytes)
    in_pages = device.type == "cpu" and os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" and size >= _HUGE_PAGE
    if not in_pages:
        return num_bytes
    pages = -(-size // _HUGE_PAGE)
    return pages * _HUGE_PAGE if num_bytes > 0 else -pages * _HUGE_PAGE


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that the profiler's C++ code writes to stderr; errors are exceptions, and still come out."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@dataclass
class Phase:
    """The memory of one phase, in bytes above what was allocated when the recording began.

    Attributes:
        peak: the most that was allocated at once.
        end: what was still allocated at its end, the first time.
    """

    peak: int = 0
    end: int = 0


@dataclass
class MemoryRecorder:
    """Records the peak of each phase of a piece of work.

    On an accelerator torch keeps these figures itself. On a CPU they come from the events of torch's profiler, which
    has every allocation, also those inside an operator.

    Attributes:
        device: where the work allocates its tensors.
        phases: by name, once :meth:`record` has returned. A name that is marked twice has the larger peak.
    """

    device: torch.device
    phases: dict[str, Phase] = field(default_factory=dict)
    _current: str = ""
    _base: int = 0

    def record(self, work: Callable[[], Any]) -> Any:
        """Run the work, which calls :meth:`mark` where a phase begins.

        Args:
            work: a function without arguments.

        Returns:
            What it returns.
        """
        if self.device.type != "cpu":
            return self._record_on_accelerator(work)
        with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = work()
        self._read(profiler)
        return result

    def mark(self, name: str) -> None:
        """Begin a phase; the one before it ends.

        Args:
            name: of the phase that begins.
        """
        if self.device.type == "cpu":
            with record_function(_PREFIX + name):
                return
        self._close()
        self._current = name

    def _record_on_accelerator(self, work: Callable[[], Any]) -> Any:
        torch.cuda.synchronize(self.device)
        # Memory that a cycle still holds would be freed in the middle of the recording.
        gc.collect()
        self._base = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = work()
        self._close()
        return result

    def _close(self) -> None:
        if self._current:
            peak = torch.cuda.max_memory_allocated(self.device) - self._base
            self._add(self._current, peak, torch.cuda.memory_allocated(self.device) - self._base)
        torch.cuda.reset_peak_memory_stats(self.device)

    def _read(self, profiler: profile) -> None:
        """Walk through the events in the order of time."""
        assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
        events: list[Any] = profiler.profiler.kineto_results.events()
        timeline = []
        for event in events:
            name = event.name()
            if name == "[memory]" and event.device_type().name == "CPU":
                timeline.append((event.start_ns(), "", resident_bytes(event.nbytes(), self.device)))
            elif name.startswith(_PREFIX):
                timeline.append((event.start_ns(), name.removeprefix(_PREFIX), 0))
        timeline.sort(key=lambda item: item[0])
        current, allocated, peak = "", 0, 0
        for _, name, num_bytes in timeline:
            if name:
                self._add(current, peak, allocated)
                current, peak = name, allocated
            allocated += num_bytes
            peak = max(peak, allocated)
        self._add(current, peak, allocated)

    def _add(self, name: str, peak: int, end: int) -> None:
        if name:
            earlier = self.phases.get(name, Phase(0, end))
            self.phases[name] = Phase(max(peak, earlier.peak), earlier.end)
