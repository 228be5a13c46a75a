"""How rows are read, for commands that do not train; the training commands have the same options."""

from dataclasses import dataclass, field
from typing import Any

from rlhf.data import Reading, RowFormat
from rlhf.data.messages import from_json
from rlhf.trainers.config import renames


@dataclass
class RowArguments:
    """Names of columns and roles, and what the chat template gets."""

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
        """What the chat template gets for every row.

        Raises:
            ValueError: no JSON object.
        """
        given = self.chat_template_kwargs
        found = from_json(given) if isinstance(given, str) else given or {}  # of YAML it is an object
        if not isinstance(found, dict):
            raise ValueError(f"--chat_template_kwargs is no JSON object: {given}")
        return found

    def reading(self, split_turns: bool = False) -> Reading:
        """How rows are read."""
        form = RowFormat(
            columns=renames(self.columns, "columns"),
            roles=renames(self.roles, "roles"),
            template_kwargs=self.template_kwargs(),
        )
        return Reading(form, split_turns=split_turns)
