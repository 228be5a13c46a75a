"""Decoding steps as CUDA graphs: a step has hundreds of small kernels, and a graph launches all of them at once."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.rollouts.static_cache import StaticCache

logger = logging.getLogger(__name__)

FEWEST_STEPS = 16  # a capture costs about two steps, so shorter completions gain nothing
# Logits of a replayed step against those of the step itself, relative to the largest.
TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-2
Step = Callable[[Tensor, Tensor], Tensor]  # token and position of each row, int64 [R] each, to logits [R, V]


def can_use_graphs(device: torch.device) -> bool:
    """Whether steps on a device can be captured.

    Args:
        device: of the model.
    Returns:
        True on a GPU.
    """
    return device.type == "cuda"


class GraphedSteps:
    """Runs a decoding step, captures it as a CUDA graph, and replays the graph from then on.

    A graph belongs to a number of rows and to the columns that attention reads; where these change, the next step runs
    as usual and is captured anew. The first replay is compared with the step itself. A model that cannot be captured
    (one that waits for the device in its forward), or whose replay differs, keeps running as usual; this is logged
    once.

    Args:
        step: computes logits and writes keys and values into the cache.
        cache: of the batch that is decoded.
    """

    def __init__(self, step: Step, cache: StaticCache) -> None:
        self.step, self.cache = step, cache
        self.unsupported_reason: str | None = None
        self._captured: CapturedStep | None = None
        self._is_verified = False
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, token: Tensor, positions: Tensor) -> Tensor:
        """Run one step.

        Args:
            token: int64 [R], the newest token of each row.
            positions: int64 [R], of these tokens.
        Returns:
            Logits, [R, V]; the next step overwrites them.
        """
        if self.unsupported_reason is not None:
            return self.step(token, positions)
        captured = self._captured
        if captured is not None and captured.shape == (len(token), self.cache.columns):
            replayed_logits = captured.replay(token, positions)
            return replayed_logits if self._is_verified else self._verified(replayed_logits, token, positions)
        # The step itself, outside the graph: a capture computes nothing, and libraries set themselves up here.
        logits = self.step(token, positions)
        self._capture(token, positions)
        return logits

    def _verified(self, replayed_logits: Tensor, token: Tensor, positions: Tensor) -> Tensor:
        """Compare the first replay with the step itself: a graph holds what did not come from a tensor as it was."""
        logits = self.step(token, positions)
        tolerance = TOLERANCE if logits.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
        difference = float((replayed_logits - logits).abs().max())
        # Not `>`: NaN is a difference too.
        if not difference <= tolerance * float(logits.abs().max()):
            self._give_up(f"its logits differ by {difference:.2g}")
        self._is_verified = True
        return logits

    def _capture(self, token: Tensor, positions: Tensor) -> None:
        self._captured = None  # its memory is used again
        stream = torch.cuda.current_stream()
        try:
            shape = (len(token), self.cache.columns)
            self._captured = CapturedStep(self.step, token, positions, shape, self._pool)
        except RuntimeError as error:
            # The stream of a capture that fails stays the current one.
            torch.cuda.set_stream(stream)
            self._give_up(next(iter(str(error).splitlines()), ""))

    def _give_up(self, reason: str) -> None:
        self.unsupported_reason = reason
        logger.warning("decoding without CUDA graphs, because a step cannot be captured (%s): exact, slower", reason)


class CapturedStep:
    """One graph, and the tensors that it reads and writes.

    Args:
        step: that is captured.
        token: int64 [R].
        positions: int64 [R].
        shape: rows and columns that it is for.
        pool: memory that graphs of one request share.
    Raises:
        RuntimeError: the step cannot be captured.
    """

    def __init__(self, step: Step, token: Tensor, positions: Tensor, shape: tuple[int, int], pool: Any) -> None:
        self.shape = shape
        self._token, self._positions = token.clone(), positions.clone()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (that pin memory, or watch NCCL) may use the device meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._logits = step(self._token, self._positions)

    def replay(self, token: Tensor, positions: Tensor) -> Tensor:
        """Run the step again.

        Args:
            token: int64 [R].
            positions: int64 [R].
        Returns:
            Logits, [R, V], in the memory of the last replay.
        """
        self._token.copy_(token)
        self._positions.copy_(positions)
        self._graph.replay()
        return self._logits
