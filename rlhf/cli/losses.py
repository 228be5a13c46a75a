"""``rlhf losses``: the catalogue, one loss in full, or advice."""

import re

from rich.console import Console
from rich.table import Table

from rlhf.cli.options import RaisingParser
from rlhf.losses.catalogue import advise, entries, find


def run(argv: list[str]) -> None:
    parser = RaisingParser("rlhf losses", description="The catalogue of losses; alone, a list.")
    parser.add_argument("--markdown", action="store_true", help="the list as the table of docs/losses.md")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", parser_class=RaisingParser)
    show = actions.add_parser("show", help="one loss: formula, paper, signature and a worked number")
    show.add_argument("name")
    guide = actions.add_parser("advise", help="from a problem to losses and where to start")
    guide.add_argument("--task", required=True, help="regression, binary, multiclass, language-model, preferences, …")
    guide.add_argument("--imbalance", type=float, help="share of the rarer class")
    guide.add_argument("--outliers", action="store_true", help="some targets are far off")
    guide.add_argument("--noise", type=float, default=0.0, help="share of labels thought wrong")
    guide.add_argument("--unpaired", action="store_true", help="preferences without partners")
    args = parser.parse_args(argv)
    if args.action == "show":
        entry = find(args.name)
        print(f"{entry.family}\n\n{entry.signature}\n\n{entry.documentation}")
    elif args.action == "advise":
        table = Table("loss", "start with", "why")
        found = advise(
            args.task, imbalance=args.imbalance, outliers=args.outliers, noise=args.noise, pairs=not args.unpaired
        )
        for advice in found:
            table.add_row(advice.loss, advice.start, advice.why)
        Console().print(table)
    elif args.markdown:
        print(markdown(), end="")
    else:
        table = Table("family", "loss", "what it does")
        for entry in entries():
            table.add_row(entry.family, entry.name, entry.summary)
        Console().print(table, markup=False)


_ORACLES = {
    "Regression": "NumPy, SciPy; scikit-learn's metrics and estimators",
    "Classification": "NumPy, SciPy; scikit-learn; torch's own",
    "Language models": "plain Python; scikit-learn's log_loss; torch's own; TRL's log-probs",
    "Representation": "plain loops; torch's own",
    "Divergences": "SciPy in a loop; torch's kl_div; limits",
    "Inside a model": "plain loops; SciPy; torch's own",
    "Reward models and rankings": "plain Python; identities",
    "Preferences": "plain Python; TRL's own where it is right",
    "Policy gradients": "plain loops; enumeration; the gradient at ratio 1",
    "Advantages and control": "plain loops; scikit-learn's class weights; limits",
}
_SAME = "the same"
_TRL = {
    **dict.fromkeys(["hinge", "ipo", "sigmoid_norm", "robust", "exo_pair", "discopop", "nca_pair", "bco_pair"], _SAME),
    **dict.fromkeys(["sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired", "dft_loss", "reward_loss"], _SAME),
    "sigmoid": "the same, but for label smoothing, which it ignores",
    "f_dpo": "as `f_divergence_type`; its alpha is 1 - alpha",
    "sft": "over the micro-batch's tokens instead of pairs",
    "simpo": "experimental (CPO)",
    "cpo": "experimental; likelihood per token",
    "orpo": "experimental; likelihood over the prompt too",
    "rpo": "as the mixture `sigmoid` + `sft`",
    "kto_loss": "`KTOTrainer`",
    "causal_lm_loss": "without z-loss; smoothing costs a forward",
    "generalized_jsd": "`DistillationTrainer`, GKD",
    "grpo_loss": _SAME, "dr_grpo_loss": _SAME, "dapo_loss": _SAME, "bnpo_loss": _SAME, "luspo_loss": _SAME,
    "cispo_loss": "`epsilon_high` is our `max_ratio`",
    "sapo_loss": _SAME,
    "vespo_loss": _SAME,
    "gspo_loss": "as `importance_sampling_level`",
    "gmpo_loss": "experimental",
    "rloo_loss": "`RLOOTrainer`, with a clip",
}  # fmt: skip


def markdown() -> str:
    """The table of docs/losses.md."""
    lines = ["| loss | what it does | formula | source | tested against | TRL 1.16 |", "|---|---|---|---|---|---|"]
    family = ""
    for entry in entries():
        if entry.family != family:
            family = entry.family
            lines.append(f"| **{family}** | | | | | |")
        formula = f"${_in_a_cell(entry.formula)}$" if entry.formula else ""
        peer = _TRL.get(entry.name, "–")
        cells = (f"`{entry.name}`", entry.summary, formula, entry.source, _ORACLES[family], peer)
        lines.append("| " + " | ".join(cell.replace(" | ", " / ") for cell in cells) + " |")
    return re.sub(r"(?::func:|:data:)?`+([^`]+)`+", r"`\1`", "\n".join(lines) + "\n")


def _in_a_cell(formula: str) -> str:
    r"""TeX without ``|``, which ends a cell of a table: ``\|`` too would be cut in two."""
    for bar, name in ((r"\|", r"\Vert"), ("|", r"\vert")):
        formula = formula.replace(bar, name + " ")
    return re.sub(r"(?<=ert) (?![a-zA-Z])", "", formula)
