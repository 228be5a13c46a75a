"""Distillation from a teacher with another tokenizer: of the same text, what can be compared."""

from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, Collator
from rlhf.distillation.paired_rows import Align, Paired, collate_paired, tokenize_paired
from rlhf.losses import span_logps, span_loss
from rlhf.models import load_model, load_tokenizer, vocabulary_size
from rlhf.models.policy import Teacher
from rlhf.trainers.base import Measures

if TYPE_CHECKING:
    from rlhf.distillation.config import DistillConfig
    from rlhf.distillation.trainer import DistillTrainer  # which need this file


def check_options(args: "DistillConfig") -> None:
    """Raise for what makes no sense beside ``align``."""
    if args.align is None:
        return
    if args.align not in get_args(Align):
        raise ValueError(f"align must be one of {', '.join(get_args(Align))}; got {args.align!r}")
    for name in ("teacher_file", "teacher_server_url"):
        if getattr(args, name) is not None:
            raise ValueError(f"align {args.align} needs the teacher itself, not {name}: teacher_model_name_or_path")
    if args.lmbda:
        raise ValueError(f"align {args.align} reads the text of rows, and lmbda would give ids: leave one of them out")
    if args.hidden_state_weight:
        raise ValueError(
            f"hidden_state_weight compares token by token, and align {args.align} has no such pairs: leave it out"
        )
    names = ("divergence", "beta", "alpha", "reverse", "scale_by_temperature", "teacher_estimate")
    defaults = {field.name: field.default for field in fields(args)}
    if given := [name for name in names if getattr(args, name) != defaults[name]]:
        raise ValueError(f"align {args.align} has a loss of its own: leave {', '.join(given)} out")


@dataclass
class OtherTokenizer:
    """A teacher and its tokenizer. ``align``: how its tokens meet the student's."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    align: Align

    @classmethod
    def load(
        cls, args: "DistillConfig", model: str | nn.Module | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> "OtherTokenizer | None":
        """What ``args`` ask for; None where that is a teacher with the student's tokenizer.

        Raises:
            ValueError: no teacher of its own, or one whose tokenizer is not known.
        """
        if args.align is None:
            return None
        if model is None:
            raise ValueError(
                f"align {args.align}: the student's own trunk has its tokenizer; pass --teacher_model_name_or_path, or "
                "leave align out"
            )
        name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", ""))
        if tokenizer is None and not name:
            raise ValueError(f"align {args.align} needs the teacher's tokenizer: pass teacher_processing_class")
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(name)
        if isinstance(model, str):
            own = args.teacher_model_init_kwargs
            model = load_model(model, **(own if isinstance(own, dict) else {}))
        return cls(model, tokenizer, args.align)  # type: ignore[arg-type]  # checked with the options

    def tokenize(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int
    ) -> Dataset:  # fmt: skip
        theirs = vocabulary_size(self.model)
        return tokenize_paired(
            dataset,
            tokenizer,
            self.tokenizer,
            self.align,
            max_length=args.max_length,
            vocab_sizes=(vocab_size, theirs),
            text_field=args.dataset_text_field,
            drop_long_prompts=args.drop_long_prompts,
            num_proc=args.dataset_num_proc,
            reading=args.reading(),
        )

    def join(self, trainer: "DistillTrainer") -> Teacher:
        """Freeze the teacher, and let the trainer's batches hold its side too."""
        policy = trainer.freeze(self.model)
        collator: Any = trainer.data_collator
        if not isinstance(collator, Collator):
            raise ValueError(f"align {self.align} needs a rlhf.data.Collator, got {type(collator).__name__}")
        pad = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        extras = {"paired": partial(collate_paired, pad_token_id=pad)}
        trainer.data_collator = replace(collator, extras=extras)  # type: ignore[assignment]
        trainer.share_layout(policy.model)
        return lambda student: nullcontext(policy)


def measure_aligned(trainer: "DistillTrainer", model: nn.Module, batch: Batch) -> Measures:
    """The loss in place of a divergence: of each pair of tokens, or each span, at the student's first token of it."""
    targets, weights, teacher = batch.targets, trainer.divergence, trainer.teacher
    paired: Any = batch.extras["paired"]
    assert teacher is not None
    tokens, pairs = targets.counts(), targets.sum((paired.partner >= 0).long())
    if trainer.args.align == "uld":
        scores = model(batch, divergence=weights, teacher=teacher)
        found, logps, total = scores.teacher.divergence, scores.logps, scores.loss
        taught, taught_tokens = targets.sum(scores.teacher.logps), pairs
    else:
        with torch.no_grad(), teacher(trainer.policy) as taught_by:
            their_logps = taught_by(paired.batch).logps
        logps = model(batch).logps
        found = _of_spans(logps, their_logps, paired, weights.temperature)
        total = weights.loss(found, logps).sum()
        found, logps = found.detach(), logps.detach()
        theirs = paired.batch.targets
        taught, taught_tokens = theirs.sum(their_logps), theirs.counts()
    metrics = {
        {"uld": "uld", "spans": "span"}[trainer.args.align]: (targets.sum(found), pairs),
        "aligned": (targets.sum((paired.spans.student >= 0).long()), tokens),
        "perplexity": (-targets.sum(logps), tokens),
        "teacher_perplexity": (-taught, taught_tokens),
    }
    return Measures(targets.sum(weights.loss(found, logps)), tokens, metrics, total)


def _of_spans(logps: Tensor, their_logps: Tensor, paired: Paired, temperature: float) -> Tensor:
    """Each span's loss at the student's token that begins it, 0 elsewhere: [N]."""
    spans, total = paired.spans, paired.spans.total
    ours, theirs = span_logps(logps, spans.student, total), span_logps(their_logps, spans.teacher, total)
    values = span_loss(ours, theirs.to(ours.dtype), temperature, reduction="none")
    place = torch.where(paired.partner >= 0, spans.student, total)  # past the last: a 0
    return torch.cat([values, values.new_zeros(1)])[place]
