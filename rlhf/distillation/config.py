"""Arguments of distillation."""

from dataclasses import dataclass, field
from typing import Any, get_args

from rlhf.distillation.cross_tokenizer import check_options
from rlhf.distillation.matching import DISTANCES, MatchingWeights
from rlhf.logprobs import Divergence
from rlhf.logprobs.topk import Estimate
from rlhf.losses import DIVERGENCES
from rlhf.rollouts import Sampling
from rlhf.rollouts.arguments import GenerationArguments, old_name
from rlhf.trainers.sft import TextConfig


@dataclass
class DistillConfig(GenerationArguments, TextConfig):
    """Arguments of :class:`DistillTrainer`.

    Names and defaults are those of TRL's ``GKDConfig`` where it has the same thing, so that a ``beta`` means what it
    means there; the two weights are those of its ``GOLDConfig`` without the prefix. ``temperature`` is the loss's (that
    of ``GKDConfig`` is of sampling alone, and its loss is at 1).
    """

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The teacher. With an adapter (--use_peft) and none, the model without the adapter."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Passed to from_pretrained for the teacher, such as {"dtype": "bfloat16"}.'}
    )
    teacher_file: str | None = field(
        default=None,
        metadata={"help": "Folder that `rlhf teacher` wrote for these rows, in place of a teacher in memory."},
    )
    teacher_estimate: str = field(
        default="tail",
        metadata={
            "help": "Of the divergence, from that folder: docs/teacher-cache.md.",
            "choices": [*get_args(Estimate)],
        },
    )
    divergence: str = field(
        default="generalized_jsd",
        metadata={"help": "Between teacher and student; `rlhf losses NAME` explains it.", "choices": [*DIVERGENCES]},
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits of both sides in the divergence."})
    scale_by_temperature: bool = field(
        default=False, metadata={"help": "Multiply it by the temperature squared, so that gradients keep their size."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "Of generalized_jsd (0.5): 0 is KL(teacher, student), 1 KL(student, teacher)."}
    )
    alpha: float | None = field(default=None, metadata={"help": "Of skew_kl (0.1) and alpha_divergence (0.5)."})
    reverse: bool = field(
        default=False, metadata={"help": "Of kl_divergence and skew_kl: the student's first, which seeks modes."}
    )
    distillation_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    crossentropy_weight: float = field(
        default=0.0, metadata={"help": "Weight of the tokens themselves, the hard labels, at temperature 1."}
    )
    align: str | None = field(
        default=None,
        metadata={
            "help": "A teacher with another tokenizer: compare sorted probabilities (uld), or spans of the same text.",
            "choices": ["uld", "spans"],
        },
    )
    hidden_state_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance between the layers' outputs, student's and teacher's."}
    )
    hidden_state_distance: str = field(
        default="squared", metadata={"help": "Mean square of the difference, or 1 - cosine.", "choices": [*DISTANCES]}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout; the teacher never has any."})
    # A teacher elsewhere
    teacher_server_url: str | None = field(default=None, metadata={"help": "The teacher is there (vLLM), not here."})
    teacher_server_model: str | None = field(default=None, metadata={"help": "Name that it is served under."})
    teacher_top_k: int = field(default=16, metadata={"help": "Likeliest tokens that the server is asked for."})
    # On-policy
    lmbda: float = field(
        default=0.0, metadata={"help": "Share of the rows that the student answers itself (GKD); 0 is offline."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Longest such answer in tokens."})
    max_new_tokens: int | None = old_name("max_completion_length")
    seq_kd: bool | None = old_name("not offered: `rlhf teacher` writes the teacher's answers, which sft learns")
    teacher_model_revision: str | None = old_name("revision, in teacher_model_init_kwargs")
    sampling_temperature: float = field(default=1.0, metadata={"help": "Of such answers."})
    reverse_kl_reward: bool = field(
        default=False,
        metadata={"help": "Reward own answers by -KL(student, teacher) of each token, in place of the divergence."},
    )

    _VALID_DICT_FIELDS = [  # noqa: RUF012  # not a field
        *TextConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs", "generation_kwargs",
        "transformers_continuous_batching_config",
    ]  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self._take_over_names()
        if self.teacher_estimate not in get_args(Estimate):
            raise ValueError(
                f"teacher_estimate must be {' or '.join(get_args(Estimate))}, got {self.teacher_estimate!r}"
            )
        if self.teacher_file is not None and self.teacher_model_name_or_path is not None:
            raise ValueError("teacher_file stands for a teacher: leave teacher_model_name_or_path out, or the file")
        if self.teacher_server_url is not None:
            self._check_server()
        if self.teacher_file is not None or (self.teacher_server_url is not None and not self.reverse_kl_reward):
            self.loss().of_top_k()
        self.loss()
        self._check_on_policy()
        self._check_matching()
        check_options(self)

    def _take_over_names(self) -> None:
        if self.seq_kd:
            raise ValueError("seq_kd is not offered: let `rlhf teacher` write the answers, and learn them with sft")
        if self.max_new_tokens is not None:
            self.max_completion_length, self.max_new_tokens = self.max_new_tokens, None
        if self.teacher_model_revision is not None:
            own = self.teacher_model_init_kwargs if isinstance(self.teacher_model_init_kwargs, dict) else {}
            self.teacher_model_init_kwargs = {"revision": self.teacher_model_revision, **own}
            self.teacher_model_revision = None
        self.take_over_generation()
        if not self.lmbda and (self.generation_kwargs or self.sampling().reshapes):
            raise ValueError("generation options are for the student's own answers: leave them out, or raise lmbda")

    def _check_server(self) -> None:
        if self.teacher_server_model is None:
            raise ValueError("teacher_server_url needs teacher_server_model, the name that the teacher is served under")
        if self.teacher_model_name_or_path is not None or self.teacher_file is not None:
            raise ValueError("teacher_server_url stands for a teacher: leave teacher_model_name_or_path and _file out")
        if self.temperature != 1:
            raise ValueError(f"a server reports log-probs at temperature 1 alone, not {self.temperature}")
        if self.teacher_top_k < 1:
            raise ValueError(f"teacher_top_k must be at least 1, got {self.teacher_top_k}")

    def _check_on_policy(self) -> None:
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"lmbda is a share of the rows, in [0, 1]; got {self.lmbda}")
        if self.reverse_kl_reward:
            if self.lmbda != 1:
                raise ValueError("reverse_kl_reward is for the student's own answers alone: set lmbda to 1")
            if self.temperature != 1 or self.sampling_temperature != 1:
                raise ValueError(
                    "reverse_kl_reward needs temperature and sampling_temperature 1: it rewards what is drawn"
                )
            if self.sampling().reshapes:
                raise ValueError("reverse_kl_reward rewards what is drawn: no top_p, top_k, min_p, repetition_penalty")
        if not self.lmbda:
            return
        if self.teacher_file is not None:
            raise ValueError("teacher_file says nothing of the student's own answers: lmbda needs a teacher")
        if self.packing or self.tokens_per_batch is not None:
            raise ValueError(
                "packing and tokens_per_batch plan rows by their length, which answers to come have not yet"
            )
        if self.crossentropy_weight:
            raise ValueError("crossentropy_weight would teach the student its own answers: leave it out with lmbda")
        if self.max_completion_length >= self.limit():
            raise ValueError(
                f"max_completion_length {self.max_completion_length} leaves no room for a prompt in max_length "
                f"{self.max_length}: raise max_length"
            )
        self.sampling()

    def sampling(self) -> Sampling:
        """Of the student's own answers."""
        own = dict(temperature=self.sampling_temperature, max_tokens=self.max_completion_length)
        return Sampling(**self.generation_options() | own)

    def _check_matching(self) -> None:
        if not self.matching().hidden_states:
            return
        if self.teacher_file is not None or self.teacher_server_url is not None:
            raise ValueError(
                "teacher_file and teacher_server_url hold no hidden states: leave hidden_state_weight out, or name the "
                "teacher (--teacher_model_name_or_path)"
            )
        if self.reverse_kl_reward:
            raise ValueError("reverse_kl_reward is the whole loss: leave hidden_state_weight out")

    def matching(self) -> MatchingWeights:
        """The terms beside the divergence; raises for what is out of range."""
        return MatchingWeights(self.hidden_state_weight, self.hidden_state_distance)

    def loss(self) -> Divergence:
        """The loss of a token; raises for what does not fit together."""
        options = dict(beta=self.beta, alpha=self.alpha)
        switches = dict(reverse=self.reverse, scale_by_temperature=self.scale_by_temperature)
        return Divergence(
            self.divergence,
            self.temperature,
            {name: value for name, value in options.items() if value is not None}
            | {name: value for name, value in switches.items() if value},
            self.distillation_weight,
            self.crossentropy_weight,
            estimate=self.teacher_estimate,
        )
