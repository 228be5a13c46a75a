"""What all sections share: the device, time and memory of a call, errors against float64, models and rows."""

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

Row = dict[str, Any]
GIBIBYTE = 2**30


@dataclass(frozen=True)
class Setup:
    """Where and how large: ``tiny`` shapes are for a CPU, where no figure means anything."""

    device: torch.device
    tiny: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass
class Results:
    """The rows of a section, and the failures among them."""

    setup: Setup
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def measure(self, labels: Row, function: Callable[..., Row], *args: Any) -> None:
        """Add a row of what ``function(*args)`` measures; a failure becomes a row too, and its memory is freed.

        Args:
            labels: the first cells of the row.
            function: measures one thing.
            args: of the function.
        """
        try:
            self.rows.append({**labels, **function(*args)})
        except Exception as error:
            first_line = (str(error) or "no message").splitlines()[0]
            reason = f"{type(error).__name__}: {first_line}"
            self.rows.append({**labels, "failed": reason[:120]})
            self.failures.append(f"{', '.join(map(str, labels.values()))}: {reason}")
            # The frames of the traceback hold the tensors of the failed call.
            traceback.clear_frames(error.__traceback__)
        free_memory(self.setup)


def show(title: str, rows: list[Row]) -> None:
    """Print a table of rows, whose columns are the keys of all."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    # A file has no width of its own.
    Console(width=None if sys.stdout.isatty() else 200).print(table, markup=False)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def wait(setup: Setup) -> None:
    if setup.on_gpu:
        torch.cuda.synchronize()


def free_memory(setup: Setup) -> None:
    """Give the card's memory back, also what a cycle of references holds, such as a trainer's."""
    if setup.on_gpu:
        gc.collect()
        torch.cuda.empty_cache()


def reset_peak(setup: Setup) -> int:
    """Begin to count the peak of memory.

    Args:
        setup: the device.
    Returns:
        The bytes that are allocated now; 0 on a CPU.
    """
    if not setup.on_gpu:
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_gib(setup: Setup, before: int = 0) -> float | None:
    """The most memory since :func:`reset_peak`, beyond ``before`` bytes; None on a CPU, where torch does not count."""
    return (torch.cuda.max_memory_allocated() - before) / GIBIBYTE if setup.on_gpu else None


def time_and_memory(setup: Setup, function: Callable[[], Any], rounds: int = 5) -> Row:
    """The median milliseconds of a call and its peak memory beyond what was allocated before.

    Args:
        setup: the device.
        function: called twice before anything is timed.
        rounds: timed calls.
    Returns:
        ``ms`` and ``peak GiB``.
    """
    warm_up, rounds = (2, rounds) if setup.on_gpu else (1, 1)
    for _ in range(warm_up):
        function()
    free_memory(setup)
    before = reset_peak(setup)
    durations = []
    for _ in range(rounds):
        wait(setup)
        start = time.perf_counter()
        function()
        wait(setup)
        durations.append(time.perf_counter() - start)
    return {"ms": statistics.median(durations) * 1e3, "peak GiB": peak_gib(setup, before)}


def relative_error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference, divided by the norm of ``want``."""
    got, want = (tensor.detach().double().cpu() for tensor in (got, want))
    return float((got - want).norm() / want.norm().clamp(min=torch.finfo(torch.float64).tiny))


@cache
def product_tflops(setup: Setup, dtype: torch.dtype) -> float:
    """What one large product of matrices reaches on this device: the ceiling of everything else."""
    size = 8192 if setup.on_gpu and not setup.tiny else 256
    left, right = (torch.randn(size, size, device=setup.device).to(dtype) for _ in range(2))
    ms = time_and_memory(setup, lambda: left @ right)["ms"]
    return 2 * size**3 / ms / 1e9


def llama(setup: Setup, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random Llama of 2 small layers, unless ``changes`` of its configuration ask for more."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dict(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=1000, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(setup.device):
        model = LlamaForCausalLM(LlamaConfig(**{**small, **changes}))
    return model.to(dtype)


def shape_of_1b(setup: Setup, vocab_size: int = 128_256) -> dict[str, Any]:
    """The configuration of Llama-3.2-1B; a tiny one where shapes are tiny."""
    if setup.tiny:
        return dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=max(1000, vocab_size))
    return dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=max(128_256, vocab_size), tie_word_embeddings=True,
    )  # fmt: skip


def random_rows(lengths: list[int] | list[tuple[int, int, int]], vocab_size: int) -> list[Row]:
    """Tokenised rows.

    Args:
        lengths: tokens of each text, or of each prompt, chosen and rejected answer.
        vocab_size: ids are below it.
    Returns:
        Rows as a collator takes them.
    """
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocab_size, (count,), generator=generator).tolist()

    rows = []
    for length in lengths:
        if isinstance(length, int):
            text = ids(length)
            rows.append({"input_ids": text, "labels": text})
        else:
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            rows.append({name: ids(count) for name, count in zip(names, length, strict=True)})
    return rows
