"""The catalogue as data, read off the functions themselves: what `rlhf losses` and the docs show."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from rlhf import losses

# By file: a public loss is in the catalogue as soon as it stands in one of these files.
# The order is that of the table in the docs.
FAMILIES = {
    "_regression": "Regression",
    "_classification": "Classification",
    "_language": "Language models",
    "_representation": "Representation",
    "_divergences": "Divergences",
    "_matching": "Inside a model",
    "_top_k": "Divergences",
    "_rewards": "Reward models and rankings",
    "_dpo": "Preferences",
    "_anchored": "Preferences",
    "_preference": "Preferences",
    "_policy": "Policy gradients",
    "_policy_sequences": "Policy gradients",
    "_advantages": "Advantages and control",
}
# Public names beside the losses: what a loss of one's own is made with.
EXTENSION_POINTS = (
    "AdvantageEstimator",
    "advantage_estimator",
    "divergence",
    "Pair",
    "PreferenceLoss",
    "preference_loss",
    "PolicyLoss",
    "Tokens",
    "policy_loss",
)


@dataclass(frozen=True)
class Entry:
    """One loss: where it belongs, what it is called, and what its docstring says."""

    family: str
    name: str  # as exported, or its key in PREFERENCE_LOSSES
    function: Callable[..., object]

    @property
    def documentation(self) -> str:
        return inspect.getdoc(self.function) or ""

    @property
    def summary(self) -> str:
        return self.documentation.split("\n\n")[0].replace("\n", " ")

    @property
    def formula(self) -> str:
        """TeX; empty where the docstring has none."""
        math_block = re.search(r"\.\. math::(.*?)\n\n", self.documentation + "\n\n", re.DOTALL)
        return " ".join(math_block.group(1).split()) if math_block else ""

    @property
    def source(self) -> str:
        source_line = re.search(r"^Source: (.*?)(?:\n\n|\Z)", self.documentation, re.DOTALL | re.MULTILINE)
        return " ".join(source_line.group(1).split()) if source_line else ""

    @property
    def signature(self) -> str:
        """The call with its defaults; the docstring has the types."""
        signature = inspect.signature(self.function)
        bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
        call = signature.replace(parameters=bare, return_annotation=signature.empty)
        return f"{self.function.__name__}{call}"


def entries() -> list[Entry]:
    """Every public function of the catalogue, by family; the members of PREFERENCE_LOSSES under their names there."""
    catalogue = []
    for name in losses.__all__:
        function = getattr(losses, name)
        # Decorators keep the module of what they wrap, so this is the file that defines the loss.
        defining_file = getattr(function, "__module__", "").rpartition(".")[2]
        if callable(function) and defining_file in FAMILIES and name not in EXTENSION_POINTS:
            catalogue.append(Entry(FAMILIES[defining_file], name, function))
    # Only few of them are exported, so they are listed by the names that options take.
    catalogue += [Entry("Preferences", name, loss) for name, loss in losses.PREFERENCE_LOSSES.items()]
    family_order = list(dict.fromkeys(FAMILIES.values()))
    # The sort is stable: within a family the order of registration or export stays.
    return sorted(catalogue, key=lambda entry: family_order.index(entry.family))


def find(name: str) -> Entry:
    """The loss of a name.

    Args:
        name: an exported name, or a key of PREFERENCE_LOSSES or POLICY_LOSSES.
    Returns:
        Its entry.
    Raises:
        ValueError: no such loss; names the nearest.
    """
    known_entries = {entry.name: entry for entry in entries()}
    # They are listed as grpo_loss and so on, but people also ask for the name in --loss_type.
    known_entries |= {name: Entry("Policy gradients", name, loss) for name, loss in losses.POLICY_LOSSES.items()}
    # `focal` is short for `focal_loss`; FocalLoss and nn.MSELoss are modules.
    bare_name = name.rpartition(".")[2]
    module = getattr(losses, bare_name, None)
    of_module = getattr(getattr(module, "function", None), "__name__", "")
    for candidate in (name, bare_name, f"{bare_name}_loss", of_module):
        if candidate in known_entries:
            return known_entries[candidate]
    raise ValueError(f"no loss {name!r}; {_near(bare_name.lower(), list(known_entries))}")


def _near(name: str, known: list[str]) -> str:
    # One letter off is a mistyped name; a part of names is a question.
    close_matches = get_close_matches(name, known, n=1)
    parts = sorted((candidate for candidate in known if name in candidate), key=len)
    near = list(dict.fromkeys([*close_matches, *parts]))[:3]
    return f"did you mean {', '.join(near)}?" if near else "`rlhf losses list` names them all"


@dataclass(frozen=True)
class Advice:
    """A recommended loss, with where to start and why."""

    loss: str
    start: str
    why: str


@dataclass(frozen=True)
class Problem:
    """What is known of a problem, as :func:`advise` takes it."""

    imbalance: float | None
    outliers: bool
    noise: float
    pairs: bool

    @property
    def has_rare_class(self) -> bool:
        """Whether one class is so rare that a constant answer has a high accuracy."""
        return self.imbalance is not None and self.imbalance < 0.2


# Each takes the whole problem, even if it ignores it, so that TASKS can call them in the same way.
def _regression(problem: Problem) -> list[Advice]:
    squared_error = Advice("mse_loss", "", "estimates the mean; the best where errors are like normal ones")
    robust_losses = [
        Advice("huber_loss", "delta = the size of an ordinary residual", "an outlier's gradient is bounded"),
        Advice("mae_loss", "", "estimates the median; ignores how far an outlier is"),
    ]
    return [*robust_losses, squared_error] if problem.outliers else [squared_error, *robust_losses]


# The advice on rare classes is measured: benchmarks/imbalance.py, docs/imbalance.md.
def _binary(problem: Problem) -> list[Advice]:
    if problem.imbalance is None or not problem.has_rare_class:
        return [
            Advice("bce_with_logits_loss", "no sigmoid before it", "the outputs become probabilities"),
            Advice("hinge_loss", "targets of -1 and 1", "a margin, where no probabilities are needed"),
        ]
    # With this weight both classes have the same total weight.
    ratio = (1 - problem.imbalance) / problem.imbalance
    return [
        Advice(
            "bce_with_logits_loss",
            f"no weight, and a threshold chosen on validation data; or pos_weight={ratio:.3g} and a threshold of 0.5",
            "No weight had the best probabilities, and no other loss had a better average precision. "
            "pos_weight finds more positives at a threshold of 0.5, with more false alarms. "
            f"The logits minus log({ratio:.3g}) give probabilities again.",
        ),
        Advice(
            "focal_loss",
            f"gamma=2, alpha=None; or alpha={1 - problem.imbalance:.2g}, which acts like pos_weight",
            "The default alpha=0.25 gives a positive a third of the weight of a negative, so that fewer positives are "
            "found at a threshold of 0.5. The outputs are no probabilities.",
        ),
    ]


def _multiclass(problem: Problem) -> list[Advice]:
    # At least 0.1, the usual amount; more than 0.2 rarely helps, however many labels are wrong.
    smoothing = max(min(problem.noise, 0.2), 0.1 if problem.noise else 0.0)
    if not problem.has_rare_class:
        return [
            Advice("cross_entropy_loss", f"label_smoothing={smoothing:.2g}", "more smoothing with wrong labels"),
            Advice("poly1_loss", "epsilon=1", "more weight on confident predictions; try -1 to 5"),
        ]
    return [
        Advice("cross_entropy_loss", "no weights", "the best accuracy and log loss; look at the recall of each class"),
        Advice(
            "cross_entropy_loss",
            'class_weights=class_weights(counts), or the milder class_weights(counts, "effective")',
            "finds more of the rare classes; the logits minus the logarithm of the weights give probabilities again",
        ),
        Advice("multiclass_focal_loss", "gamma=2", "less weight on easy rows; the outputs are no probabilities"),
    ]


def _language_model(problem: Problem) -> list[Advice]:
    return [
        Advice("causal_lm_loss", "num_items = scored tokens of the step", "exact under accumulation"),
        Advice("dft_loss", "", "few, clean demonstrations: unlikely tokens have less influence"),
    ]


def _embeddings(problem: Problem) -> list[Advice]:
    return [
        Advice("info_nce_loss", "temperature=0.07, gather=True", "pairs; the larger the batch the better"),
        Advice("siglip_loss", "scale=10, bias=-10, both learned", "pairs; small batches suffice"),
        Advice("supervised_contrastive_loss", "temperature=0.1", "labels instead of pairs"),
    ]


def _distillation(problem: Problem) -> list[Advice]:
    return [
        Advice("kl_divergence", "temperature 1 to 4, scale_by_temperature=True", "covers the teacher"),
        Advice("generalized_jsd", "beta 0.1 to 0.9", "on the student's own samples"),
        Advice("distillation_loss", "alpha=0.5, temperature=2", "mixed with hard labels"),
        Advice("top_k_kl", "k 32 or more", "a teacher kept on disk (rlhf teacher)"),
    ]


def _preferences(problem: Problem) -> list[Advice]:
    if not problem.pairs:
        return [Advice("kto_loss", "beta=0.1", "answers that are good or bad by themselves")]
    if problem.noise:
        return [
            Advice("robust", f"beta=0.1, label_smoothing={problem.noise:.2g}", "unbiased when pairs are flipped"),
            Advice("ipo", "beta=0.1", "bounded on sure pairs"),
        ]
    return [
        Advice("sigmoid", "beta=0.1 (0.01 to 0.5), learning rate 5e-7 to 5e-6", "DPO, the default"),
        Advice("simpo", "beta=2, simpo_gamma=0.5 to 1", "no reference in memory"),
        Advice("ipo", "beta=0.1", "few or sure pairs, where DPO overfits"),
    ]


def _reward(problem: Problem) -> list[Advice]:
    return [Advice("reward_loss", "center_rewards_coefficient=0.01", "Bradley–Terry, centred")]


def _reinforcement_learning(problem: Problem) -> list[Advice]:
    return [
        Advice("dapo", "epsilon=0.2, epsilon_high=0.28", "verifiable rewards, groups of answers"),
        Advice("ppo_loss", "clip_ratio=0.2, with value_loss and gae", "a critic, dense rewards"),
        Advice("gspo", "epsilon=3e-4, epsilon_high=4e-4", "mixtures of experts; long answers"),
    ]


TASKS: dict[str, Callable[[Problem], list[Advice]]] = {
    "regression": _regression,
    "binary": _binary,
    "multiclass": _multiclass,
    "language-model": _language_model,
    "embeddings": _embeddings,
    "distillation": _distillation,
    "preferences": _preferences,
    "reward": _reward,
    "rl": _reinforcement_learning,
}


def advise(
    task: str, *, imbalance: float | None = None, outliers: bool = False, noise: float = 0.0, pairs: bool = True
) -> list[Advice]:
    """From a problem to losses worth trying, the first one first.

    Args:
        task: a key of :data:`TASKS`.
        imbalance: share of the rarer class, in (0, 0.5]; None where it does not matter.
        outliers: some targets are far off.
        noise: share of labels thought wrong, in [0, 0.5).
        pairs: preferences come as pairs, not as single answers marked good or bad.
    Returns:
        One or several losses, each with where to start and why.
    Raises:
        ValueError: an unknown task, or a share out of range.
    """
    if imbalance is not None and not 0 < imbalance <= 0.5:
        raise ValueError(f"imbalance is the share of the rarer class, in (0, 0.5]; got {imbalance}")
    # With half of the labels wrong nothing can be learned from them.
    if not 0 <= noise < 0.5:
        raise ValueError(f"noise is the share of wrong labels, in [0, 0.5); got {noise}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    return TASKS[task](Problem(imbalance, outliers, noise, pairs))
