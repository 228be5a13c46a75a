"""Decoding steps as CUDA graphs: a step has hundreds of small kernels, and a graph launches all of them at once."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.rollouts.static_cache import StaticCache

logger = logging.getLogger(__name__)

FEWEST_STEPS = 16  # a capture costs about two steps, so shorter completions gain nothing
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
    as usual and is captured anew. A model that cannot be captured (one that waits for the device in its forward) keeps
    running as usual; this is logged once.

    Args:
        step: computes logits and writes keys and values into the cache.
        cache: of the batch that is decoded.
    """

    def __init__(self, step: Step, cache: StaticCache) -> None:
        self.step, self.cache = step, cache
        self.unsupported_reason: str | None = None
        self._captured_for: tuple[int, int] | None = None  # rows and columns
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._token: Tensor | None = None
        self._positions: Tensor | None = None
        self._logits: Tensor | None = None

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
        if self._captured_for == (len(token), self.cache.columns):
            assert self._graph is not None and self._token is not None and self._positions is not None
            assert self._logits is not None
            self._token.copy_(token)
            self._positions.copy_(positions)
            self._graph.replay()
            return self._logits
        # The step itself, outside the graph: a capture computes nothing, and libraries set themselves up here.
        logits = self.step(token, positions)
        self._capture(token, positions)
        return logits

    def _capture(self, token: Tensor, positions: Tensor) -> None:
        self._graph = self._logits = None  # their memory is used again
        self._token, self._positions = token.clone(), positions.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (that pin memory, or watch NCCL) may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._logits = self.step(self._token, self._positions)
        except RuntimeError as error:
            self.unsupported_reason = next(iter(str(error).splitlines()), "")
            logger.warning(
                "decoding without CUDA graphs, because a step cannot be captured (%s): exact, slower",
                self.unsupported_reason,
            )
            return
        self._graph, self._captured_for = graph, (len(token), self.cache.columns)
