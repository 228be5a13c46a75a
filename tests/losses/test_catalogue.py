"""The catalogue is complete, documented, and in the docs; advice names losses that exist."""

from pathlib import Path

import pytest

from rlhf import losses
from rlhf.cli.losses import markdown
from rlhf.cli.main import main
from rlhf.losses.catalogue import EXTENSION_POINTS, advise, entries, find

ROOT = Path(__file__).parents[2]


def test_every_public_function_and_every_preference_loss_is_in_it():
    names = {entry.name for entry in entries()}
    elsewhere = {
        "ADVANTAGE_ESTIMATORS",
        "DIVERGENCES",
        "PREFERENCE_LOSSES",
        "POLICY_LOSSES",
        "arguments_of",
        *EXTENSION_POINTS,
        "as_compute_loss",
        "checks",
        "explain",
    }
    modules = {
        name for name in losses.__all__ if getattr(getattr(losses, name), "__module__", "") == "rlhf.losses.modules"
    }
    assert {"FocalLoss", "InfoNCELoss", "CombinedLoss", "DPOLoss"} <= modules
    assert names == (set(losses.__all__) - elsewhere - modules) | set(losses.PREFERENCE_LOSSES)


@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.name)
def test_every_docstring_says_what_it_must(entry):
    assert entry.summary.endswith(".") or entry.summary.endswith(").")
    assert ">>>" in entry.documentation, "no worked number"
    if entry.name.endswith("_loss") or entry.family == "Preferences":
        assert entry.source, "no source"


def test_the_docs_hold_the_table():
    assert (ROOT / "docs/losses.md").read_text().endswith(markdown()), "run: rlhf losses --markdown"


def test_names_of_every_kind_are_found():
    assert find("focal_loss").function is losses.focal_loss
    assert find("simpo").function is losses.PREFERENCE_LOSSES["simpo"]
    assert find("gspo").function is losses.POLICY_LOSSES["gspo"]
    with pytest.raises(ValueError, match="no loss 'simop'; did you mean simpo"):
        find("simop")


TASKS = [
    "regression",
    "binary",
    "multiclass",
    "language-model",
    "embeddings",
    "distillation",
    "preferences",
    "reward",
    "rl",
]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("more", [{}, dict(imbalance=0.05), dict(outliers=True), dict(noise=0.1), dict(pairs=False)])
def test_advice_names_losses_that_exist(task, more):
    assert all(find(advice.loss) for advice in advise(task, **more))


def test_advice_follows_the_problem():
    assert advise("regression")[0].loss == "mse_loss" and advise("regression", outliers=True)[0].loss == "huber_loss"
    assert advise("binary", imbalance=0.05)[0].start == "gamma=2, alpha=0.95"
    assert advise("preferences", noise=0.2)[0].loss == "robust"


def test_the_command(capsys):
    assert main(["losses"]) == 0 and "focal_loss" in capsys.readouterr().out
    assert main(["losses", "show", "simpo"]) == 0 and "arXiv 2405.14734" in capsys.readouterr().out
    assert main(["losses", "advise", "--task", "binary"]) == 0 and "bce_with_logits_loss" in capsys.readouterr().out
    assert main(["losses", "advise", "--task", "sums"]) == 2
    assert "rlhf losses: task must be one of regression" in capsys.readouterr().err
    assert main(["losses", "show", "simop"]) == 2
