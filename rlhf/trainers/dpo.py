"""Direct preference optimisation and its family, on pairs against a frozen reference."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, tokenize_preferences
from rlhf.data.columns import check_preference_columns
from rlhf.logprobs import Predictions, Targets
from rlhf.losses import PREFERENCE_LOSSES, PreferenceLoss, arguments_of, dpo_loss
from rlhf.trainers.base import BaseConfig, Measures
from rlhf.trainers.referenced import ReferencedConfig, ReferencedTrainer

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
COLUMNS = ("margin",)  # of the rows, for losses that read them
LENGTHS = ("chosen_lengths", "rejected_lengths")
OF_A_MARGIN = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
REFUSED = {
    "rpo_alpha": "pass loss_type sigmoid sft and loss_weights 1.0 ALPHA, which is the same loss",
    "max_prompt_length": "max_length cuts answers and never a prompt; drop_long_prompts leaves out rows without room",
    "reference_free": "loss_type simpo, cpo or orpo needs no reference",
}


@dataclass
class DPOConfig(ReferencedConfig):
    """Arguments of :class:`DPOTrainer`; names and defaults are TRL's where TRL has the same thing."""

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": f"One of {', '.join(PREFERENCE_LOSSES)}, or file.py:name; or several, whose weighted sum is taken."
        },
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "One weight for each loss_type."})
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'What a loss takes besides, such as {"simpo_gamma": 1.0}.'}
    )
    label_smoothing: float | None = field(
        default=None,
        metadata={"help": "Chance that a pair is labelled the wrong way; by default the loss's own, mostly 0."},
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of the discopop loss."})
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={
            "help": "The divergence from the reference that is bounded, for losses of a margin.",
            "choices": list(F_DIVERGENCES),
        },
    )
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata={"help": "Alpha of alpha_divergence; 1 is reverse_kl."}
    )
    ld_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight, in [0, 1], of tokens beyond the length of the shorter answer (LD-DPO)."},
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "Weigh each pair by how likely its answers are for the policy (WPO)."}
    )
    # TRL's, that are gone there too
    rpo_alpha: float | None = field(default=None, metadata={"help": "Refused: use loss_type sigmoid sft."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Refused: use max_length."})
    reference_free: bool | None = field(default=None, metadata={"help": "Refused: use loss_type simpo or cpo."})

    _VALID_DICT_FIELDS = [*ReferencedConfig._VALID_DICT_FIELDS, "loss_kwargs"]  # noqa: RUF012  # not a field

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, instead in REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"{name} is not supported: {instead}")
        given: Any = self.loss_type
        several = given if isinstance(given, list | tuple) else [given]
        self.loss_type = [PREFERENCE_LOSSES.name_of(loss) for loss in several]
        if self.f_divergence_type not in F_DIVERGENCES:
            raise ValueError(
                f"f_divergence_type must be one of {', '.join(F_DIVERGENCES)}, got {self.f_divergence_type!r}"
            )
        if self.f_divergence_type != "reverse_kl" and (other := set(self.loss_type) - set(OF_A_MARGIN)):
            raise ValueError(
                f"f_divergence_type is for {', '.join(OF_A_MARGIN)}; loss_type {min(other)} has one of its own"
            )
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be in [0, 1], got {self.ld_alpha}")
        self._check_loss()

    def _check_loss(self) -> None:
        losses = dict(zip(self.loss_type, self.losses(), strict=True))
        coupled = [name for name, loss in losses.items() if loss.coupled]
        if self.use_weighting and coupled:
            raise ValueError(f"use_weighting weighs pairs, loss_type {coupled[0]} sorts them: leave one of both out")
        if self.label_smoothing and not any("label_smoothing" in loss.hyper_parameters for loss in losses.values()):
            raise ValueError(f"loss_type {' '.join(losses)} takes no label_smoothing: leave it out")
        for name, loss in losses.items():
            for column in loss.needs:
                if column not in (*LENGTHS, *COLUMNS, *self.hyper_parameters()):
                    raise ValueError(f"loss_type {name} needs {column}, which rows of pairs do not have")
        # The loss itself checks its hyper-parameters: here, rather than at the first step.
        one = torch.ones(1)
        try:
            self.loss(one, one, one, one, **dict.fromkeys((*LENGTHS, *COLUMNS), one))
        except TypeError as error:
            raise ValueError(f"loss_type {' '.join(losses)}: {error}") from error

    def losses(self) -> list[PreferenceLoss]:
        """The losses that ``loss_type`` names."""
        return [PREFERENCE_LOSSES.find(name) for name in self.loss_type]

    def hyper_parameters(self) -> dict[str, Any]:
        """What ``loss_kwargs`` sets."""
        return self.loss_kwargs if isinstance(self.loss_kwargs, dict) else {}

    def reads_margin(self) -> bool:
        """Whether a loss reads the column ``margin`` of the rows."""
        return "margin" not in self.hyper_parameters() and any("margin" in loss.columns for loss in self.losses())

    def check_columns(self, columns: list[str]) -> None:
        check_preference_columns(columns, self.reading().form)

    def loss(self, *sums: Tensor, **columns: Tensor) -> Tensor:
        """The loss of each pair, [S].

        Args:
            sums: of log-probs, [S] each, in nats: chosen and rejected under the policy, then under the reference.
            columns: [S] each, what else a pair has; a loss is passed those that it reads.
        """
        offered = {"discopop_tau": self.discopop_tau, **columns}
        if self.label_smoothing is not None:
            offered["label_smoothing"] = self.label_smoothing
        taken: dict[str, Any] = {}
        for loss in self.losses():
            taken |= arguments_of(loss, offered)
        if self.f_divergence_type != "reverse_kl":
            # A loss of a margin reads log-ratios alone: scores of f take their place, against a reference of 0.
            chosen, rejected, ref_chosen, ref_rejected = sums
            chosen_score, rejected_score = (
                f_scores(log_ratio, self.f_divergence_type, self.f_alpha_divergence_coef)
                for log_ratio in (chosen - ref_chosen, rejected - ref_rejected)
            )
            sums = (chosen_score, rejected_score, torch.zeros_like(ref_chosen), torch.zeros_like(ref_rejected))
        options = taken | self.hyper_parameters()
        return dpo_loss(
            *sums, self.beta, loss_type=self.loss_type, loss_weights=self.loss_weights, reduction="none", **options
        )


def f_scores(ratios: Tensor, name: str, alpha: float) -> Tensor:
    """f'(u) of the probability ratio u, up to a constant, from its logarithm: what takes the place of the log-ratio.

    Args:
        ratios: [S], log-probability under the policy less that under the reference, nats.
        name: of :data:`F_DIVERGENCES`. alpha: of ``alpha_divergence``, as TRL has it.

    Source: arXiv 2309.16240, table 1. Exponents stop at 80, so that a hopeless pair stays finite.
    """
    if name == "forward_kl":
        return -torch.exp((-ratios).clamp(max=80))
    if name == "js_divergence":
        return F.logsigmoid(ratios)
    if name == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        return torch.expm1(((alpha - 1) * ratios).clamp(max=80)) / (alpha - 1)
    return ratios


class DPOTrainer(ReferencedTrainer):
    """Align a policy with preference pairs.

    The reference is, under a new adapter, the model with the adapter off; otherwise a frozen copy of the weights as
    they are now (or ``ref_model``). The loss is the mean over the pairs of the whole optimizer step.

    Args:
        model: a model, a PEFT model, or a name or folder to load one from.
        ref_model: another reference, as a model or by name.
        args: the configuration.
        train_dataset, eval_dataset: rows of ``prompt``, ``chosen``, ``rejected``, and ``margin`` for ``odpo``.
        kwargs: ``processing_class``, ``peft_config``, ``callbacks``, … as in :class:`SFTTrainer`.
    Logs:
        ``loss`` (log 2 at the start, for ``sigmoid``), ``rewards/chosen`` and ``rewards/rejected``
        (beta * log-ratio to the reference), ``rewards/margins`` (their difference), ``rewards/accuracies`` (share of
        pairs whose margin is positive; a tie counts one half, so policy = reference gives 0.5), ``logps/chosen`` and
        ``logps/rejected`` (sums over completion tokens, in nats), ``perplexity/chosen`` (of all chosen tokens).
    Raises:
        ValueError: bad data, named by data set and row, before any step.
    """

    config_class: ClassVar[type[BaseConfig]] = DPOConfig
    balances: ClassVar[bool] = True
    exp_metrics: ClassVar[frozenset[str]] = frozenset({"perplexity/chosen"})

    ref_tokens: ClassVar[tuple[str, ...]] = ("prompt_ids", "chosen_ids", "rejected_ids", "labels")
    ref_columns: ClassVar[tuple[str, ...]] = ("ref_chosen_logps", "ref_rejected_logps")

    def set_up(self) -> None:
        if self.args.use_weighting and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "use_weighting reads the head once more, which is sharded under FSDP and DeepSpeed: leave it out"
            )

    def tokenize(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int
    ) -> Dataset:  # fmt: skip
        rows = tokenize_preferences(
            dataset,
            tokenizer,
            max_length=args.max_length,
            vocab_size=vocab_size,
            drop_long_prompts=args.drop_long_prompts,
            num_proc=args.dataset_num_proc,
            reading=args.reading(),
            margin=args.reads_margin(),
        )
        if args.reads_margin() and "margin" not in (rows.column_names or []):
            raise ValueError(
                f"loss_type {' '.join(args.loss_type)} reads the column margin, which the rows do not have: add it, or "
                "give one number to all pairs, --loss_kwargs '{\"margin\": 1.0}'"
            )
        return rows

    def count(self, batch: Batch) -> int:
        return batch.targets.num_sequences // 2

    def sums(self, batch: Batch, logps: Tensor) -> Tensor:
        """Sums over each answer, [S]; with ld_alpha, tokens beyond the shorter answer of a pair count that much."""
        if self.args.ld_alpha is None:
            return super().sums(batch, logps)
        return batch.targets.sum(logps * tail_weights(batch.targets, self.args.ld_alpha))

    def reference_key(self) -> str:
        return "" if self.args.ld_alpha is None else f"-ld{self.args.ld_alpha}"

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        targets, args = batch.targets, self.args
        ref_chosen, ref_rejected = self.ref_sums(model, batch).view(-1, 2).unbind(1)
        scores = model(batch)
        logps = scores.logps
        chosen, rejected = self.sums(batch, logps).view(-1, 2).unbind(1)
        chosen_lengths, rejected_lengths = targets.counts().view(-1, 2).unbind(1)
        columns = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        if "margin" in batch.per_sequence:  # the same at both sequences of a pair
            columns["margin"] = batch.per_sequence["margin"].view(-1, 2)[:, 0]
        losses = args.loss(chosen, rejected, ref_chosen, ref_rejected, **columns)
        if args.use_weighting:
            losses = losses * self._pair_weights(model, batch, logps.detach())
        rewards_chosen = args.beta * (chosen - ref_chosen).detach()
        rewards_rejected = args.beta * (rejected - ref_rejected).detach()
        margins = rewards_chosen - rewards_rejected
        # A tie within rounding: sums that were stored differ in their last bits from those computed now.
        tie = margins.abs() <= 1e-6 * args.beta * (chosen + rejected).detach().abs()
        one = torch.ones_like(margins)
        metrics = {
            "rewards/chosen": rewards_chosen,
            "rewards/rejected": rewards_rejected,
            "rewards/accuracies": torch.where(tie, 0.5, (margins > 0).to(margins.dtype)),
            "rewards/margins": margins,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        counted = {name: (value, one) for name, value in metrics.items()}
        nll = -targets.sum(logps.detach()).view(-1, 2)[:, 0]
        counted["perplexity/chosen"] = (nll, chosen_lengths)
        return Measures(losses, one, counted, router_logits=scores.router_logits)

    def _pair_weights(self, model: nn.Module, batch: Batch, logps: Tensor) -> Tensor:
        """WPO's weights, [pairs]: for each answer the geometric mean of p(token) / sum p^2, over its tokens.

        Source: arXiv 2406.11827, eq. 2, with its alignment to the policy's own answers.
        """
        with torch.no_grad():
            predictions = self.accelerator.unwrap_model(model).predictions(batch)
            aligned = logps - log_sum_sq_probs(predictions)
            means = batch.targets.sum(aligned) / batch.targets.counts().clamp(min=1)
            return means.exp().view(-1, 2).prod(1)


def tail_weights(targets: Targets, alpha: float) -> Tensor:
    """Of each token of pairs, [N]: 1 up to the length of the shorter answer of its pair, ``alpha`` beyond.

    Source: LD-DPO, arXiv 2409.06411.
    """
    counts = targets.counts()
    position = torch.arange(len(targets), device=counts.device) - (counts.cumsum(0) - counts)[targets.sequence]
    shorter = counts.view(-1, 2).amin(1).repeat_interleave(2)[targets.sequence]
    return torch.where(position < shorter, 1.0, alpha)


def log_sum_sq_probs(predictions: Predictions, chunk: int = 256) -> Tensor:
    """log of the sum over the vocabulary of squared probabilities, [N], some tokens at a time."""
    parts = []
    for rows in predictions.rows.split(chunk):
        logits = predictions._replace(rows=rows).logits(torch.float32)
        parts.append((2 * logits.log_softmax(-1)).logsumexp(-1))
    return torch.cat(parts) if parts else predictions.rows.new_zeros(0)
