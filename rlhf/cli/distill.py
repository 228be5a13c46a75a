"""``rlhf distill``."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import PreTrainedModel, set_seed

from rlhf.cli.arguments import DataArguments, ModelArguments, parse
from rlhf.cli.training import train
from rlhf.distillation import DistillConfig, DistillTrainer
from rlhf.models import add_adapter_beside

TEACHER = "teacher"  # name of its adapter


@dataclass
class TeacherAdapterArguments:
    teacher_adapter: str | None = field(
        default=None,
        metadata={"help": "Folder of an adapter of this very model: under it the model is the teacher (--use_peft)."},
    )


def run(argv: list[str]) -> None:
    classes = (DataArguments, ModelArguments, TeacherAdapterArguments, DistillConfig)
    data, model, teacher, args = parse("distill", classes, argv)
    make: Any = DistillTrainer
    if teacher.teacher_adapter is not None:
        others = ("teacher_model_name_or_path", "teacher_file", "teacher_server_url")
        if (other := next((name for name in others if getattr(args, name) is not None), None)) is not None:
            raise ValueError(f"--teacher_adapter and --{other} exclude each other: pass one teacher")
        if not model.use_peft:
            raise ValueError("--teacher_adapter needs --use_peft: the student is another adapter on the same model")
        make = partial(_beside, teacher.teacher_adapter)
    train(data, model, args, make)


def _beside(folder: str, *, model: PreTrainedModel, args: DistillConfig, peft_config: Any, **kwargs: Any) -> Any:
    set_seed(args.seed)  # as the trainer does before it draws an adapter
    both = add_adapter_beside(model, folder, TEACHER, peft_config)
    return DistillTrainer(both, args=args, teacher_adapter=TEACHER, **kwargs)
