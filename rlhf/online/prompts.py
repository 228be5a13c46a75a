"""Which prompts come next: rows of a data set in the order of their epochs, or rows of a stream as they come."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset

from rlhf.data import Endless

BUFFER_SIZE = 1000  # rows of a stream that are shuffled among each other

Row = dict[str, Any]


class Prompts:
    """Prompts in an order that is the same for any number of processes; knows how many were drawn.

    Args:
        rows: with ``prompt_ids``; or a stream of rows as they are in a file, which begins again at its end.
        seed: of the order, which is another one in each epoch.
        shuffle: whether to shuffle at all.
        prepare: gives rows of a stream their ``prompt_ids``, and may leave some out.
    """

    def __init__(
        self, rows: Dataset | IterableDataset, seed: int, shuffle: bool, prepare: Callable[[Dataset], Dataset]
    ) -> None:
        self.rows, self.seed, self.shuffle, self.prepare = rows, seed, shuffle, prepare
        self.drawn = 0  # rows; of a stream, those that were left out too
        self._stream: Iterator[Row] | None = None
        self._epoch = -1
        self._order: np.ndarray = np.empty(0)  # of the rows in that epoch

    def draw(self, count: int) -> list[Row]:
        """The next prompts.

        Args:
            count: how many; an epoch may end and the next one begin among them.
        Returns:
            Rows with ``prompt_ids``.
        Raises:
            ValueError: a stream without rows.
        """
        if isinstance(self.rows, IterableDataset):
            return self._draw_from_stream(count)
        prompts = []
        for position in range(self.drawn, self.drawn + count):
            epoch, index = divmod(position, len(self.rows))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._order_of(epoch)
            prompts.append(self.rows[int(self._order[index])])
        self.drawn += count
        return prompts

    def go_to(self, drawn: int) -> None:
        """Go on as if so many rows had been drawn.

        Args:
            drawn: rows; of a stream, those that were left out too.
        """
        self.drawn, self._stream = drawn, None

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.rows))
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))

    def _draw_from_stream(self, count: int) -> list[Row]:
        if self._stream is None:
            rows = self.rows.shuffle(seed=self.seed, buffer_size=BUFFER_SIZE) if self.shuffle else self.rows
            # A stream cannot be indexed: a resumed run reads again what was read before.
            self._stream = islice(Endless(rows), self.drawn, None)
        prompts: list[Row] = []
        while len(prompts) < count:
            rows_read = list(islice(self._stream, count - len(prompts)))
            if not rows_read:
                raise ValueError("the stream of prompts has no rows")
            self.drawn += len(rows_read)
            with _no_progress_bars():
                prompts += self.prepare(Dataset.from_list(rows_read))
        return prompts


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Tokenising a few rows at each rollout needs no bar of its own."""
    were_shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()
