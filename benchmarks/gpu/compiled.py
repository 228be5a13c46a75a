"""Compile the head's kernels for cards that are not here, and show what the compiler made of each.

    python -m benchmarks.gpu.compiled                # every card and case, about two minutes
    python -m benchmarks.gpu.compiled --cards H100

Triton brings the assembler of each maker, so no card and no driver is needed. The package's own functions are called,
on tensors without memory, and each launch ends after the compilation. So the kernels get the arguments of a GPU's run.

Registers and spills are the assembler's. Milliseconds are arithmetic: bytes and FLOPs over the figures of a data sheet.
"""

import argparse
import contextlib
import io
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product as pairs
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu.measuring import Row, show
from rlhf.kernels.token_divergences import compare_tokens, side, write_divergence_gradient
from rlhf.kernels.token_scores import (
    THREADS,
    LogitTransform,
    TokenScores,
    empty_rows,
    padded_bias,
    score_tokens,
    write_gradient,
)

NOWHERE = torch.device("meta")
ROWS = 8192  # more logits than int32 counts
VECTOR = 16  # bytes: the widest load of one thread
REGISTERS, MOST_WARPS = 2**16, 64  # of a multiprocessor of these NVIDIA cards


@dataclass(frozen=True)
class Card:
    """What the compiler must know of a card.

    Args:
        target: its architecture.
        shared_memory: bytes that one program may have.
    """

    target: GPUTarget
    shared_memory: int


