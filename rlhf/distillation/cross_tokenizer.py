"""A teacher with another tokenizer: of the same text, what can be compared."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, Collator
from rlhf.distillation.aligned_rows import Alignment, collate_alignment, tokenize_aligned
from rlhf.distillation.config import Align, DistillConfig
from rlhf.distillation.objectives import AlignedTeacherObjective
from rlhf.distillation.teacher_setup import known_tokenizer, load_if_named
from rlhf.distillation.teachers import LiveTeacher
from rlhf.logprobs import HeadObjective
from rlhf.losses import span_logps, span_loss
from rlhf.models import vocabulary_size
from rlhf.trainers.evaluating import Measures

METRIC_OF = {"uld": "uld", "spans": "span"}  # name of the mean over aligned tokens, or over spans


@dataclass(frozen=True)
class CrossTokenizer:
    """A teacher's model and tokenizer before training, which read the rows of the data set.

    Args:
        model: the teacher.
        tokenizer: the teacher's.
        align: how its tokens are aligned with the student's.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    align: Align

    @classmethod
    def load(
        cls, args: DistillConfig, model: str | nn.Module | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> "CrossTokenizer":
        """Load the teacher of a configuration that has ``align``.

        Args:
            args: the configuration.
            model: the teacher, or its name or folder.
            tokenizer: the teacher's; by default that of the name or folder.
        Returns:
            The teacher with its tokenizer.
        Raises:
            ValueError: no model, or one whose tokenizer is not known.
        """
        if model is None:
            raise ValueError(
                f"align {args.align}: the student's own model has the same tokenizer; pass "
                "--teacher_model_name_or_path, or leave align out"
            )
        tokenizer = known_tokenizer(model, tokenizer)
        if tokenizer is None:
            raise ValueError(f"align {args.align} needs the teacher's tokenizer: pass teacher_processing_class")
        model = load_if_named(model, args.teacher_model_init_kwargs)
        return cls(model, tokenizer, args.align)  # type: ignore[arg-type]  # checked with the options

    def tokenize(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int) -> Dataset:
        """Tokenise rows for both models; ``tokenizer`` and ``vocab_size`` are the student's."""
        return tokenize_aligned(
            dataset,
            tokenizer,
            self.tokenizer,
            self.align,
            max_length=args.max_length,
            vocab_sizes=(vocab_size, vocabulary_size(self.model)),
            text_field=args.dataset_text_field,
            drop_long_prompts=args.drop_long_prompts,
            num_proc=args.dataset_num_proc,
            reading=args.reading(),
        )

    @property
    def pad_token_id(self) -> int:
        """A token to pad with; any would do, as padding is never read."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token_id for token_id in candidates if token_id is not None), 0)


@dataclass
class CrossTokenizerTeacher(LiveTeacher):
    """A teacher with another tokenizer, whose tokens are aligned with the student's.

    Args:
        align: ``"uld"`` compares sorted probabilities, ``"spans"`` the probabilities of spans of text.
        pad_token_id: the teacher's.
    """

    align: Align
    pad_token_id: int

    def collator(self, collator: Any) -> Any:
        if not isinstance(collator, Collator):
            raise ValueError(f"align {self.align} needs a rlhf.data.Collator, got {type(collator).__name__}")
        # The teacher's side is collated with the student's, by the workers of the data loader.
        collate = partial(collate_alignment, pad_token_id=self.pad_token_id)
        return replace(collator, extras={**collator.extras, "alignment": collate})

    def objective(self, batch: Batch) -> HeadObjective:
        """The comparison of sorted probabilities. Spans need log-probs alone, which take no objective."""
        return AlignedTeacherObjective(self.policy_of, self.divergence)

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        """Sums and counts as of any teacher. A span has its loss at the student's token that begins it."""
        alignment: Any = batch.extras["alignment"]
        if self.align == "uld":
            return self._measure_sorted(model, batch, alignment)
        return self._measure_spans(model, batch, alignment)

    def _measure_sorted(self, model: nn.Module, batch: Batch, alignment: Alignment) -> Measures:
        """Sorted probabilities, compared in the student's forward pass."""
        scores = model(batch, self.objective(batch))
        # Only tokens with a partner are compared, so the teacher's perplexity is of these alone.
        teacher_nll = -batch.targets.sum(scores.teacher.logps)
        compared = batch.targets.sum((alignment.partner >= 0).long())
        measures = self._measures(scores.teacher.divergence, scores.logps, batch, alignment, (teacher_nll, compared))
        return measures._replace(total=scores.loss)

    def _measure_spans(self, model: nn.Module, batch: Batch, alignment: Alignment) -> Measures:
        """Spans of text, compared by the log-probs of their tokens: no logits of the teacher are needed."""
        with torch.no_grad():
            teacher_logps = self.policy(alignment.batch).logps
        logps = model(batch).logps
        distances = span_distances(logps, teacher_logps, alignment, self.divergence.temperature)
        # Divergence options do not apply: the loss only takes its weights from there.
        total = self.divergence.loss(distances, logps).sum()
        # The teacher scores its own tokens, of which there are more or fewer than of the student's.
        teacher_targets = alignment.batch.targets
        teacher_nll = -teacher_targets.sum(teacher_logps), teacher_targets.counts()
        measures = self._measures(distances.detach(), logps.detach(), batch, alignment, teacher_nll)
        return measures._replace(total=total)

    def _measures(
        self, distances: Tensor, logps: Tensor, batch: Batch, alignment: Alignment, teacher_nll: tuple[Tensor, Tensor]
    ) -> Measures:
        """Sums and counts of the distances [N] and of the student's log-probs [N], without a gradient."""
        targets, tokens = batch.targets, batch.targets.counts()
        # Each span begins at exactly one token of the student; with sorted probabilities a span is a single token.
        num_spans = targets.sum((alignment.partner >= 0).long())
        in_span = targets.sum((alignment.spans.student >= 0).long())
        metrics = {
            METRIC_OF[self.align]: (targets.sum(distances), num_spans),
            "aligned": (in_span, tokens),
            "perplexity": (-targets.sum(logps), tokens),
            "teacher_perplexity": teacher_nll,
        }
        return Measures(targets.sum(self.divergence.loss(distances, logps)), tokens, metrics)


def span_distances(logps: Tensor, teacher_logps: Tensor, alignment: Alignment, temperature: float) -> Tensor:
    """The loss of each span at the student's token that begins it, 0 at all other tokens.

    Args:
        logps: [N], of the student's scored tokens; carries the gradient.
        teacher_logps: [M], of the teacher's.
        alignment: of the N and M tokens.
        temperature: divides the log-probs of spans.
    Returns:
        [N].
    """
    spans, num_spans = alignment.spans, alignment.spans.total
    student_spans = span_logps(logps, spans.student, num_spans)
    teacher_spans = span_logps(teacher_logps, spans.teacher, num_spans)
    # Each span once, however many tokens it has on either side. The teacher may be in another dtype.
    losses = span_loss(student_spans, teacher_spans.to(student_spans.dtype), temperature, reduction="none")
    # Tokens that begin no span read one more entry, which is 0.
    span_of_token = torch.where(alignment.partner >= 0, spans.student, num_spans)
    return torch.cat([losses, losses.new_zeros(1)])[span_of_token]
