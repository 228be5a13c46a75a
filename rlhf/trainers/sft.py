"""Supervised fine-tuning: the mean negative log-likelihood of the tokens that count."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, tokenize_sft
from rlhf.data.columns import sft_column
from rlhf.logprobs import TokenLoss
from rlhf.losses.registry import Registry
from rlhf.losses.trials import is_own, try_token_loss
from rlhf.trainers.base import BaseTrainer
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.evaluating import Measures

PACKING_STRATEGIES = ("bfd", "wrapped")


def negative_log_likelihood(logps: Tensor) -> Tensor:
    """The loss of each token, [N], from its log-probability, [N] in nats."""
    return -logps


def dynamic_fine_tuning(logps: Tensor) -> Tensor:
    """The negative log-likelihood of each token times its probability, [N].

    Source: arXiv 2508.05629.
    """
    # The probability is a constant weight: the gradient is that of the probability itself.
    return -logps * logps.detach().exp()


TOKEN_LOSSES: Registry[Callable[[Tensor], Tensor]] = Registry("loss_type")
"""Losses of SFT by name, from the log-probs of tokens, [N] in nats, to the loss of each, [N]."""
TOKEN_LOSSES |= {
    "nll": negative_log_likelihood,
    "chunked_nll": negative_log_likelihood,
    "dft": dynamic_fine_tuning,
}


@dataclass
class TextConfig(BaseConfig):
    """Options that trainers on text and conversations share."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate of AdamW."})
    packing: bool = field(
        default=False,
        metadata={"help": "Pack several examples into rows of max_length; they do not attend to each other."},
    )
    dataset_text_field: str = field(default="text", metadata={"help": "Column of plain text."})

    def check_columns(self, columns: list[str]) -> None:
        self.scored_column(columns)

    def scored_column(self, columns: list[str]) -> str:
        """The column that rows with these columns are read from."""
        return sft_column(columns, replace(self.reading().form, text_field=self.dataset_text_field))

    def tokenize_kwargs(self) -> dict[str, Any]:
        return super().tokenize_kwargs() | {"text_field": self.dataset_text_field}


@dataclass
class SFTConfig(TextConfig):
    """Arguments of :class:`SFTTrainer`; names and defaults are TRL's where TRL has the same thing."""

    loss_type: str = field(
        default="nll",
        metadata={
            "help": "nll, of which chunked_nll is another name; dft: each token's loss times its probability; or "
            "file.py:name, a function from log-probs to the loss of each token."
        },
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={"help": "For rows with a prompt: score completions only. false: score prompts too. Default: on."},
    )
    assistant_only_loss: bool | None = field(
        default=None,
        metadata={"help": "For conversations: score the assistant's turns only. false: score all turns. Default: on."},
    )
    packing_strategy: str = field(
        default="bfd",
        metadata={
            "help": "bfd: whole examples, attention within each. wrapped: one stream of tokens, cut at max_length.",
            "choices": list(PACKING_STRATEGIES),
        },
    )
    eval_packing: bool | None = field(
        default=None, metadata={"help": "A name of TRL; has no effect on an evaluation here."}
    )
    shuffle_dataset: bool = field(default=False, metadata={"help": "Shuffle the rows once, before packing."})
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "A name of TRL; only skip_prepare_dataset, for tokenised rows."}
    )

    divides_rows: ClassVar[bool] = True
    _VALID_DICT_FIELDS = [*TextConfig._VALID_DICT_FIELDS, "dataset_kwargs"]  # noqa: RUF012  # not a field

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss_type = TOKEN_LOSSES.name_of(self.loss_type)
        token_loss = TOKEN_LOSSES.find(self.loss_type)
        if is_own(token_loss):
            try_token_loss(f"loss_type {self.loss_type}", token_loss)
        for key in self.dataset_kwargs or ():
            if key != "skip_prepare_dataset":
                raise ValueError(f"dataset_kwargs: {key!r} has no effect here; only 'skip_prepare_dataset' is known")
        if self.packing and self.max_length is None:
            raise ValueError("packing fills rows of max_length tokens: pass a number for max_length")


class TextTrainer(BaseTrainer):
    """A trainer on the scored tokens of text, conversations, or prompts with completions."""

    config_class: ClassVar[type[BaseConfig]] = TextConfig
    exp_metrics: ClassVar[frozenset[str]] = frozenset({"perplexity"})

    def tokenize(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int) -> Dataset:
        return tokenize_sft(dataset, tokenizer, vocab_size=vocab_size, **args.tokenize_kwargs())

    @staticmethod
    def capacity(args: Any) -> int | None:
        # A packed row is a batch of at most max_length tokens.
        return args.tokens_per_batch or (args.max_length if args.packing else None)

    def count(self, batch: Batch) -> int:
        return len(batch.targets)

    def token_loss(self, logps: Tensor) -> Tensor:
        """The loss of each token, [N], from its log-probability, [N] in nats."""
        return -logps

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        # The loss is local to a token, so that the head computes it and its gradient chunk by chunk.
        scores = model(batch, TokenLoss(lambda chunk: self.token_loss(chunk.logps)))
        logps, tokens = scores.logps.detach(), batch.targets.counts()
        losses = batch.targets.sum(self.token_loss(logps))
        # From the log-probs and not from the loss, which may be weighted.
        nll = -batch.targets.sum(logps)
        return Measures(losses, tokens, {"perplexity": (nll, tokens)}, scores.loss, scores.router_logits)


