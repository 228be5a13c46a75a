"""Which prompts come next: rows of a data set in the order of their epochs, or rows of a stream as they come."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

BUFFER = 1000  # rows of a stream that are shuffled among each other


class Prompts:
    """Hands out prompts, the same for any number of processes, and knows how far it is.

    Args:
        rows: with ``prompt_ids``; or a stream of rows as they are in a file, which begins again when it ends.
        seed: of the order.
        shuffle: draw in a random order, another one in each epoch.
        prepare: gives rows of a stream their ``prompt_ids``, and may leave some out.
    """

    def __init__(self, rows: Any, seed: int, shuffle: bool, prepare: Callable[[Dataset], Dataset]) -> None:
        self.rows, self.seed, self.shuffle, self.prepare = rows, seed, shuffle, prepare
        self.drawn = 0  # so far; of a stream, rows that were read
        self._stream: Iterator[dict[str, Any]] | None = None

    def draw(self, count: int) -> list[dict[str, Any]]:
        if isinstance(self.rows, IterableDataset):
            return self._read(count)
        found = []
        for place in range(self.drawn, self.drawn + count):
            epoch, index = divmod(place, len(self.rows))
            found.append(self.rows[int(self._order(epoch)[index])])
        self.drawn += count
        return found

    def _order(self, epoch: int) -> Any:
        size = len(self.rows)
        if not self.shuffle:
            return range(size)
        return np.random.default_rng((self.seed, epoch)).permutation(size)

    def _read(self, count: int) -> list[dict[str, Any]]:
        if self._stream is None:  # at the start, or where a run goes on
            self._stream = islice(self._endless(), self.drawn, None)
        found: list[dict[str, Any]] = []
        while len(found) < count:
            rows = list(islice(self._stream, count - len(found)))
            self.drawn += len(rows)
            with _quiet():
                found += self.prepare(Dataset.from_list(rows))
        return found

    def _endless(self) -> Iterator[dict[str, Any]]:
        rows = self.rows.shuffle(seed=self.seed, buffer_size=BUFFER) if self.shuffle else self.rows
        epoch, seen = 0, -1
        while seen:
            rows.set_epoch(epoch)
            epoch, seen = epoch + 1, 0
            for seen, row in enumerate(rows, start=1):  # noqa: B007  # counted
                yield row
        raise ValueError("the stream of prompts has no rows")


@contextmanager
def _quiet() -> Iterator[None]:
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
