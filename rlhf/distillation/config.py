"""Arguments of distillation."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from rlhf.distillation.matching import DISTANCES, MatchingWeights
from rlhf.logprobs import Divergence
from rlhf.logprobs.topk import Estimate
from rlhf.losses import DIVERGENCES, arguments_of
from rlhf.losses.trials import is_own, try_divergence
from rlhf.rollouts import Sampling
from rlhf.rollouts.arguments import GenerationArguments, old_name, option
from rlhf.trainers.sft import TextConfig

Align = Literal["uld", "spans"]

# Options of a divergence, which a teacher with another tokenizer does not have.
_OF_A_DIVERGENCE = ("divergence", "beta", "alpha", "reverse", "scale_by_temperature", "teacher_estimate")


@dataclass
class DistillConfig(GenerationArguments, TextConfig):
    """Arguments of :class:`DistillTrainer`.

    Names and defaults are those of TRL's ``GKDConfig`` where it has the same thing, so that a ``beta`` means what it
    means there. The two weights are those of its ``GOLDConfig`` without the prefix. ``temperature`` is the loss's; that
    of ``GKDConfig`` is of sampling alone, and its loss is at 1.
    """

    # The teacher
    teacher_model_name_or_path: str | None = option(
        None, "Teacher model. Default with --use_peft: the model without its adapter."
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Passed to from_pretrained for the teacher, such as {"dtype": "bfloat16"}.'}
    )
    teacher_file: str | None = option(
        None, "Folder written by `rlhf teacher` for these rows, instead of a teacher in memory."
    )
    teacher_estimate: str = option(
        "tail",
        "How the divergence is estimated from a folder or a server: docs/teacher-cache.md.",
        [*get_args(Estimate)],
    )
    teacher_server_url: str | None = option(None, "Address of a server (vLLM) with the teacher.")
    teacher_server_model: str | None = option(None, "Name of the teacher on the server.")
    teacher_top_k: int = option(16, "Most likely tokens to request from the server at each position.")
    align: str | None = option(
        None,
        "A teacher with another tokenizer: compare sorted probabilities (uld), or spans of the same text.",
        [*get_args(Align)],
    )

    # The loss
    divergence: str = option(
        "generalized_jsd",
        f"Between teacher and student: {', '.join(DIVERGENCES)}, or file.py:name; `rlhf losses NAME` explains it.",
    )
    temperature: float = option(1.0, "Temperature of both models' logits in the divergence.")
    scale_by_temperature: bool = option(
        False, "Multiply the divergence by the temperature squared, so that gradients keep their size."
    )
    beta: float | None = option(
        None, "Interpolation of generalized_jsd (0.5): 0 is KL(teacher, student), 1 is KL(student, teacher)."
    )
    alpha: float | None = option(None, "Alpha of skew_kl (0.1) and alpha_divergence (0.5).")
    reverse: bool = option(False, "Use KL(student, teacher) in kl_divergence and skew_kl: mode-seeking.")
    distillation_weight: float = option(1.0, "Weight of the divergence.")
    crossentropy_weight: float = option(0.0, "Weight of the cross-entropy with the tokens (hard labels).")
    hidden_state_weight: float = option(0.0, "Weight of the distance between hidden states of student and teacher.")
    hidden_state_distance: str = option("squared", "Mean square of the difference, or 1 - cosine.", [*DISTANCES])
    disable_dropout: bool = option(True, "Train without dropout; the teacher never uses dropout.")

    # The student's own answers
    lmbda: float = option(0.0, "Share of rows with answers sampled from the student (GKD); 0: none.")
    max_completion_length: int = option(256, "Longest sampled answer of the student, in tokens.")
    sampling_temperature: float = option(1.0, "Temperature for sampling the student's answers.")
    reverse_kl_reward: bool = option(
        False, "Use -KL(student, teacher) of each sampled token as a reward, instead of the divergence."
    )
    max_new_tokens: int | None = old_name("max_completion_length")
    seq_kd: bool | None = old_name("not offered: `rlhf teacher` writes the teacher's answers, which sft learns")
    teacher_model_revision: str | None = old_name("revision, in teacher_model_init_kwargs")

    _VALID_DICT_FIELDS = [  # noqa: RUF012  # not a field
        *TextConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs", "generation_kwargs",
        "transformers_continuous_batching_config",
    ]  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self._take_over_names()
        self.divergence = DIVERGENCES.name_of(self.divergence)
        self._try_divergence()
        if self.teacher_file is not None and self.teacher_model_name_or_path is not None:
            raise ValueError("teacher_file stands for a teacher: leave teacher_model_name_or_path out, or the file")
        if self.teacher_server_url is not None:
            self._check_server()
        # The reward form needs no divergence, so a server serves it for any.
        needs_estimate = self.teacher_server_url is not None and not self.reverse_kl_reward
        if self.teacher_file is not None or needs_estimate:
            self.loss().top_k_beta()
        self.loss()
        self._check_on_policy()
        self._check_matching()
        if self.align is not None:
            self._check_align(self.align)

    def loss(self) -> Divergence:
        """The loss of a token.

        Returns:
            The divergence with its options and weights.
        Raises:
            ValueError: options that do not belong to the divergence, or are out of range.
        """
        values = {"beta": self.beta, "alpha": self.alpha}
        options: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        # Passed where they are set, so that a divergence without such an option refuses it.
        for name in ("reverse", "scale_by_temperature"):
            if getattr(self, name):
                options[name] = True
        return Divergence(
            self.divergence,
            self.temperature,
            options,
            self.distillation_weight,
            self.crossentropy_weight,
            estimate=self.teacher_estimate,
        )

    def _try_divergence(self) -> None:
        """Call a divergence of the user's own before anything is loaded."""
        function = DIVERGENCES.find(self.divergence)
        if not is_own(function):
            return
        given = {name: getattr(self, name) for name in ("beta", "alpha") if getattr(self, name) is not None}
        options = arguments_of(function, given) | {"reduction": "none"}
        try_divergence(f"divergence {self.divergence}", lambda student, teacher: function(student, teacher, **options))

    def matching(self) -> MatchingWeights:
        """The comparison of hidden states.

        Returns:
            Its weight and distance.
        Raises:
            ValueError: one of them is out of range.
        """
        return MatchingWeights(self.hidden_state_weight, self.hidden_state_distance)

    def sampling(self) -> Sampling:
        """How the student's own answers are sampled.

        Returns:
            Length, temperature and what reshapes the distribution.
        Raises:
            ValueError: an option is out of range.
        """
        lengths = {"temperature": self.sampling_temperature, "max_tokens": self.max_completion_length}
        return Sampling(**self.generation_options() | lengths)

    def _take_over_names(self) -> None:
        """Replace TRL's names by those here, in place."""
        if self.seq_kd:
            raise ValueError("seq_kd is not offered: let `rlhf teacher` write the answers, and learn them with sft")
        if self.max_new_tokens is not None:
            self.max_completion_length, self.max_new_tokens = self.max_new_tokens, None
        if self.teacher_model_revision is not None:
            init_kwargs = self.teacher_model_init_kwargs if isinstance(self.teacher_model_init_kwargs, dict) else {}
            self.teacher_model_init_kwargs = {"revision": self.teacher_model_revision, **init_kwargs}
            self.teacher_model_revision = None
        self.take_over_generation()
        # Without own answers nothing is sampled, so these options would be ignored.
        if not self.lmbda and (self.generation_kwargs or self.sampling().reshapes):
            raise ValueError("generation options are for the student's own answers: leave them out, or raise lmbda")

    def _check_server(self) -> None:
        if self.teacher_server_model is None:
            raise ValueError("teacher_server_url needs teacher_server_model, the name that the teacher is served under")
        if self.teacher_model_name_or_path is not None or self.teacher_file is not None:
            raise ValueError("teacher_server_url stands for a teacher: leave teacher_model_name_or_path and _file out")
        # The server applies no temperature to the log-probs of a prompt.
        if self.temperature != 1:
            raise ValueError(f"a server reports log-probs at temperature 1 alone, not {self.temperature}")
        if self.teacher_top_k < 1:
            raise ValueError(f"teacher_top_k must be at least 1, got {self.teacher_top_k}")

    def _check_on_policy(self) -> None:
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"lmbda is a share of the rows, in [0, 1]; got {self.lmbda}")
        if self.reverse_kl_reward:
            self._check_reward()
        if not self.lmbda:
            return
        if self.teacher_file is not None:
            raise ValueError(
                "teacher_file has no predictions for the student's own answers: lmbda needs another teacher"
            )
        if self.packing or self.tokens_per_batch is not None:
            raise ValueError(
                "packing and tokens_per_batch plan rows by their length, which is unknown for answers to be "
                "sampled: leave them out"
            )
        # A student that is trained on its own samples as labels only becomes surer of them.
        if self.crossentropy_weight:
            raise ValueError(
                "crossentropy_weight would train the student on its own answers as labels: leave it out with lmbda"
            )
        # A prompt and its answer share max_length.
        if self.max_completion_length >= self.limit():
            raise ValueError(
                f"max_completion_length {self.max_completion_length} leaves no room for a prompt in max_length "
                f"{self.max_length}: raise max_length"
            )
        self.sampling()

    def _check_reward(self) -> None:
        """The reward is a sample of the reverse KL, so answers must be drawn from the student as it is."""
        if self.lmbda != 1:
            raise ValueError("reverse_kl_reward is for the student's own answers alone: set lmbda to 1")
        # Answers of another distribution than q would need weights, which the reward form does not have.
        if self.temperature != 1 or self.sampling_temperature != 1:
            raise ValueError("reverse_kl_reward needs temperature and sampling_temperature 1: it is a sample of the KL")
        if self.sampling().reshapes:
            raise ValueError(
                "reverse_kl_reward is a sample of the KL: leave top_p, top_k, min_p and repetition_penalty out"
            )

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

    def _check_align(self, align: str) -> None:
        """What does not go with a teacher that has another tokenizer."""
        for name in ("teacher_file", "teacher_server_url"):
            if getattr(self, name) is not None:
                raise ValueError(f"align {align} needs the teacher itself, not {name}: teacher_model_name_or_path")
        # Own answers are token ids, which have no rendering in the teacher's template.
        if self.lmbda:
            raise ValueError(f"align {align} reads the text of rows, and lmbda would give ids: leave one of them out")
        if self.hidden_state_weight:
            raise ValueError(
                f"hidden_state_weight compares token by token, and align {align} has other tokens: leave it out"
            )
        defaults = {option_field.name: option_field.default for option_field in fields(self)}
        options_set = [name for name in _OF_A_DIVERGENCE if getattr(self, name) != defaults[name]]
        if options_set:
            raise ValueError(f"align {align} has a loss of its own: leave {', '.join(options_set)} out")
