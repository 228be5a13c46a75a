"""``rlhf data``: what training would read of a file."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from rlhf.cli.output_files import check_output_file, write_output_file
from rlhf.cli.parsing import parse
from rlhf.cli.row_arguments import RowArguments
from rlhf.data.errors import error_context
from rlhf.evaluation import audit, audit_page, command_for, show_audit
from rlhf.models import load_tokenizer
from rlhf.rollouts.arguments import option


@dataclass
class AuditArguments(RowArguments):
    """The file, and how training would read it."""

    dataset_text_field: str = option("text", "Column of plain text.")
    command: str | None = option(
        None, "Command that will use the rows: sft, dpo, reward, kto, grpo, …; default: by columns."
    )
    model_name_or_path: str | None = option(
        None, "Model whose tokenizer and template are used (--model too); none: text alone."
    )
    model_revision: str = option("main", "Branch, tag or commit on the hub.")
    trust_remote_code: bool = option(False, "Run tokenizer code from the hub.")
    split_turns: bool = option(False, "Split a conversation into one row for each answer.")
    max_length: int = option(1024, "Longest sequence in tokens, as in training.")
    samples: int = option(3, "Number of first rows to show.")
    html: str | None = option(None, "Also write the audit as an HTML page to this file.")
    overwrite: bool = option(False, "Replace that page if it exists.")


def run(argv: list[str]) -> None:
    """Show what training would read of a file.

    Args:
        argv: words of the command line, after the command; the file may be the first, without an option.

    Raises:
        ValueError, OSError: bad options, or a file that cannot be read.
    """
    # `rlhf data FILE` is what one types first.
    if argv and not argv[0].startswith("-"):
        argv = ["--dataset_name", *argv]
    (args,) = parse("data", (AuditArguments,), argv)
    check_output_file("html", args.html, args.overwrite)
    rows: Any = args.load_rows()
    tokenizer = None
    if args.model_name_or_path is not None:
        tokenizer = load_tokenizer(
            args.model_name_or_path, args.chat_template_path, args.model_revision, args.trust_remote_code
        )
    reading = args.reading(args.split_turns)
    # Without a model, questions and answers are shown as turns.
    template = "" if tokenizer else "tool_calls"
    row_format = replace(reading.form, text_field=args.dataset_text_field, template=template)
    reading = replace(reading, form=row_format)
    with error_context(str(args.dataset_name)):
        report = audit(
            rows,
            args.dataset_name,
            args.command or command_for(rows, reading),
            tokenizer,
            reading,
            max_length=args.max_length,
            text_field=args.dataset_text_field,
            samples=args.samples,
            # disable=None hides the bar where the output is no terminal.
            progress=lambda rows: datasets.utils.tqdm(rows, desc="Reading", unit="row", leave=False, disable=None),
        )
    show_audit(report)
    if args.html is not None:
        write_output_file(Path(args.html), audit_page(report))
        print(f"saved {args.html}")
