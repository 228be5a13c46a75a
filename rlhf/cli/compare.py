"""``rlhf compare``: two models on the same prompts, and which of them is better."""

import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import track

from rlhf.cli.judges import Judge, make_judge
from rlhf.cli.likelihoods import Sequences, answer_bytes, likelihoods_of, reference_rows
from rlhf.cli.output_files import check_output_file, write_output_file
from rlhf.cli.parsing import parse
from rlhf.cli.row_arguments import RowArguments
from rlhf.evaluation.answers import Answer, Question, answer_questions, key_of, model_identity, questions_of, to_device
from rlhf.evaluation.compare_page import blind_page, comparison_page
from rlhf.evaluation.compare_tables import as_plain, show_comparison
from rlhf.evaluation.comparison import (
    Comparison,
    Likelihoods,
    answer_figures,
    judged_figures,
    likelihood_figures,
)
from rlhf.evaluation.judging import Verdict
from rlhf.evaluation.stored_lines import StoredLines
from rlhf.models import load_model, load_tokenizer
from rlhf.rollouts import Sampling
from rlhf.rollouts.arguments import option
from rlhf.trainers.ranges import AT_LEAST_0, Range

logger = logging.getLogger(__name__)

DTYPES = ["auto", "float32", "bfloat16", "float16", "float64"]
STDOUT = "-"
JUDGES = ["person", "page"]


@dataclass
class CompareArguments(RowArguments):
    """Two models, how they answer, and who judges."""

    positional: ClassVar[str] = "A B"
    # Training has no group of completions at temperature 0; here it is greedy.
    own_ranges: ClassVar[dict[str, Range]] = {"temperature": AT_LEAST_0}

    models: list[str] | None = option(None, "The two models, A B: folders of models, runs or adapters, or hub names.")
    num_prompts: int = option(100, "Different prompts to answer, the first of the data; 0: none.")
    temperature: float = option(0.0, "Temperature of sampling; 0: greedy.")
    top_p: float = option(1.0, "Nucleus sampling: most likely tokens up to this probability; 1: off.")
    top_k: int = option(0, "Sample from this many most likely tokens; 0: off.")
    max_new_tokens: int = option(256, "Longest answer in tokens.")
    seed: int = option(0, "Random seed.")
    reward_model: str | None = option(None, "Judge by this reward model's score.")
    reward_funcs: list[str] | None = option(None, "Judge by rewards as in training: file.py:name, numeric_answer, …")
    judge_url: str | None = option(
        None, "Judge by a model behind an OpenAI-style API, such as http://127.0.0.1:8000/v1; its key: JUDGE_API_KEY."
    )
    judge_model: str | None = option(None, "Name of the judge there.")
    judge: str | None = option(
        None, "person: choose blind in the terminal; page: choose blind in the page of --html.", choices=JUDGES
    )
    choices: str | None = option(None, "Read the choices that were saved in the page.")
    max_length: int = option(1024, "Longer rows are left out of perplexity and accuracy.")
    batch_size: int = option(8, "Prompts answered at once, and rows in a forward pass.")
    dtype: str = option("auto", "Of the weights; auto is the checkpoint's.", choices=DTYPES)
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2, …")
    trust_remote_code: bool = option(False, "Run model code from the hub.")
    output_dir: str = option("compare", "Answers and judgements are kept there, and used again.")
    json: str | None = option(None, "Write all figures and answers there as JSON; -: to the terminal, alone.")
    html: str | None = option(None, "Write a page with the answers side by side.")
    overwrite: bool = option(False, "Replace the files of --json and --html.")

    def sampling(self) -> Sampling:
        """How tokens are drawn.

        Returns:
            The options of the engine.

        Raises:
            ValueError: an option out of its range.
        """
        return Sampling(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, max_tokens=self.max_new_tokens
        )


@dataclass
class ModelResults:
    """What was measured of one model.

    Attributes:
        answers: to the prompts.
        likelihoods: of the rows' own answers.
    """

    answers: list[Answer]
    likelihoods: Likelihoods


def run(argv: list[str]) -> None:
    """Compare two models; print the figures, and write them if asked to.

    Args:
        argv: words of the command line, after the command.

    Raises:
        ValueError, OSError: bad options, bad data, or a judge that fails.
    """
    (args,) = parse("compare", (CompareArguments,), _with_models(argv))
    names = _model_names(args)
    check_output_file("json", None if args.json == STDOUT else args.json, args.overwrite)
    check_output_file("html", args.html, args.overwrite)
    judge = make_judge(args, os.environ.get("JUDGE_API_KEY"))
    rows = args.load_rows()
    load = {"trust_remote_code": args.trust_remote_code}
    tokenizers = [load_tokenizer(name, args.chat_template_path, **load) for name in names]
    reading = args.reading().for_tokenizer(tokenizers[0])
    questions = questions_of(rows, args.num_prompts, reading.form)
    if judge is not None:
        judge.check(questions)
    references, left_out = reference_rows(rows, tokenizers, reading, args.max_length)
    results = [
        _measure(name, tokenizer, questions, reference, args)
        for name, tokenizer, reference in zip(names, tokenizers, references, strict=True)
    ]
    a, b = (result.answers for result in results)
    key = _key_of_answers(questions, a, b)
    verdicts = [Verdict(None)] * len(questions)
    if judge is not None:
        verdicts = judge.verdicts(key, questions, a, b)
    figures, remarks = ([], []) if judge is None or judge.is_pending else judged_figures(verdicts, a, b)
    figures = figures + answer_figures(a, b)
    figures += likelihood_figures(
        results[0].likelihoods, results[1].likelihoods, answer_bytes(references[0], tokenizers[0])
    )
    if left_out:
        remarks.append(f"Rows without perplexity, too long for --max_length or not readable: {left_out:,}.")
    comparison = Comparison(
        (names[0], names[1]),
        str(args.dataset_name),
        None if judge is None else judge.name,
        key,
        questions,
        (a, b),
        verdicts,
        figures,
        remarks,
    )
    _write(comparison, args, judge)


