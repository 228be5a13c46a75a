"""A conversation in memory: exchanges that can be undone, retried and saved as a row of training data."""

from dataclasses import dataclass, field
from typing import Any

from rlhf.data.messages import Message


@dataclass
class Conversation:
    """Questions and answers.

    Attributes:
        system: the system message; None for none.
        tools: schemas of tools for the chat template; None for none.
        exchanges: each a question, or the result of a tool, and its answer. An exchange without an answer is empty, so
            that two models count alike.
    """

    system: str | None = None
    tools: list[Any] | None = None
    exchanges: list[list[Message]] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """The messages for the chat template.

        Returns:
            The system message, if there is one, and all exchanges.
        """
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + [message for exchange in self.exchanges for message in exchange]

    def rows(self) -> list[dict[str, Any]]:
        """The conversation as rows that ``rlhf sft`` reads.

        Returns:
            One row of messages. A model without a chat template has one row of text for each exchange.
        """
        exchanges = [exchange for exchange in self.exchanges if exchange]
        if not exchanges:
            return []
        if exchanges[0][0]["role"] == "text":
            return [{"prompt": prompt["content"], "completion": answer["content"]} for prompt, answer in exchanges]
        row: dict[str, Any] = {"messages": self.messages()}
        return [row] if self.tools is None else [{**row, "tools": self.tools}]
