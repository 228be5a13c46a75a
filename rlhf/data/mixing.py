"""Several data sets as one: each is tokenised by itself, whatever its columns, and then they are mixed."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from rlhf.data.packing import num_tokens
from rlhf.data.reading import load_data
from rlhf.data.streams import name_of

logger = logging.getLogger(__name__)

Rows: TypeAlias = Dataset | IterableDataset
_SOURCE = "_source"


@dataclass(frozen=True)
class Mixture:
    """Data sets to train on together.

    Args:
        parts: the data sets, each with columns of its own.
        weights: shares, in any unit; without them, all rows of all are taken, one set after the other. With them, each
            row comes from a set drawn with these chances, until a set has no row left; no row comes twice.
        by: what the shares are of: ``"rows"``, or ``"tokens"`` of the tokenised rows.
    Raises:
        ValueError: no parts, a weight for each is missing or not above 0, or tokens of a stream.
    """

    parts: tuple[Rows, ...]
    weights: tuple[float, ...] | None = None
    by: Literal["rows", "tokens"] = "rows"

    def __post_init__(self) -> None:
        names = ", ".join(map(name_of, self.parts)) or "none"
        if self.by not in ("rows", "tokens"):
            raise ValueError(f"a mixture is by rows or by tokens, got {self.by!r}")
        if not self.parts:
            raise ValueError("a mixture of no data sets")
        if self.weights is not None and (len(self.weights) != len(self.parts) or min(self.weights) <= 0):
            raise ValueError(f"give each data set a weight above 0, or none: {names}; weights {self.weights}")
        streams = sum(isinstance(part, IterableDataset) for part in self.parts)
        if streams not in (0, len(self.parts)):
            raise ValueError(f"streams mix with streams only: {names}")
        if streams and self.by == "tokens":
            raise ValueError("a mixture by tokens counts them first, which a stream does not allow: mix by rows")

    def tokenised(self, tokenize: Callable[[Rows], Rows], seed: int) -> Rows:
        """All parts by ``tokenize``, mixed; the same for the same seed."""
        done = [tokenize(part) for part in self.parts]
        if isinstance(done[0], IterableDataset):
            return self._streamed(done, seed)
        rows = [part.add_column(_SOURCE, [index] * len(part)) for index, part in enumerate(_alike(done))]
        if self.weights is None:
            mixed = concatenate_datasets(rows)
        else:
            chances = self._chances(done)
            # A set may be sorted, and its end is left out where another is used up first.
            rows = [part.shuffle(seed=seed) for part in rows]
            mixed = interleave_datasets(rows, probabilities=chances, seed=seed, stopping_strategy="first_exhausted")
        self._tell(done, mixed)
        return mixed.remove_columns(_SOURCE)

    def _chances(self, rows: Sequence[Any]) -> list[float]:
        """Of drawing a row of each part."""
        weights = np.array(self.weights, dtype=float)
        if self.by == "tokens":
            weights /= [max(num_tokens(part).mean(), 1) for part in rows]
        return (weights / weights.sum()).tolist()

    def _streamed(self, streams: list[Any], seed: int) -> IterableDataset:
        if self.weights is None:
            return concatenate_datasets(streams)
        chances = self._chances(streams)
        for part, chance in zip(self.parts, chances, strict=True):
            logger.info("%s: %.1f %% of the rows", name_of(part), 100 * chance)
        return interleave_datasets(streams, probabilities=chances, seed=seed, stopping_strategy="first_exhausted")

    def _tell(self, parts: Sequence[Any], mixed: Any) -> None:
        sources = np.array(mixed[_SOURCE][:])
        tokens = num_tokens(mixed)
        for index, part in enumerate(parts):
            own = sources == index
            logger.info(
                "%s: %d of %d rows: %.1f %% of all rows, %.1f %% of all tokens", name_of(self.parts[index]), own.sum(),
                len(part), 100 * own.mean(), 100 * tokens[own].sum() / max(tokens.sum(), 1),
            )  # fmt: skip


def load_datasets(
    sources: str | Sequence[str] | Mapping[str, float],
    split: str = "train",
    name: str | None = None,
    *,
    mixture: str = "rows",
    streaming: bool = False,
) -> Rows | Mixture:
    """One data set, or a mixture of several: ``["a.jsonl:0.7", "b.parquet:0.3"]``, or names to weights.

    Args:
        sources: as :func:`load_data` takes them, each with its weight after a colon, or all without.
        split, name, streaming: as in :func:`load_data`, for each.
        mixture: whether weights are shares of ``"rows"`` or of ``"tokens"``.
    Raises:
        ValueError: some have a weight and some have none; or a fault of a data set.
    """
    given = [sources] if isinstance(sources, str) else list(sources)
    pairs = list(sources.items()) if isinstance(sources, Mapping) else [_split_weight(source) for source in given]
    weights = [weight for _, weight in pairs if weight is not None]
    if weights and len(weights) < len(pairs):
        bare = next(source for source, weight in pairs if weight is None)
        raise ValueError(f"{bare} has no weight, but others have: give each one (name:0.5), or none")
    parts = tuple(load_data(source, split, name, streaming) for source, _ in pairs)
    if len(parts) == 1:
        return parts[0]
    return Mixture(parts, tuple(map(float, weights)) or None, mixture)  # type: ignore[arg-type]  # checked there


def shuffled(rows: Rows | Mixture, seed: int, buffer: int) -> Any:
    """Streams whose rows are drawn from the next ``buffer`` ones (0: in their order); other rows as they are."""
    if isinstance(rows, Mixture):
        return replace(rows, parts=tuple(shuffled(part, seed, buffer) for part in rows.parts))
    if not isinstance(rows, IterableDataset) or buffer == 0:
        return rows
    mixed = rows.shuffle(seed=seed, buffer_size=buffer)
    mixed.info.dataset_name = rows.info.dataset_name
    return mixed


def _split_weight(source: str) -> tuple[str, float | None]:
    """``a.jsonl:0.7`` taken apart; a file that has such a name is a file."""
    found = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", source)
    if found is None or Path(source).exists():
        return source, None
    return found.group(1), float(found.group(2))


def _alike(parts: Sequence[Any]) -> list[Any]:
    """The parts with the columns that only some of them have: what it means not to have them."""
    names = {name for part in parts for name in part.column_names}
    filled = []
    for part in parts:
        missing = names - set(part.column_names)
        if "margin" in missing:
            part = part.add_column("margin", [0.0] * len(part))
        if "labels" in missing and "chosen_ids" in names:
            part = part.map(lambda row: {"labels": [row["chosen_ids"], row["rejected_ids"]]})
        filled.append(part)
    return filled