def _key_of_answers(questions: list[Question], a: list[Answer], b: list[Answer]) -> str:
    """A judgement is of these texts, whatever models wrote them."""
    prompts = [asdict(question.dialogue) for question in questions]
    return key_of(prompts, *([answer.text for answer in answers] for answers in (a, b)))


def _with_models(argv: Sequence[str]) -> list[str]:
    """The words with the models, which come first without an option, behind ``--models``."""
    count = next((index for index, word in enumerate(argv) if word.startswith("-")), len(argv))
    return ["--models", *argv[:count], *argv[count:]] if count else list(argv)


def _model_names(args: CompareArguments) -> list[str]:
    names = args.models or []
    if len(names) != 2:
        raise ValueError(f"two models are compared, got {len(names)}: rlhf compare A B --dataset_name FILE")
    return names


def _measure(
    name: str, tokenizer: Any, questions: list[Question], reference: list[Sequences], args: CompareArguments
) -> ModelResults:
    """Answers and likelihoods of one model; it is loaded only if something is not stored yet."""
    loaded: list[Any] = []

    def model() -> Any:
        if not loaded:
            kwargs = dict(
                dtype=args.dtype,
                attn_implementation=args.attn_implementation,
                trust_remote_code=args.trust_remote_code,
            )
            loaded.append(to_device(load_model(name, **kwargs)))
        return loaded[0]

    # A model of the hub has no identity before it is downloaded.
    identity = model_identity(name) or (model() and model_identity(name))
    about_model = (identity, args.dtype, args.chat_template_path)
    folder = Path(args.output_dir)
    results = ModelResults(
        _answers(folder, name, model, tokenizer, questions, args, about_model),
        _likelihoods(folder, name, model, tokenizer, reference, args, about_model),
    )
    # The next model needs the memory.
    loaded.clear()
    gc.collect()
    return results


def _answers(
    folder: Path,
    name: str,
    model: Callable[[], Any],
    tokenizer: Any,
    questions: list[Question],
    args: CompareArguments,
    about_model: tuple[Any, ...],
) -> list[Answer]:
    """Stored answers, and the model's own to the other questions."""
    sampling = args.sampling()
    prompts = [asdict(question.dialogue) for question in questions]
    # Greedy answers are the same under every seed.
    seed = args.seed if sampling.temperature > 0 else None
    stored = StoredLines(folder / f"answers-{key_of(about_model, asdict(sampling), seed, prompts)}.jsonl")
    answers = [Answer(entry["text"], entry["ids"], entry["is_whole"]) for entry in stored.entries]
    if len(answers) < len(questions):
        batches = answer_questions(
            model(), tokenizer, questions, sampling, args.seed, args.batch_size, start=len(answers)
        )
        open_count = len(questions) - len(answers)
        num_batches = -(-open_count // args.batch_size)
        logger.info("%s answers %d prompts", name, open_count)
        for batch in track(batches, f"answers of {name}", num_batches, console=Console(stderr=True), transient=True):
            for answer in batch:
                stored.add(asdict(answer))
            answers += batch
    return answers


def _likelihoods(
    folder: Path,
    name: str,
    model: Callable[[], Any],
    tokenizer: Any,
    reference: list[Sequences],
    args: CompareArguments,
    about_model: tuple[Any, ...],
) -> Likelihoods:
    """Stored likelihoods, or the model's."""
    if not reference:
        return Likelihoods([], [])
    stored = StoredLines(folder / f"likelihoods-{key_of(about_model, reference)}.jsonl")
    if not stored.entries:
        stored.add(asdict(likelihoods_of(model(), tokenizer, reference, args.batch_size)))
    return Likelihoods(**stored.entries[0])


def _write(comparison: Comparison, args: CompareArguments, judge: Judge | None) -> None:
    """Show the comparison, and write the files that were asked for."""
    text = json.dumps(as_plain(comparison), indent=2, ensure_ascii=False) + "\n"
    if args.json == STDOUT:
        sys.stdout.write(text)
    else:
        show_comparison(comparison)
    if args.json not in (None, STDOUT):
        write_output_file(Path(args.json), text)
    if args.html is not None:
        is_form = judge is not None and judge.is_pending and args.judge == "page"
        page = blind_page(comparison) if is_form else comparison_page(comparison)
        write_output_file(Path(args.html), page)
        if is_form:
            logger.info("%s: open it, choose, save, and pass --choices choices.json", args.html)
    logger.info("%s: answers and judgements; another judge uses the same answers", args.output_dir)
