"""How the scored tokens are cut into chunks: the mode of the work, and sizes by the memory of the device."""

from typing import Literal, NamedTuple

import psutil
import torch

Mode = Literal["auto", "unit", "save", "recompute"]
TILE_ROWS = 128  # of the product of two matrices on a GPU


class ChunkPlan(NamedTuple):
    """How :func:`rlhf.logprobs.score` does its work.

    Args:
        mode: of the table in :mod:`rlhf.logprobs.score`, in lower case.
        chunk_size: rows of logits at a time.
        chunks_cached: how many chunks of log-probs are kept for the backward pass.
        chunks_per_product: how many chunks of gradients wait, in half precision, for one product with the rows.
    """

    mode: str
    chunk_size: int
    chunks_cached: int = 0
    chunks_per_product: int = 1


def plan_chunks(
    rows: int,
    logits_per_row: int,
    device: torch.device,
    *,
    needs_grad: bool,
    head_needs_grad: bool,
    has_objective: bool = False,
    entropy: bool = False,
    mode: Mode = "auto",
    chunk_size: int | None = None,
    half_precision: bool = False,
) -> ChunkPlan:
    """Choose the mode and the size of chunks.

    Args:
        rows: number of scored tokens.
        logits_per_row: numbers that live at a time for each of them: the vocabulary, or a multiple of it.
        device: where they live.
        needs_grad: a gradient is wanted at all.
        head_needs_grad: the head's weight or bias gets one too.
        has_objective: the loss is taken while a chunk's logits live.
        entropy: as in :func:`rlhf.logprobs.score`.
        mode: as in :func:`rlhf.logprobs.score`.
        chunk_size: as in :func:`rlhf.logprobs.score`.
        half_precision: products are taken in half precision, and kernels write their gradients: these may wait.
    Returns:
        The plan.
    Raises:
        ValueError: ``"unit"`` is asked for where the head or the entropy needs a gradient.
    """
    # Unit saves only the gradient of the log-probs in the rows: none of the head, and none of an entropy.
    if mode == "unit" and (head_needs_grad or entropy):
        raise ValueError('mode "unit" is for a frozen head without entropy; use "auto"')
    rows_per_chunk = chunk_size or _chunk_size(rows, logits_per_row, device)
    if not needs_grad:
        return ChunkPlan("tile", rows_per_chunk)
    chunks_per_product = 1
    if half_precision and head_needs_grad:
        chunks_per_product = _chunks_per_product(rows, rows_per_chunk, logits_per_row, device)
    if has_objective:
        # The objective takes its gradient while the logits live, so the backward pass needs none of them.
        return ChunkPlan("local", rows_per_chunk, chunks_per_product=chunks_per_product)
    unit_is_possible = not head_needs_grad and not entropy
    if mode == "unit" or (mode == "auto" and unit_is_possible):
        return ChunkPlan("unit", rows_per_chunk)
    chunks_cached = _chunks_to_cache(mode, rows, rows_per_chunk, logits_per_row, device)
    return ChunkPlan("save" if chunks_cached else "recompute", rows_per_chunk, chunks_cached, chunks_per_product)


def _chunk_size(rows: int, logits_per_row: int, device: torch.device) -> int:
    # Each chunk reads the weight once more: with few rows that costs time.
    on_cpu = device.type == "cpu"
    # The budget bounds one chunk of float32 logits, 4 bytes each.
    memory_budget = 2**29 if on_cpu else _gpu_budget(device) // 4  # bytes
    fewest_rows, most_rows = (64, 512) if on_cpu else (512, 8192)
    rows_per_chunk = min(max(memory_budget // (logits_per_row * 4), fewest_rows), most_rows)
    # Balanced chunks: the last one is not a sliver.
    num_chunks = max(-(-rows // rows_per_chunk), 1)
    balanced = max(-(-rows // num_chunks), 1)
    # A GPU computes a product in tiles; part of a tile costs as much as a whole one.
    return balanced if on_cpu or num_chunks == 1 else _round_up(balanced, TILE_ROWS)


def _chunks_per_product(rows: int, rows_per_chunk: int, logits_per_row: int, device: torch.device) -> int:
    num_chunks = max(-(-rows // rows_per_chunk), 1)
    # Gradients in half precision, 2 bytes each.
    most_chunks = max(_gpu_budget(device) // (rows_per_chunk * logits_per_row * 2), 1)
    num_products = -(-num_chunks // most_chunks)
    return -(-num_chunks // num_products)


def _gpu_budget(device: torch.device) -> int:
    """Bytes for the gradients of logits on a GPU; a quarter of it goes to the logits of a chunk."""
    if device.type != "cuda":
        return 2**32
    free_memory, total_memory = torch.cuda.mem_get_info(device)
    # PyTorch keeps what it has freed for its next tensors.
    free_memory += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # A share of the whole card, so that chunks are the same in each step, unless the card is nearly full.
    return min(total_memory // 32, free_memory // 4)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _chunks_to_cache(mode: Mode, rows: int, rows_per_chunk: int, logits_per_row: int, device: torch.device) -> int:
    num_chunks = -(-rows // rows_per_chunk)
    if mode != "auto":  # "save" or "recompute": somebody decided
        return num_chunks if mode == "save" else 0
    if device.type != "cpu":
        return 0  # a GPU's memory is wanted elsewhere, and its matrix products are cheap
    # Three quarters of the free memory stay free: the backward pass of the backbone comes on top.
    memory_budget = min(2**31, psutil.virtual_memory().available // 4)
    return min(num_chunks, memory_budget // (rows_per_chunk * logits_per_row * 4))
