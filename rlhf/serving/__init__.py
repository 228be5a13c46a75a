"""After training: talk to a model, merge its adapter, and export it."""

from rlhf.serving.chat_model import ChatModel
from rlhf.serving.display import Display
from rlhf.serving.input_lines import lines_of, read_prompt
from rlhf.serving.merging import TOLERANCES, Merged, merge
from rlhf.serving.session import Chat

__all__ = [
    "TOLERANCES",
    "Chat",
    "ChatModel",
    "Display",
    "Merged",
    "lines_of",
    "merge",
    "read_prompt",
]
