"""The rows of a model's embeddings: how many there are, and more of them for new tokens."""

import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def vocabulary_size(model: Any) -> int:
    """Rows of the input embeddings, also under an adapter."""
    module: Any = model.get_input_embeddings()
    for name in ("base_layer", "original_module"):
        module = getattr(module, name, module)
    return int(module.weight.size(0))


def room(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of the embeddings after :func:`grow`: as many as now, or one for each token that was added since."""
    size = vocabulary_size(model)
    added = [index for index in tokenizer.added_tokens_decoder if index >= size]
    return len(tokenizer) if added and len(tokenizer) - size == len(added) else size


def grow(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Let the embeddings grow by tokens that were added to the tokenizer; the ids that are new.

    New rows are drawn about the mean of the others (transformers' ``resize_token_embeddings``).
    """
    size, wanted = vocabulary_size(model), room(model, tokenizer)
    if wanted > size:
        logger.info("the tokenizer has %d more tokens than the model: its embeddings grow to %d", wanted - size, wanted)
        resize(model, wanted)
    return list(range(size, wanted))


def resize(model: Any, rows: int) -> None:
    model.resize_token_embeddings(rows)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.name_or_path = ""  # no checkpoint holds these weights
