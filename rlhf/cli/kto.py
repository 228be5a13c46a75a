"""``rlhf kto``."""

from functools import partial

from rlhf.cli.arguments import DataArguments, ModelArguments, parse
from rlhf.cli.dpo import ReferenceArguments
from rlhf.cli.training import train
from rlhf.models import load_model
from rlhf.trainers import KTOConfig, KTOTrainer


def run(argv: list[str]) -> None:
    data, model, reference, args = parse("kto", (DataArguments, ModelArguments, ReferenceArguments, KTOConfig), argv)
    name = reference.ref_model_name_or_path
    ref_model = None if name is None else load_model(name, **model.other_kwargs(args.trust_remote_code))
    train(data, model, args, partial(KTOTrainer, ref_model=ref_model))
