"""The options of direct preference optimisation, and the loss that they make."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.data.columns import check_preference_columns
from rlhf.losses import PREFERENCE_LOSSES, PreferenceLoss, arguments_of, dpo_loss
from rlhf.losses.trials import TRIAL_PAIRS, is_own, try_pair_loss
from rlhf.trainers.referenced import ReferencedConfig

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
COLUMNS = ("margin",)  # of the rows, for losses that read them
LENGTHS = ("chosen_lengths", "rejected_lengths")
KL_COLUMNS = ("chosen_kl", "rejected_kl")
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
            "help": f"One of {', '.join(PREFERENCE_LOSSES)}, or file.py:name; several are added, with loss_weights."
        },
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each loss_type."})
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Further arguments of the loss, such as {"simpo_gamma": 1.0}.'}
    )
    label_smoothing: float | None = field(
        default=None,
        metadata={"help": "Probability that a label is wrong; default: that of the loss, mostly 0."},
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of the discopop loss."})
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence from the reference (f-DPO), for losses that depend on the margin only.",
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
        default=False, metadata={"help": "Weight each pair by the policy's probability of its answers (WPO)."}
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
        loss_type: Any = self.loss_type  # one loss, or a list of several
        losses = loss_type if isinstance(loss_type, list | tuple) else [loss_type]
        self.loss_type = [PREFERENCE_LOSSES.name_of(loss) for loss in losses]
        without_margin = set(self.loss_type) - set(OF_A_MARGIN)
        # Scores of f take the place of log-ratios, so that the loss must read a margin of log-ratios alone.
        if self.f_divergence_type != "reverse_kl" and without_margin:
            raise ValueError(
                f"f_divergence_type is for {', '.join(OF_A_MARGIN)}; loss_type {min(without_margin)} has one of its own"
            )
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be in [0, 1], got {self.ld_alpha}")
        self._check_loss()

    def _check_loss(self) -> None:
        losses = dict(zip(self.loss_type, self.losses(), strict=True))
        # A coupled loss compares the pairs of a batch with each other: none has a loss of its own to weigh.
        coupled = [name for name, loss in losses.items() if loss.coupled]
        if self.use_weighting and coupled:
            raise ValueError(f"use_weighting weighs pairs, loss_type {coupled[0]} sorts them: leave one of both out")
        if self.label_smoothing and not any("label_smoothing" in loss.hyper_parameters for loss in losses.values()):
            raise ValueError(f"loss_type {' '.join(losses)} takes no label_smoothing: leave it out")
        for name, loss in losses.items():
            for column in loss.needs:
                if column not in (*LENGTHS, *COLUMNS, *KL_COLUMNS, *self.hyper_parameters()):
                    raise ValueError(f"loss_type {name} needs {column}, which rows of pairs do not have")
        if self.reads_kl():
            self._check_kl()
        # The loss itself checks its hyper-parameters: here, rather than at the first step.
        what = f"loss_type {' '.join(losses)}"
        columns = dict.fromkeys((*LENGTHS, *COLUMNS, *KL_COLUMNS), torch.ones(TRIAL_PAIRS))
        if any(is_own(loss) for loss in losses.values()):
            try_pair_loss(what, lambda *sums: self.loss(*sums, **columns))
            return
        ones = torch.ones(TRIAL_PAIRS)
        try:
            self.loss(ones, ones, ones, ones, **columns)
        except TypeError as error:
            raise ValueError(f"{what}: {error}") from error

    def _check_kl(self) -> None:
        """A KL of each token needs all predictions of the reference, and two passes that agree."""
        losses = " ".join(self.loss_type)
        if self.precompute_ref_log_probs:
            raise ValueError(f"loss_type {losses} reads predictions, of which precompute_ref_log_probs keeps sums only")
        if self.ld_alpha is not None or self.use_weighting or not self.disable_dropout:
            raise ValueError(f"loss_type {losses} takes neither ld_alpha nor use_weighting, and disable_dropout alone")
        # None would let the trainer choose, and it might store sums.
        self.precompute_ref_log_probs = False

    def losses(self) -> list[PreferenceLoss]:
        """The losses that ``loss_type`` names."""
        return [PREFERENCE_LOSSES.find(name) for name in self.loss_type]

    def hyper_parameters(self) -> dict[str, Any]:
        """What ``loss_kwargs`` sets."""
        return self.loss_kwargs if isinstance(self.loss_kwargs, dict) else {}

    def reads_margin(self) -> bool:
        """Whether a loss reads the column ``margin`` of the rows."""
        return "margin" not in self.hyper_parameters() and any("margin" in loss.columns for loss in self.losses())

    def reads_kl(self) -> bool:
        """Whether a loss reads the KL of whole sequences to the reference."""
        return any(column in loss.columns for loss in self.losses() for column in KL_COLUMNS)

    def check_columns(self, columns: list[str]) -> None:
        check_preference_columns(columns, self.reading().form)

    def loss(self, *sums: Tensor, **columns: Tensor) -> Tensor:
        """The loss of pairs.

        Args:
            sums: of log-probs, [S] each, in nats: chosen and rejected under the policy, then under the reference.
            columns: [S] each, what else a pair has; a loss is passed those that it reads.
        Returns:
            The loss of each pair, [S].
        """
        offered = {"discopop_tau": self.discopop_tau, **columns}
        if self.label_smoothing is not None:
            offered["label_smoothing"] = self.label_smoothing
        options: dict[str, Any] = {}
        for loss in self.losses():
            options |= arguments_of(loss, offered)
        if self.f_divergence_type != "reverse_kl":
            # A loss of a margin reads log-ratios alone: scores of f take their place, against a reference of 0.
            chosen, rejected, ref_chosen, ref_rejected = sums
            chosen_score, rejected_score = (
                f_scores(log_ratio, self.f_divergence_type, self.f_alpha_divergence_coef)
                for log_ratio in (chosen - ref_chosen, rejected - ref_rejected)
            )
            sums = (chosen_score, rejected_score, torch.zeros_like(ref_chosen), torch.zeros_like(ref_rejected))
        # Last, so that what a user sets wins over a column of the rows.
        options |= self.hyper_parameters()
        return dpo_loss(
            *sums, self.beta, loss_type=self.loss_type, loss_weights=self.loss_weights, reduction="none", **options
        )


def f_scores(log_ratios: Tensor, name: str, alpha: float) -> Tensor:
    """Replace log-ratios to the reference by the scores of another f-divergence.

    Args:
        log_ratios: [S], log-probability under the policy less that under the reference, nats.
        name: of :data:`F_DIVERGENCES`.
        alpha: of ``alpha_divergence``, as TRL has it.
    Returns:
        [S], f'(u) of the probability ratio u, up to a constant.

    Source: arXiv 2309.16240, table 1.
    """
    # Exponents stop at 80, so that a hopeless pair stays finite.
    if name == "forward_kl":
        return -torch.exp((-log_ratios).clamp(max=80))
    if name == "js_divergence":
        # log(2u / (1 + u)) without its constant log 2.
        return F.logsigmoid(log_ratios)
    # At alpha = 1 the formula is 0 / 0, and its limit the log-ratio.
    if name == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        return torch.expm1(((alpha - 1) * log_ratios).clamp(max=80)) / (alpha - 1)
    return log_ratios
