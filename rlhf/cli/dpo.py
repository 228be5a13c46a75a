"""``rlhf dpo``."""

from dataclasses import dataclass, field
from functools import partial

from rlhf.cli.arguments import DataArguments, ModelArguments, parse
from rlhf.cli.training import train
from rlhf.models import load_model
from rlhf.trainers import DPOConfig, DPOTrainer


@dataclass
class ReferenceArguments:
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Another reference than the model itself as it is at the start."}
    )


def run(argv: list[str]) -> None:
    data, model, reference, args = parse("dpo", (DataArguments, ModelArguments, ReferenceArguments, DPOConfig), argv)
    name = reference.ref_model_name_or_path
    ref_model = None if name is None else load_model(name, **model.other_kwargs(args.trust_remote_code))
    train(data, model, args, partial(DPOTrainer, ref_model=ref_model))
