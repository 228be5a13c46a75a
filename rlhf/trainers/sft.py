"""Supervised fine-tuning: the mean negative log-likelihood of the tokens that count."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, tokenize_sft
from rlhf.data.columns import sft_column
from rlhf.logprobs import Scores
from rlhf.trainers.base import BaseConfig, BaseTrainer, Measures

LOSS_TYPES = ("nll", "chunked_nll", "dft")
PACKING_STRATEGIES = ("bfd", "wrapped")


@dataclass
class TextConfig(BaseConfig):
    """What trainers on text and conversations share."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate of AdamW."})
    packing: bool = field(
        default=False, metadata={"help": "Fill rows of max_length with several examples, each by itself."}
    )
    dataset_text_field: str = field(default="text", metadata={"help": "Column of plain text."})

    def check_columns(self, columns: list[str]) -> None:
        sft_column(columns, replace(self.reading().form, text_field=self.dataset_text_field))


@dataclass
class SFTConfig(TextConfig):
    """Arguments of :class:`SFTTrainer`; names and defaults are TRL's where TRL has the same thing."""

    loss_type: str = field(
        default="nll",
        metadata={
            "help": "nll, of which chunked_nll is another name; dft: each token's loss times its probability.",
            "choices": list(LOSS_TYPES),
        },
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={"help": "Rows with a prompt: false scores the prompt too. By default completions alone."},
    )
    assistant_only_loss: bool | None = field(
        default=None, metadata={"help": "Conversations: false scores all turns. By default the assistant's alone."}
    )
    packing_strategy: str = field(
        default="bfd",
        metadata={
            "help": "bfd: whole examples, each by itself. wrapped: one stream of tokens, cut every max_length.",
            "choices": list(PACKING_STRATEGIES),
        },
    )
    eval_packing: bool | None = field(default=None, metadata={"help": "TRL's; moves no figure of an evaluation here."})
    shuffle_dataset: bool = field(default=False, metadata={"help": "Shuffle the rows once, before they are packed."})
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "TRL's; only skip_prepare_dataset, for rows that hold ids already."}
    )

    _VALID_DICT_FIELDS = [*TextConfig._VALID_DICT_FIELDS, "dataset_kwargs"]  # noqa: RUF012  # not a field

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("loss_type", LOSS_TYPES), ("packing_strategy", PACKING_STRATEGIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        other = [key for key in self.dataset_kwargs or () if key != "skip_prepare_dataset"]
        if other:
            raise ValueError(f"dataset_kwargs: {other[0]!r} has no effect here; only 'skip_prepare_dataset' is known")
        if self.packing and self.max_length is None:
            raise ValueError("packing fills rows of max_length tokens: pass a number for max_length")


class TextTrainer(BaseTrainer):
    """A trainer on the scored tokens of text, conversations, or prompts with completions."""

    config_class: ClassVar[type[BaseConfig]] = TextConfig
    exp_metrics: ClassVar[frozenset[str]] = frozenset({"perplexity"})

    def tokenize(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int
    ) -> Dataset:  # fmt: skip
        return tokenize_sft(
            dataset,
            tokenizer,
            max_length=args.max_length,
            vocab_size=vocab_size,
            text_field=args.dataset_text_field,
            drop_long_prompts=args.drop_long_prompts,
            num_proc=args.dataset_num_proc,
            reading=args.reading(),
        )

    @staticmethod
    def capacity(args: Any) -> int | None:
        return args.tokens_per_batch or (args.max_length if args.packing else None)

    def count(self, batch: Batch) -> int:
        return len(batch.targets)

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        scores = model(batch, _nll)
        nll, tokens = -batch.targets.sum(scores.logps.detach()), batch.targets.counts()
        return Measures(nll, tokens, {"perplexity": (nll, tokens)}, scores.loss, scores.router_logits)


class SFTTrainer(TextTrainer):
    r"""Fine-tune a causal LM on text, conversations, or prompts with completions.

    .. math:: L = -\frac{1}{N} \sum_{t} \log p(y_t \mid y_{<t}),\; N = \text{scored tokens of the optimizer step}

    Scored are: all of a plain text; the assistant's turns of a conversation; a completion, not its prompt.

    Args:
        model: a model, a PEFT model, or a name or folder to load one from.
        args: the configuration. train_dataset, eval_dataset: rows in any of the known columns.
        processing_class: the tokenizer; by default the model's own.
        peft_config: train this adapter instead of the weights.
        formatting_func: from a row to its text, or to its text's parts; the other columns are not read then.
        data_collator, callbacks, optimizers: as in ``transformers.Trainer``.
    Logs:
        ``loss``, ``perplexity`` (exp of total NLL / total tokens since the last line), ``num_tokens``, ``grad_norm``,
        ``learning_rate``; in evaluation ``eval_loss`` and ``eval_perplexity`` over the whole data set.
    Raises:
        ValueError: bad data, named by data set and row, before any step.
    """

    config_class: ClassVar[type[BaseConfig]] = SFTConfig
    balances: ClassVar[bool] = True

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        *positional: Any,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._formatting_func = formatting_func
        super().__init__(model, args, *positional, **kwargs)

    def tokenize(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int
    ) -> Dataset:  # fmt: skip
        if self._formatting_func is not None:
            dataset = as_text(dataset, self._formatting_func, args.dataset_text_field)
        whole = scores_whole_rows(names_of(dataset), args)
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        stream = args.packing and args.packing_strategy == "wrapped"
        own = copy.copy(args)
        own.max_length = None if stream else args.max_length
        rows = super().tokenize(dataset, tokenizer, own, vocab_size)
        if whole:
            rows = rows.map(lambda row: {"labels": row["input_ids"]})
        return wrapped(rows, args.max_length) if stream else rows

    @staticmethod
    def capacity(args: Any) -> int | None:
        return args.tokens_per_batch if args.packing_strategy == "wrapped" else TextTrainer.capacity(args)

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        if self.args.loss_type != "dft":
            return super().measure(model, batch)
        scores = model(batch, _dft)
        logps, tokens = scores.logps.detach(), batch.targets.counts()
        sums = {"perplexity": (-batch.targets.sum(logps), tokens)}
        losses = -batch.targets.sum(logps * logps.exp())
        return Measures(losses, tokens, sums, scores.loss, scores.router_logits)


def _nll(scores: Scores) -> Tensor:
    return -scores.logps


def _dft(scores: Scores) -> Tensor:
    """Dynamic fine-tuning, arXiv 2508.05629: the gradient of a token's probability."""
    return -scores.logps * scores.logps.detach().exp()


def as_text(dataset: Any, formatting_func: Callable[[dict[str, Any]], str], text_field: str) -> Any:
    """Rows of the text that ``formatting_func`` makes of each.

    Raises:
        ValueError: it gives something else than text.
    """

    def text_of(row: dict[str, Any]) -> dict[str, str]:
        text = formatting_func(row)
        if not isinstance(text, str):
            raise ValueError(f"formatting_func must give the text of one row, got a {type(text).__name__}")
        return {text_field: text}

    return dataset.map(text_of, remove_columns=[name for name in names_of(dataset) if name != text_field])


def names_of(dataset: Any) -> list[str]:
    """The columns; of a stream that does not know them, those of its first row."""
    return list(dataset.column_names or next(iter(dataset), {}))


def scores_whole_rows(names: list[str], args: SFTConfig) -> bool:
    """Whether all tokens of a row are scored, for rows in which by default some are not.

    Raises:
        ValueError: an option that asks for rows of another kind.
    """
    if args.completion_only_loss is None and args.assistant_only_loss is None:
        return False
    column = sft_column(names, replace(args.reading().form, text_field=args.dataset_text_field))
    plain = column == args.dataset_text_field
    conversation = column.startswith(("messages", "conversation", "dialog", "chat"))
    if args.completion_only_loss and (plain or conversation):
        raise ValueError(f"completion_only_loss needs rows with a 'prompt' and a 'completion', these have {column!r}")
    if args.assistant_only_loss and plain:
        raise ValueError(f"assistant_only_loss needs conversations, these rows have plain text in {column!r}")
    wanted = args.assistant_only_loss if conversation else args.completion_only_loss
    return wanted is False and not plain and column != "input_ids"


def wrapped(rows: Any, length: int) -> Any:
    """Tokenised rows, strung together and cut every ``length`` tokens; the rest of 1000 rows is a shorter one.

    An example sees what comes before it in its row: its start may be cut off, and it is not alone.
    """

    def cut(block: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        streams = {name: [token for row in block[name] for token in row] for name in ("input_ids", "labels")}
        starts = range(0, len(streams["input_ids"]), length)
        return {name: [stream[i : i + length] for i in starts] for name, stream in streams.items()}

    return rows.map(cut, batched=True, batch_size=1000, remove_columns=rows.column_names)
