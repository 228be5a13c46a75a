"""A fingerprint of training rows that is the same in every process, so that changed rows are noticed."""

import json
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset

from rlhf.data.packing import Packed, hash_of_tokens

LARGEST = 2 << 30  # bytes of rows that are read whole, at some GB/s
SAMPLE = 1000  # rows that are read one by one


def fingerprint(rows: Any, without: Collection[str] = ()) -> str | None:
    """Hash tokenised rows.

    All tokens are hashed. Of larger data, and of columns that are no tokens, 1000 rows that lie evenly are.

    Args:
        rows: Tokenised rows, packed or not.
        without: Columns that are left out.

    Returns:
        The number of rows and a hash; None for a stream, whose rows are not known before they are read.
    """
    rows = rows.rows if isinstance(rows, Packed) else rows
    if not isinstance(rows, Dataset):
        return None
    rows = rows.remove_columns([name for name in without if name in rows.column_names])
    token_columns = [name for name, column in zip(rows.column_names, rows.data.schema, strict=True) if _has_ids(column)]
    digest = xxhash.xxh3_64()
    # As they lie on disk: rows in the order of a shuffle are gathered fifty times as slowly.
    if rows.data.nbytes <= LARGEST:
        digest.update(hash_of_tokens(Dataset(rows.data), token_columns).encode())
    chosen = rows.select(np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows)), dtype=np.int64))
    digest.update(json.dumps(chosen.to_list(), sort_keys=True, default=str).encode())
    return f"{len(rows)} rows {digest.hexdigest()}"


def _has_ids(column: pa.Field) -> bool:
    """Whether a column has lists of ids, nested or not."""
    item_type = column.type
    while pa.types.is_list(item_type):
        item_type = item_type.value_type
    return pa.types.is_list(column.type) and (pa.types.is_integer(item_type) or pa.types.is_null(item_type))
