"""The catalogue of losses as the table of docs/losses.md."""

import re

from rlhf.losses.catalogue import entries

# What the tests of each family compare with.
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
# How TRL 1.16 computes a loss under the same name; a loss that is not here is not in TRL.
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
        # A family begins with a row of its own.
        if entry.family != family:
            family = entry.family
            lines.append(f"| **{family}** | | | | | |")
        formula = f"${_in_a_cell(entry.formula)}$" if entry.formula else ""
        in_trl = _TRL.get(entry.name, "–")
        cells = (f"`{entry.name}`", entry.summary, formula, entry.source, _ORACLES[family], in_trl)
        # A bar would end the cell.
        lines.append("| " + " | ".join(cell.replace(" | ", " / ") for cell in cells) + " |")
    # Sphinx's roles and double backquotes mean nothing in Markdown.
    return re.sub(r"(?::func:|:data:)?`+([^`]+)`+", r"`\1`", "\n".join(lines) + "\n")


def _in_a_cell(formula: str) -> str:
    r"""TeX without ``|``, which ends a cell of a table: ``\|`` too would be cut in two."""
    for bar, name in ((r"\|", r"\Vert"), ("|", r"\vert")):
        formula = formula.replace(bar, name + " ")
    # The space after \vert is needed only before a letter.
    return re.sub(r"(?<=ert) (?![a-zA-Z])", "", formula)
