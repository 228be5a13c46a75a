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


def fit_embeddings(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the embeddings grow by tokens that were added to the tokenizer.

    New rows are drawn about the mean of the others (transformers' ``resize_token_embeddings``).
    """
    size = vocabulary_size(model)
    added = [index for index in tokenizer.added_tokens_decoder if index >= size]
    if not added or len(tokenizer) - size != len(added):
        return
    logger.info(
        "the tokenizer has %d more tokens than the model: its embeddings grow to %d", len(added), len(tokenizer)
    )
    model.resize_token_embeddings(len(tokenizer))
    model.name_or_path = ""  # no checkpoint holds these weights
