"""Wrappers around Hugging Face models; no architectures."""

from rlhf.models.loading import add_adapter, disable_dropout, load_model, load_tokenizer
from rlhf.models.policy import Policy

__all__ = ["Policy", "add_adapter", "disable_dropout", "load_model", "load_tokenizer"]