class SFTTrainer(TextTrainer):
    r"""Fine-tune a causal LM on text, conversations, or prompts with completions.

    .. math:: L = -\frac{1}{N} \sum_{t} \log p(y_t \mid y_{<t}),\; N = \text{scored tokens of the optimizer step}

    Scored are: all of a plain text; the assistant's turns of a conversation; a completion, not its prompt.

    Args:
        model: a model, a PEFT model, or a name or folder to load one from.
        args: the configuration.
        *positional: the other arguments of :class:`BaseTrainer`, in its order.
        formatting_func: from a row to its text; the other columns are not read then.
        **kwargs: the other arguments of :class:`BaseTrainer` by name: ``train_dataset`` and ``eval_dataset`` (rows in
            any of the known columns: a list of dictionaries, a ``pandas.DataFrame``, a path, a ``Dataset`` or a
            stream), ``processing_class`` (the tokenizer; by default the model's own), ``peft_config`` (train this
            adapter instead of the weights), ``data_collator``, ``callbacks``, ``optimizers``, … as in
            ``transformers.Trainer``.
    Logs:
        ``loss``, ``perplexity`` (exp of total NLL / total tokens since the last line), ``num_tokens``, ``grad_norm``,
        ``learning_rate``; in evaluation ``eval_loss`` and ``eval_perplexity`` over the whole data set.
    Raises:
        ValueError: bad data, named by data set and row, before any step.
    Example:
        ```python
        rows = [{"prompt": "What is 2 + 2?", "completion": " It is 4."}]
        args = rlhf.SFTConfig("runs/sft", max_steps=100)
        trainer = rlhf.SFTTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", args, train_dataset=rows)
        trainer.train()
        ```
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
        # Before the base class, which tokenises the rows.
        self._formatting_func = formatting_func
        super().__init__(model, args, *positional, **kwargs)

    def tokenize(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int) -> Dataset:
        if self._formatting_func is not None:
            dataset = as_text(dataset, self._formatting_func, args.dataset_text_field)
        scores_all = scores_whole_rows(names_of(dataset), args)
        # Before rows are joined or packed, so that neighbours in a row are not always the same.
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        options = args.tokenize_kwargs()
        is_wrapped = args.packing and args.packing_strategy == "wrapped"
        if is_wrapped:
            options["max_length"] = None  # examples are joined first, and the stream of tokens is cut
        rows = tokenize_sft(dataset, tokenizer, vocab_size=vocab_size, **options)
        if scores_all:
            # Labels equal to the ids: every token counts but the first, which nothing predicts.
            rows = rows.map(lambda row: {"labels": row["input_ids"]})
        return wrapped(rows, args.max_length) if is_wrapped else rows

    @staticmethod
    def capacity(args: Any) -> int | None:
        if args.packing_strategy == "wrapped":  # rows are full already
            return args.tokens_per_batch
        return TextTrainer.capacity(args)

    def token_loss(self, logps: Tensor) -> Tensor:
        return TOKEN_LOSSES.find(self.args.loss_type)(logps)


def as_text(dataset: Any, formatting_func: Callable[[dict[str, Any]], str], text_field: str) -> Any:
    """Turn each row into text.

    Args:
        dataset: rows, or a stream of them.
        formatting_func: from a row to its text.
        text_field: the column to put the text into; the others are dropped.
    Returns:
        Rows with the one column ``text_field``.
    Raises:
        ValueError: ``formatting_func`` gives something else than text.
    """

    def text_of(row: dict[str, Any]) -> dict[str, str]:
        text = formatting_func(row)
        if not isinstance(text, str):
            raise ValueError(f"formatting_func must give the text of one row, got a {type(text).__name__}")
        return {text_field: text}

    # Other columns might be read as well, or instead: a row of `messages` is a conversation.
    other_columns = [name for name in names_of(dataset) if name != text_field]
    return dataset.map(text_of, remove_columns=other_columns)


def names_of(dataset: Any) -> list[str]:
    """The columns; of a stream that does not know them, those of its first row."""
    return list(dataset.column_names or next(iter(dataset), {}))


def scores_whole_rows(columns: list[str], args: SFTConfig) -> bool:
    """Whether all tokens of a row are scored, for rows in which by default some are not.

    Args:
        columns: of the rows.
        args: its ``completion_only_loss`` and ``assistant_only_loss`` decide.
    Returns:
        False where rows are scored by default.
    Raises:
        ValueError: an option that asks for rows of another kind.
    """
    if args.completion_only_loss is None and args.assistant_only_loss is None:
        return False
    column = args.scored_column(columns)
    is_text = column == args.dataset_text_field
    is_conversation = column.startswith(("messages", "conversation", "dialog", "chat"))
    if args.completion_only_loss and (is_text or is_conversation):
        raise ValueError(f"completion_only_loss needs rows with a 'prompt' and a 'completion', these have {column!r}")
    if args.assistant_only_loss and is_text:
        raise ValueError(f"assistant_only_loss needs conversations, these rows have plain text in {column!r}")
    if is_text or column == "input_ids":
        return False  # a plain text is scored whole anyway, and ids bring labels of their own
    scores_answers_only = args.assistant_only_loss if is_conversation else args.completion_only_loss
    return scores_answers_only is False


def wrapped(rows: Any, length: int) -> Any:
    """Join tokenised rows into streams, and cut these every ``length`` tokens.

    An example sees what comes before it in its row: its start may be cut off, and it is not alone.

    Args:
        rows: tokenised rows, or a stream of them.
        length: tokens of a new row; the last one of each 1000 old rows is shorter.
    Returns:
        Rows of ``input_ids`` and ``labels``.
    """

    def cut(block: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        pieces = {}
        # Both in the same places, so that a label stays with its token.
        for name in ("input_ids", "labels"):
            stream = [token for row in block[name] for token in row]
            pieces[name] = [stream[start : start + length] for start in range(0, len(stream), length)]
        return pieces

    # In blocks, so that neither a stream nor a large file is held in memory.
    return rows.map(cut, batched=True, batch_size=1000, remove_columns=rows.column_names)
