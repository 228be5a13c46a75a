"""The rows of a model's embeddings: how many there are, and more of them for new tokens."""

import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def vocabulary_size(model: Any) -> int:
    """Count the rows of the input embeddings, also under an adapter.

    Args:
        model: A transformers or PEFT model.

    Returns:
        The number of rows; it may be larger than the tokenizer's vocabulary.
    """
    module: Any = model.get_input_embeddings()
    # PEFT keeps the embeddings under one name for LoRA, and under the other where they are trained as a whole.
    for name in ("base_layer", "original_module"):
        module = getattr(module, name, module)
    return int(module.weight.size(0))


def grown_size(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the rows of the embeddings after :func:`grow`.

    Args:
        model: A transformers or PEFT model.
        tokenizer: May have more tokens than the model.

    Returns:
        As many rows as now, or one for each token if tokens were added to the tokenizer.
    """
    num_rows = vocabulary_size(model)
    added_ids = [token_id for token_id in tokenizer.added_tokens_decoder if token_id >= num_rows]
    # A tokenizer of another model may be larger, too: then the ids behind the embeddings are not all added tokens.
    are_all_added = len(tokenizer) - num_rows == len(added_ids)
    return len(tokenizer) if added_ids and are_all_added else num_rows


def grow(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Grow the embeddings by the tokens that were added to the tokenizer.

    New rows are drawn about the mean of the others, as transformers' ``resize_token_embeddings`` does.

    Args:
        model: A transformers or PEFT model.
        tokenizer: Its tokenizer.

    Returns:
        The new ids.
    """
    num_rows, wanted_rows = vocabulary_size(model), grown_size(model, tokenizer)
    if wanted_rows > num_rows:
        logger.info(
            "the tokenizer has %d more tokens than the model: its embeddings grow to %d",
            wanted_rows - num_rows,
            wanted_rows,
        )
        resize(model, wanted_rows)
    return list(range(num_rows, wanted_rows))


def resize(model: Any, rows: int) -> None:
    """Give the embeddings another number of rows.

    Args:
        model: A transformers or PEFT model.
        rows: The new number.
    """
    model.resize_token_embeddings(rows)
    # Set on the transformers model, where saving an adapter looks for the name.
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    base_model.name_or_path = ""  # no checkpoint holds these weights
