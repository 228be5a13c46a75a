"""How rows are read, for commands that do not train; the training commands have the same options."""

from dataclasses import dataclass, field
from typing import Any

from rlhf.data import Reading, RowFormat
from rlhf.data.messages import from_json
from rlhf.trainers.config import renames


@dataclass
class RowArguments:
    """Names of columns and roles, and arguments of the chat template."""

    chat_template_path: str | None = field(default=None, metadata={"help": "Template file, or a model folder."})
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": 'JSON for the chat template, such as {"enable_thinking": false}.'}
    )
    columns: str | None = field(
        default=None, metadata={"help": "Columns under other names: question=prompt,answer=completion."}
    )
    roles: str | None = field(
        default=None, metadata={"help": "Roles under other names: customer=user,agent=assistant."}
    )

    def template_kwargs(self) -> dict[str, Any]:
        """Arguments of the chat template for every row.

        Returns:
            Keyword arguments of the chat template.

        Raises:
            ValueError: no JSON object.
        """
        given = self.chat_template_kwargs
        # In a config file it may be an object already.
        arguments = from_json(given) if isinstance(given, str) else given or {}
        if not isinstance(arguments, dict):
            raise ValueError(f"--chat_template_kwargs is no JSON object: {given}")
        return arguments

    def reading(self, split_turns: bool = False) -> Reading:
        """How rows are read.

        Args:
            split_turns: whether each answer of a conversation is a row of its own.

        Returns:
            How rows are read.
        """
        row_format = RowFormat(
            columns=renames(self.columns, "columns"),
            roles=renames(self.roles, "roles"),
            template_kwargs=self.template_kwargs(),
        )
        return Reading(row_format, split_turns=split_turns)
