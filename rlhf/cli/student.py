"""``rlhf student``: make a smaller model to distil a teacher into."""

import argparse
from pathlib import Path

from transformers import PreTrainedModel

from rlhf.cli.options import RaisingParser
from rlhf.distillation.student import copy_layers, fresh_student, layer_list, load_config, spread_layers
from rlhf.evaluation import show_metrics
from rlhf.models import load_model, load_tokenizer


def run(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    _check_output(args.output_dir)
    # Read before the teacher is loaded, which may take minutes.
    config = None if args.config is None else load_config(args.config)
    tokenizer = load_tokenizer(args.teacher)
    teacher = load_model(args.teacher, dtype=args.dtype)
    if config is not None:
        student = fresh_student(config, teacher, tokenizer, args.seed)
    else:
        num_layers = len(layer_list(teacher)[1])
        layers = spread_layers(num_layers, args.layers) if args.keep is None else args.keep
        student = copy_layers(teacher, layers)
        print(f"copied layers {', '.join(map(str, layers))}")
    student.save_pretrained(args.output_dir)
    # The student reads the teacher's tokens; with its tokenizer the folder is a model to train.
    tokenizer.save_pretrained(args.output_dir)
    show_metrics({"teacher": _sizes(teacher), "student": _sizes(student)})
    print(f"saved {args.output_dir}")


def _parser() -> RaisingParser:
    parser = RaisingParser(
        "rlhf student", description="Make a student from some of a teacher's layers, or fresh.", allow_abbrev=False
    )
    # `from` is a keyword of Python, so that the value has another name.
    parser.add_argument("--from", dest="teacher", metavar="TEACHER", required=True, help="a folder, or a hub name")
    parser.add_argument("--output_dir", type=Path, required=True, help="output folder of the student; new or empty")
    source_options = parser.add_mutually_exclusive_group(required=True)
    source_options.add_argument(
        "--layers", type=int, help="number of layers to copy, evenly spaced, with the first and the last"
    )
    source_options.add_argument("--keep", type=_numbers, metavar="0,2,5", help="layers to copy, counted from 0")
    source_options.add_argument(
        "--config", metavar="FOLDER_OR_FILE", help="initialise random weights for this configuration"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument("--dtype", default="auto", help="auto (the teacher's), float32, bfloat16 or float16")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        # argparse shows the message of this error; of a ValueError only the name of the function.
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layer numbers such as 0,2,5") from None


def _check_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: output_dir is a file; choose a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; choose another --output_dir")


def _sizes(model: PreTrainedModel) -> dict[str, float]:
    text_config = model.config.get_text_config()
    return {
        "million parameters": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "layers": text_config.num_hidden_layers,
        "hidden size": text_config.hidden_size,
    }
