"""The table of commands. Nothing heavy is imported here, so that help and a mistyped option are answered at once.

A class is named as ``module:Class``; it is imported when its command runs.
"""

from dataclasses import dataclass

# Groups of options that several commands have.
DATA = "rlhf.cli.arguments:DataArguments"
MODEL = "rlhf.cli.arguments:ModelArguments"
FROZEN_MODEL = "rlhf.cli.arguments:LoadArguments"
REFERENCE = "rlhf.cli.arguments:ReferenceArguments"
EXPERIENCE = "rlhf.cli.arguments:ExperienceArguments"
TEACHER_ADAPTER = "rlhf.cli.arguments:TeacherAdapterArguments"
LAUNCH = "rlhf.cli.launch:LaunchArguments"


@dataclass(frozen=True)
class Command:
    """A command that does not train: a module with a function ``run(argv)``.

    Attributes:
        summary: one line for ``rlhf --help``.
        module: where ``run`` is.
        option_classes: data classes whose fields are the options. Empty where the module has a parser of its own.
        group: heading in ``rlhf --help``.
    """

    summary: str
    module: str
    option_classes: tuple[str, ...] = ()
    group: str = "More"


@dataclass(frozen=True)
class TrainingCommand:
    """A command that trains; :func:`rlhf.cli.training.run` runs each of them.

    Attributes:
        summary: one line for ``rlhf --help``.
        trainer: class of the trainer, or a function that makes one from the same keyword arguments.
        config: data class of its options.
        groups: further groups of options; each turns what it was given into keyword arguments of the trainer.
        load_model: function that loads the model to train.
    """

    summary: str
    trainer: str
    config: str
    groups: tuple[str, ...] = ()
    load_model: str = "rlhf.models:load_model"

    @property
    def group(self) -> str:
        """Heading in ``rlhf --help``."""
        return "Train"

    @property
    def option_classes(self) -> tuple[str, ...]:
        """Data classes whose fields are the options, in the order of the help."""
        return (LAUNCH, DATA, MODEL, *self.groups, self.config)


GROUPS = ("Train", "Prepare", "Results", "More")  # headings of the help, in this order

# In the order of the help: by how often a command is the first one that people use.
COMMANDS: dict[str, Command | TrainingCommand] = {
    "sft": TrainingCommand(
        "fine-tune on text, conversations, or prompts with completions",
        trainer="rlhf.trainers:SFTTrainer",
        config="rlhf.trainers:SFTConfig",
    ),
    "dpo": TrainingCommand(
        "align with preference pairs (prompt, chosen, rejected)",
        trainer="rlhf.trainers:DPOTrainer",
        config="rlhf.trainers:DPOConfig",
        groups=(REFERENCE,),
    ),
    "kto": TrainingCommand(
        "align with single answers marked good or bad",
        trainer="rlhf.trainers:KTOTrainer",
        config="rlhf.trainers:KTOConfig",
        groups=(REFERENCE,),
    ),
    # Its teacher may be an adapter in a folder, so that a function makes the trainer.
    "distill": TrainingCommand(
        "train a student on the predictions of a teacher",
        trainer="rlhf.cli.training:make_distill_trainer",
        config="rlhf.distillation:DistillConfig",
        groups=(TEACHER_ADAPTER,),
    ),
    # A reward model has a scalar head in place of the vocabulary.
    "reward": TrainingCommand(
        "train a reward model on preference pairs",
        trainer="rlhf.trainers:RewardTrainer",
        config="rlhf.trainers:RewardConfig",
        load_model="rlhf.models:load_reward_model",
    ),
    # These five are one trainer with other defaults: where advantages come from, and the loss.
    "ppo": TrainingCommand(
        "train on rewards with a critic (prompts, --reward_funcs)",
        trainer="rlhf.online:PPOTrainer",
        config="rlhf.online:PPOConfig",
        groups=(REFERENCE, EXPERIENCE),
    ),
    "grpo": TrainingCommand(
        "train on rewards, baseline: mean of a group (DAPO, GSPO, …)",
        trainer="rlhf.online:GRPOTrainer",
        config="rlhf.online:GRPOConfig",
        groups=(REFERENCE, EXPERIENCE),
    ),
    "rloo": TrainingCommand(
        "train on rewards, baseline: the others of a group",
        trainer="rlhf.online:RLOOTrainer",
        config="rlhf.online:RLOOConfig",
        groups=(REFERENCE, EXPERIENCE),
    ),
    "online-dpo": TrainingCommand(
        "DPO on pairs of sampled completions, ranked by rewards",
        trainer="rlhf.online:OnlineDPOTrainer",
        config="rlhf.online:OnlineDPOConfig",
        groups=(REFERENCE, EXPERIENCE),
    ),
    "best-of-n": TrainingCommand(
        "fine-tune on the best of n sampled completions",
        trainer="rlhf.online:BestOfNTrainer",
        config="rlhf.online:BestOfNConfig",
        groups=(REFERENCE, EXPERIENCE),
    ),
    # It starts the commands above, and passes their options on: it has a parser of its own.
    "sweep": Command(
        "train once for each value of some options, and compare the runs",
        module="rlhf.cli.sweep",
        group="Train",
    ),
    # From here on nothing is trained.
    # Some of its options exclude each other, and data classes cannot express that: it has a parser of its own.
    "student": Command(
        "make a smaller model: layers of a teacher, or new weights",
        module="rlhf.cli.student",
        group="Prepare",
    ),
    # No options of the launcher: one process writes the folder.
    "teacher": Command(
        "store a teacher's predictions for a data set, to distill from",
        module="rlhf.cli.teacher",
        option_classes=("rlhf.cli.teacher:TeacherArguments", FROZEN_MODEL),
        group="Prepare",
    ),
    "eval": Command(
        "perplexity, preference accuracy, or KL to a teacher",
        module="rlhf.cli.eval",
        option_classes=(LAUNCH, "rlhf.cli.eval:EvalArguments", "rlhf.cli.eval:EvaluatedArguments"),
        group="Results",
    ),
    "compare": Command(
        "compare two models: win rate, perplexity, accuracy",
        module="rlhf.cli.compare",
        option_classes=("rlhf.cli.compare:CompareArguments",),
        group="Results",
    ),
    # Their models are words without an option's name, so they have parsers of their own.
    "chat": Command(
        "talk to a model, or to two side by side",
        module="rlhf.cli.chat",
        group="Results",
    ),
    "merge": Command(
        "merge an adapter into its base model",
        module="rlhf.cli.merge",
        group="Results",
    ),
    "export": Command(
        "prepare a model for llama.cpp, Ollama or vLLM",
        module="rlhf.cli.export",
        group="Results",
    ),
    "data": Command(
        "show how a data file is read: columns, lengths, tokens",
        module="rlhf.cli.data",
        option_classes=("rlhf.cli.data:AuditArguments",),
        group="Prepare",
    ),
    # They read no model and no rows.
    "recipes": Command(
        "the recipes that come with the package, with their memory",
        module="rlhf.cli.recipes",
        group="Prepare",
    ),
    "init": Command(
        "write a recipe into a file of your own",
        module="rlhf.cli.init",
        group="Prepare",
    ),
    "report": Command(
        "a page about runs: curves, diagnosis, differences",
        module="rlhf.cli.report",
        group="Results",
    ),
    "env": Command(
        "versions and machine, for a bug report",
        module="rlhf.cli.env",
    ),
    # Its sub-commands need a parser of their own.
    "losses": Command(
        "which loss for which problem; one loss in full",
        module="rlhf.cli.losses",
    ),
}
