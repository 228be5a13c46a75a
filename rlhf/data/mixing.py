"""Several data sets as one: each is tokenised by itself, whatever its columns, and then they are mixed."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import IterableDataset, concatenate_datasets, interleave_datasets

from rlhf.data.packing import num_tokens
from rlhf.data.reading import Rows, load_data
from rlhf.data.streams import name_of

logger = logging.getLogger(__name__)

_SOURCE = "_source"  # column: the index of the data set that a row came from


@dataclass(frozen=True)
class Mixture:
    """Data sets to train on together.

    Args:
        parts: The data sets; their columns may differ.
        weights: Shares, in any unit. With them, each row is drawn from one of the sets with these probabilities, until
            one set has no row left; no row comes twice. Without them, all rows are taken, one set after the other.
        by: What the shares are of: ``"rows"``, or ``"tokens"`` of the tokenised rows.

    Raises:
        ValueError: There are no parts, a weight is missing or not above 0, or tokens of a stream are to be counted.
    """

    parts: tuple[Rows, ...]
    weights: tuple[float, ...] | None = None
    by: Literal["rows", "tokens"] = "rows"

    def __post_init__(self) -> None:
        part_names = ", ".join(map(name_of, self.parts)) or "none"
        if self.by not in ("rows", "tokens"):
            raise ValueError(f"a mixture is by rows or by tokens, got {self.by!r}")
        if not self.parts:
            raise ValueError("a mixture of no data sets")
        if self.weights is not None and (len(self.weights) != len(self.parts) or min(self.weights) <= 0):
            raise ValueError(f"give each data set a weight above 0, or none: {part_names}; weights {self.weights}")
        stream_parts = [dataset for dataset in self.parts if isinstance(dataset, IterableDataset)]
        # `datasets` mixes neither kind with the other.
        if stream_parts and len(stream_parts) < len(self.parts):
            raise ValueError(f"streams mix with streams only: {part_names}")
        if stream_parts and self.by == "tokens":
            raise ValueError("a mixture by tokens counts them first, which a stream does not allow: mix by rows")

    def tokenised(self, tokenize: Callable[[Rows], Rows], seed: int) -> Rows:
        """Tokenise all parts and mix them.

        Args:
            tokenize: Tokenises one data set.
            seed: Decides which rows are drawn.

        Returns:
            The mixed rows.
        """
        tokenised_parts = [tokenize(dataset) for dataset in self.parts]
        if isinstance(tokenised_parts[0], IterableDataset):  # of one kind: all parts are streams, or none is
            return self._mix_streams(tokenised_parts, seed)
        # The source stays a column while rows are mixed, so that the log shows the real shares.
        with_sources = [
            dataset.add_column(_SOURCE, [index] * len(dataset))
            for index, dataset in enumerate(_with_all_columns(tokenised_parts))
        ]
        if self.weights is None:
            mixed_rows = concatenate_datasets(with_sources)
        else:
            # A set may be sorted, and its last rows are left out if another set is used up first.
            mixed_rows = _interleave(
                [dataset.shuffle(seed=seed) for dataset in with_sources], self._probabilities(tokenised_parts), seed
            )
        self._log_shares(tokenised_parts, mixed_rows)
        return mixed_rows.remove_columns(_SOURCE)

    def _probabilities(self, parts: Sequence[Any]) -> list[float]:
        """Of drawing a row from each part."""
        draw_weights = np.array(self.weights, dtype=float)
        if self.by == "tokens":
            mean_lengths = [num_tokens(dataset).mean() for dataset in parts]
            draw_weights /= np.maximum(mean_lengths, 1)  # a set of long rows needs fewer of them
        return (draw_weights / draw_weights.sum()).tolist()

    def _mix_streams(self, streams: list[Any], seed: int) -> IterableDataset:
        if self.weights is None:
            return concatenate_datasets(streams)
        probabilities = self._probabilities(streams)
        for dataset, probability in zip(self.parts, probabilities, strict=True):
            logger.info("%s: %.1f %% of the rows", name_of(dataset), 100 * probability)
        return _interleave(streams, probabilities, seed)

    def _log_shares(self, parts: Sequence[Any], mixed: Any) -> None:
        row_sources = np.array(mixed[_SOURCE][:])
        token_counts = num_tokens(mixed)
        for part_index, dataset in enumerate(parts):
            is_from_part = row_sources == part_index
            row_share = 100 * is_from_part.mean()
            token_share = 100 * token_counts[is_from_part].sum() / max(token_counts.sum(), 1)
            logger.info(
                "%s: %d of %d rows: %.1f %% of all rows, %.1f %% of all tokens",
                name_of(self.parts[part_index]),
                is_from_part.sum(),
                len(dataset),
                row_share,
                token_share,
            )


def _interleave(parts: list[Any], probabilities: list[float], seed: int) -> Any:
    """Draw rows from the parts until one of them is used up."""
    # To go on with the other sets would change the shares; to begin a set again would repeat rows.
    return interleave_datasets(parts, probabilities=probabilities, seed=seed, stopping_strategy="first_exhausted")


def load_datasets(
    sources: str | Sequence[str] | Mapping[str, float],
    split: str = "train",
    name: str | None = None,
    *,
    mixture: str = "rows",
    streaming: bool = False,
) -> Rows | Mixture:
    """Load one data set, or a mixture of several: ``["a.jsonl:0.7", "b.parquet:0.3"]``, or names to weights.

    Args:
        sources: As :func:`load_data` takes them, each with its weight after a colon, or all without.
        split: As in :func:`load_data`, for each.
        name: As in :func:`load_data`, for each.
        mixture: Whether weights are shares of ``"rows"`` or of ``"tokens"``.
        streaming: As in :func:`load_data`, for each.

    Returns:
        The rows of one data set, or the mixture.

    Raises:
        ValueError: Some have a weight and some have none; or a data set cannot be read.
    """
    weighted_sources: list[tuple[str, float | None]]
    if isinstance(sources, Mapping):
        weighted_sources = list(sources.items())
    else:
        weighted_sources = [_split_weight(source) for source in ([sources] if isinstance(sources, str) else sources)]
    weights = [float(weight) for _, weight in weighted_sources if weight is not None]
    if weights and len(weights) < len(weighted_sources):
        unweighted = next(source for source, weight in weighted_sources if weight is None)
        raise ValueError(f"{unweighted} has no weight, but others have: give each one (name:0.5), or none")
    parts = tuple(load_data(source, split, name, streaming) for source, _ in weighted_sources)
    if len(parts) == 1:
        return parts[0]  # a weight of one set means nothing
    return Mixture(parts, tuple(weights) or None, mixture)  # type: ignore[arg-type]  # Mixture checks the word


def shuffled(rows: Rows | Mixture, seed: int, buffer: int) -> Any:
    """Shuffle streams; other rows stay as they are, as a sampler shuffles them.

    Args:
        rows: Rows or a mixture.
        seed: Decides the order.
        buffer: Number of next rows from which each row is drawn; 0 keeps the order.

    Returns:
        The rows.
    """
    if isinstance(rows, Mixture):
        return replace(rows, parts=tuple(shuffled(dataset, seed, buffer) for dataset in rows.parts))
    if not isinstance(rows, IterableDataset) or buffer == 0:
        return rows
    in_new_order = rows.shuffle(seed=seed, buffer_size=buffer)
    # `shuffle` returns a new stream, which has lost its name.
    in_new_order.info.dataset_name = rows.info.dataset_name
    return in_new_order


def _split_weight(source: str) -> tuple[str, float | None]:
    """Split ``a.jsonl:0.7`` into source and weight. If a file has such a name, it is the file."""
    weight_match = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", source)
    if weight_match is None or Path(source).exists():
        return source, None
    return weight_match.group(1), float(weight_match.group(2))


def _with_all_columns(parts: Sequence[Any]) -> list[Any]:
    """The parts with the columns that only some of them have, filled with the values that their absence means."""
    all_columns = {column_name for dataset in parts for column_name in dataset.column_names}
    filled_parts = []
    for dataset in parts:
        missing_columns = all_columns - set(dataset.column_names)
        # A loss without margins is one with margins of 0.
        if "margin" in missing_columns:
            dataset = dataset.add_column("margin", [0.0] * len(dataset))
        # Labels are left out where every token is scored: there, ids are labels.
        if "labels" in missing_columns and "chosen_ids" in all_columns:
            dataset = dataset.map(lambda row: {"labels": [row["chosen_ids"], row["rejected_ids"]]})
        filled_parts.append(dataset)
    return filled_parts
