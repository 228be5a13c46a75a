"""Wrappers around Hugging Face models; no architectures."""

from rlhf.models.attention import choose_layout, use_segments
from rlhf.models.loading import add_adapter, disable_dropout, load_model, load_tokenizer
from rlhf.models.policy import Policy

__all__ = ["Policy", "add_adapter", "choose_layout", "disable_dropout", "load_model", "load_tokenizer", "use_segments"]
