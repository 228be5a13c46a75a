"""``rlhf merge``: an adapter and its base model as one model folder."""

from pathlib import Path

from rlhf.cli.options import RaisingParser, underscored


def run(argv: list[str]) -> None:
    """Merge an adapter, and print where the model is and how to load it.

    Args:
        argv: words of the command line, after the command.

    Raises:
        ValueError, OSError: no adapter, the folder is not empty or cannot be written, or the merged model differs.
    """
    options = _parser().parse_args(underscored(argv))
    # torch and transformers take seconds to import; wrong options are told before.
    from transformers.utils import logging as transformers_logging

    from rlhf.serving import TOLERANCES, merge

    transformers_logging.disable_progress_bar()
    kwargs = {"trust_remote_code": options.trust_remote_code}
    if options.revision is not None:
        kwargs["revision"] = options.revision
    merged = merge(options.adapter, options.output_dir, options.dtype, **kwargs)
    dtype = str(merged.dtype).removeprefix("torch.")
    print(
        f"{merged.folder}: {merged.num_parameters / 1e6:,.1f}M parameters in {dtype}, {merged.num_bytes / 1e6:,.0f} MB"
    )
    print(
        f"checked: logits as the adapter's up to {merged.difference:.1g} of the largest "
        f"(allowed: {TOLERANCES[merged.dtype]:g})"
    )
    print(f'load: AutoModelForCausalLM.from_pretrained("{merged.folder}"), or rlhf chat {merged.folder}')


def _parser() -> RaisingParser:
    parser = RaisingParser(
        "rlhf merge",
        description="Merge an adapter into its base model. The sum is taken in float32. The folder is kept if its "
        "logits are those of the adapter.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder, or a hub name")
    parser.add_argument(
        "-o", "--output_dir", metavar="FOLDER", type=Path, required=True, help="where the model goes; new or empty"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the merged weights; auto is the base model's",
    )  # fmt: skip
    parser.add_argument("--revision", help="of the adapter on the hub: branch, tag or commit")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code of the model's repository")
    return parser
