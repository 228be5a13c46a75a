"""Supervised fine-tuning: the mean negative log-likelihood of the tokens that count."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, tokenize_sft
from rlhf.logprobs import Scores
from rlhf.trainers.base import BaseConfig, BaseTrainer, Measures


@dataclass
class SFTConfig(BaseConfig):
    """Arguments of :class:`SFTTrainer`; names and defaults are TRL's where TRL has the same thing."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate of AdamW."})
    packing: bool = field(
        default=False, metadata={"help": "Fill rows of max_length with several examples, each by itself."}
    )
    dataset_text_field: str = field(default="text", metadata={"help": "Column of plain text."})


class SFTTrainer(BaseTrainer):
    r"""Fine-tune a causal LM on text, conversations, or prompts with completions.

    .. math:: L = -\frac{1}{N} \sum_{t} \log p(y_t \mid y_{<t}),\; N = \text{scored tokens of the optimizer step}

    Scored are: all of a plain text; the assistant's turns of a conversation; a completion, not its prompt.

    Args:
        model: a model, a PEFT model, or a name or folder to load one from.
        args: the configuration. train_dataset, eval_dataset: rows in any of the known columns.
        processing_class: the tokenizer; by default the model's own.
        peft_config: train this adapter instead of the weights.
        data_collator, callbacks, optimizers: as in ``transformers.Trainer``.
    Logs:
        ``loss``, ``perplexity`` (exp of total NLL / total tokens since the last line), ``num_tokens``, ``grad_norm``,
        ``learning_rate``; in evaluation ``eval_loss`` and ``eval_perplexity`` over the whole data set.
    Raises:
        ValueError: bad data, named by data set and row, before any step.
    """

    config_class: ClassVar[type[BaseConfig]] = SFTConfig
    exponentials: ClassVar[frozenset[str]] = frozenset({"perplexity"})

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
        return Measures(nll, tokens, {"perplexity": (nll, tokens)}, scores.loss)


def _nll(scores: Scores) -> Tensor:
    return -scores.logps
