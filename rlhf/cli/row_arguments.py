"""How rows are read, for commands that do not train; the training commands have the same options."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from rlhf.cli.options import require
from rlhf.data import Reading, RowFormat, load_data
from rlhf.data.messages import from_json
from rlhf.rollouts.arguments import option
from rlhf.trainers.config import renames
from rlhf.trainers.ranges import check_ranges


@dataclass
class RowArguments:
    """The rows, names of their columns and roles, and arguments of the chat template."""

    # None rather than required: `require` answers in one line that names the config file too.
    dataset_name: str | None = option(None, "File, saved folder or hub name.")
    dataset_config: str | None = option(None, "Configuration of a hub data set.")
    dataset_split: str = option("train", "Split, or a slice of it such as train[:1000].")
    chat_template_path: str | None = option(None, "Template file, or a model folder.")
    # Text, because a word of the command line cannot be a dictionary.
    chat_template_kwargs: str | None = option(None, 'JSON for the chat template, such as {"enable_thinking": false}.')
    columns: str | None = option(None, "Rename columns: question=prompt,answer=completion.")
    roles: str | None = option(None, "Rename roles: customer=user,agent=assistant.")
    # Read before anything is imported: rlhf.cli.main moves the caches.
    cache_dir: str | None = option(None, "Folder for all caches, instead of ~/.cache/huggingface and others.")

    def __post_init__(self) -> None:
        check_ranges(self)

    def load_rows(self) -> Dataset:
        """Load the rows as they are in the file.

        Returns:
            The rows of the split.

        Raises:
            ValueError: no data set was named, or it cannot be read.
            FileNotFoundError: there is no such file.
        """
        require(dataset_name=self.dataset_name)
        return load_data(str(self.dataset_name), self.dataset_split, self.dataset_config)

    def template_kwargs(self) -> dict[str, Any]:
        """Arguments of the chat template for every row.

        Returns:
            Keyword arguments of the chat template.

        Raises:
            ValueError: no JSON object.
        """
        kwargs_given = self.chat_template_kwargs
        # In a config file it may be an object already.
        arguments = from_json(kwargs_given) if isinstance(kwargs_given, str) else kwargs_given or {}
        if not isinstance(arguments, dict):
            raise ValueError(f"--chat_template_kwargs is no JSON object: {kwargs_given}")
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