CARDS = {
    "A100": Card(GPUTarget("cuda", 80, 32), 163 * 2**10),
    "H100": Card(GPUTarget("cuda", 90, 32), 227 * 2**10),  # the H200's code is the same
    "B200": Card(GPUTarget("cuda", 100, 32), 227 * 2**10),
    "MI300X": Card(GPUTarget("hip", "gfx942", 64), 64 * 2**10),
}
# Of the data sheets: bytes in a second, and dense bf16 FLOPs in a second.
SPEEDS = {"A100": (2.04e12, 312e12), "H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12), "B200": (8.0e12, 2250e12)}


@dataclass(frozen=True)
class Case:
    """The chunk that kernels are called with.

    Args:
        vocabulary: its columns.
        product: the type of the logits.
        gradient: the type of their gradient.
        head: ``"plain"``, or ``"full"`` for one with scale, bias, soft-cap and temperature, and a loss that reads the
            entropy.
        divergence: from a teacher with a plain head, of :data:`DIVERGENCES`; empty for a loss without a teacher.
    """

    vocabulary: int
    product: str
    gradient: str
    head: str
    divergence: str = ""


VOCABULARIES = (49_152, 128_256, 50_257)
# A head in half precision, a head in float32, and logits that a model computes itself.
DTYPES = (("float32", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"))
DIVERGENCES = {"forward KL": 0.0, "reverse KL": 1.0, "JSD": 0.5}
CASES = [
    Case(vocabulary, *dtypes, head, divergence)
    for vocabulary, dtypes in [*pairs(VOCABULARIES, DTYPES), (1, DTYPES[0]), (37, DTYPES[0])]
    for head, divergence in pairs(("plain", "full"), ("", *DIVERGENCES))
]


@dataclass(frozen=True)
class Compiled(Case):
    """A kernel in a card's machine code.

    Args:
        vocabulary: as in :class:`Case`.
        product: as in :class:`Case`.
        gradient: as in :class:`Case`.
        head: as in :class:`Case`.
        divergence: as in :class:`Case`.
        card: of :data:`CARDS`.
        kernel: its name.
        registers: of a thread.
        spilled: bytes of a thread that did not fit into registers.
        shared_memory: bytes of a program.
        warps: that fit on a multiprocessor at a time; None for a card of another maker.
        bytes_read: for each logit, by loads of 16 bytes.
        bytes_written: for each logit, by stores of 16 bytes.
        narrow: loads and stores of fewer bytes, in the code of one thread.
    """

    card: str = ""
    kernel: str = ""
    registers: int = 0
    spilled: int = 0
    shared_memory: int = 0
    warps: int | None = None
    bytes_read: float = 0
    bytes_written: float = 0
    narrow: int = 0


class NoDevice:
    """A driver of Triton that knows which card to compile for, and can launch nothing."""

    def __init__(self, card: Card, index: int) -> None:
        self.card, self.index = card, index

    def get_current_target(self) -> GPUTarget:
        return self.card.target

    def get_current_device(self) -> int:
        # Triton keeps the code of each device apart.
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0


Launch = tuple[Any, int, str]
"""A kernel that was compiled, the columns that a program of it reads at a time, and the assembler's report."""


@contextlib.contextmanager
def launches_compile_for(name: str) -> Iterator[list[Launch]]:
    """Launches of kernels compile them for a card, and start nothing.

    Args:
        name: of :data:`CARDS`.
    Yields:
        A list to which each kernel is added when it is compiled.
    """
    launches: list[Launch] = []
    num_warps = THREADS // CARDS[name].target.warp_size  # as with a torch for that card
    own_run, known = JITFunction.run, set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        report = io.StringIO()
        options["num_warps"] = num_warps
        with contextlib.redirect_stdout(report):
            kernel = own_run(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in known:
            known.add(id(kernel))
            launches.append((kernel, options["BLOCK"], report.getvalue()))
        return kernel

    # A folder of its own: the assembler reports on nothing that Triton finds in its cache.
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        driver.set_active(NoDevice(CARDS[name], list(CARDS).index(name)))
        JITFunction.run = run
        try:
            yield launches
        finally:
            JITFunction.run = own_run
            driver._active = None


def _describe(case: Case, name: str, launch: Launch) -> Compiled:
    card = CARDS[name]
    kernel, block, report = launch
    if card.target.backend == "cuda":
        registers, spilled, moves = _read_ptx(kernel.asm["ptx"], report)
        warps = _resident_warps(registers, kernel.metadata.num_warps)
    else:
        registers, spilled, moves = _read_amdgcn(kernel.asm["amdgcn"])
        warps = None
    threads = kernel.metadata.num_warps * card.target.warp_size
    # Each column of a block is read by one thread, in the instructions that its code has.
    read, written = (VECTOR * moves.count((kind, VECTOR)) * threads / block for kind in ("load", "store"))
    narrow = sum(width < VECTOR for _, width in moves)
    return Compiled(
        **asdict(case),
        card=name,
        kernel=kernel.src.fn.__name__.strip("_"),
        registers=registers,
        spilled=spilled,
        shared_memory=kernel.metadata.shared,
        warps=warps,
        bytes_read=read,
        bytes_written=written,
        narrow=narrow,
    )


def _read_ptx(code: str, report: str) -> tuple[int, int, list[tuple[str, int]]]:
    """Registers, spilled bytes, and the bytes of each load and store of a thread, from NVIDIA's assembler."""
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None, report
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", report)))
    # Such as ld.global.v4.b32: four times 32 bits.
    found = re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", code)
    names = {"ld": "load", "st": "store"}
    moves = [(names[kind], int(count or 1) * int(bits) // 8) for kind, count, bits in found]
    return int(registers[1]), spilled, moves


def _resident_warps(registers: int, warps_of_a_program: int) -> int:
    # A warp of 32 threads gets registers by 8 for each.
    warps = REGISTERS // (-(-registers // 8) * 8 * 32)
    return min(warps, MOST_WARPS) // warps_of_a_program * warps_of_a_program


AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "short_d16_hi": 2}


def _read_amdgcn(code: str) -> tuple[int, int, list[tuple[str, int]]]:
    """As :func:`_read_ptx`, from AMD's."""
    registers = re.search(r"\.vgpr_count: *(\d+)", code)
    assert registers is not None
    spilled = 4 * sum(map(int, re.findall(r"\.[sv]gpr_spill_count: *(\d+)", code)))
    found = re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", code)
    return int(registers[1]), spilled, [(kind, AMD_BYTES[width]) for kind, width in found]


def launch_kernels(case: Case, chunk: slice = slice(0, ROWS)) -> None:
    """Launch what a chunk launches, forward and backward.

    Args:
        case: of the chunk.
        chunk: its rows of all.
    """
    rows = chunk.stop - chunk.start
    dtypes = (getattr(torch, name) for name in (case.product, case.product, case.gradient))
    # As the head allocates them on a GPU.
    product, teacher_product, out = (empty_rows(rows, case.vocabulary, dtype, NOWHERE) for dtype in dtypes)
    token = torch.empty(ROWS, dtype=torch.int64, device=NOWHERE)[chunk]
    is_full = case.head == "full"
    transform = LogitTransform()
    if is_full:
        transform = LogitTransform(padded_bias(torch.empty(case.vocabulary, device=NOWHERE)), 0.5, 30.0, 0.7)
    if not case.divergence:
        scores = score_tokens(product, token, transform, entropy=is_full)
        # A backward pass reads them from the vectors of all chunks.
        scores = TokenScores(*(None if numbers is None else torch.empty(ROWS, device=NOWHERE) for numbers in scores))
        grads = torch.empty(ROWS, device=NOWHERE)[chunk]
        write_gradient(product, token, transform, scores.rows(chunk), grads, grads if is_full else None, out)
        return
    beta, temperature = DIVERGENCES[case.divergence], 2.0
    student = side(product, transform, token, temperature)
    teacher = side(teacher_product, LogitTransform(), token, temperature)
    numbers = compare_tokens(student, teacher, beta, temperature)
    write_divergence_gradient(student, teacher, token, numbers, beta, temperature, 0.5, 0.5, out)


def compile_all(card: str, cases: list[Case]) -> list[Compiled]:
    """Compile for a card.

    Args:
        card: of :data:`CARDS`.
        cases: what the kernels are called with.
    Returns:
        Each kernel that was compiled, once.
    """
    found = []
    with launches_compile_for(card) as launches:
        for case in cases:
            launch_kernels(case)
            # Kernels must not be compiled again for a chunk that begins and ends anywhere.
            launch_kernels(case, slice(7, 8))
            launch_kernels(case, slice(1, 64))
            found += [_describe(case, card, launch) for launch in launches]
            launches.clear()
    return found


def bound(card: str, bytes_per_logit: float, tokens: int = 8192, hidden: int = 4096, vocabulary: int = 128_256) -> Row:
    """The least milliseconds of the head, forward and backward: arithmetic, and no measurement.

    Args:
        card: of :data:`SPEEDS`.
        bytes_per_logit: that the kernels read and write.
        tokens: that are scored.
        hidden: size of the hidden states.
        vocabulary: number of logits of a token.
    Returns:
        The milliseconds of the kernels at the full bandwidth, and of the three products at the full speed.
    """
    bandwidth, flops = SPEEDS[card]
    kernels = tokens * vocabulary * bytes_per_logit / bandwidth
    products = 3 * 2 * tokens * hidden * vocabulary / flops
    return {"card": card, "kernels ms": 1e3 * kernels, "products ms": 1e3 * products}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    compiled = [one for card in arguments.cards for one in compile_all(card, CASES)]
    if arguments.json:
        print(json.dumps([asdict(one) for one in compiled]))
        return
    show("Kernels", [asdict(one) for one in compiled])
    # A head in half precision: float32 logits are read twice, and their gradient is written in bf16.
    show("The least time of 8,192 tokens, 4,096 x 128,256: arithmetic", [bound(card, 4 + 4 + 2) for card in SPEEDS])


if __name__ == "__main__":
    main()
