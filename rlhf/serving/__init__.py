"""After training: talk to a model, merge its adapter, and export it."""

from rlhf.serving.chat_model import ChatModel
from rlhf.serving.display import Display
from rlhf.serving.input_lines import lines_of, read_prompt
from rlhf.serving.session import Chat

__all__ = ["Chat", "ChatModel", "Display", "lines_of", "read_prompt"]
