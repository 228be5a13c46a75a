"""What people bring along from transformers' and TRL's trainers: taken where it has a meaning, else refused by name."""

from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

REFUSED = {
    "compute_loss_func": "the loss is never made from logits here; override measure(), or use rlhf.losses in a Trainer "
    "of your own",
    "model_init": "pass the model itself; for a search over hyper-parameters make a trainer for each trial",
}
"""Arguments of ``transformers.Trainer`` that would be ignored, and what to do instead."""


def refuse_arguments(**given: Any) -> None:
    """Refuse arguments of a trainer that cannot act.

    Raises:
        ValueError: names the argument and what to do.
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is not supported: {REFUSED[name]}")


def as_config(args: Any, config_class: type) -> Any:
    """``args`` as a ``config_class``: what was set in plain ``TrainingArguments`` is taken over."""
    if isinstance(args, config_class) or not isinstance(args, TrainingArguments):
        return args
    plain = TrainingArguments(output_dir=args.output_dir)
    known = {f.name for f in fields(config_class) if f.init}
    names = [f.name for f in fields(args) if f.init and f.name in known and f.name != "remove_unused_columns"]
    changed = {name: getattr(args, name) for name in names if getattr(args, name) != getattr(plain, name)}
    return config_class(**{"output_dir": args.output_dir, **changed})
