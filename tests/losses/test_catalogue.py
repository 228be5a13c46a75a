"""The catalogue is complete, documented, and in the docs; advice names losses that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import losses
from rlhf.cli.docstring_text import fold, without_markup
from rlhf.cli.losses import PROBLEMS
from rlhf.cli.losses_table import markdown
from rlhf.cli.main import main
from rlhf.losses import catalogue
from rlhf.losses.catalogue import EXTENSION_POINTS, Advice, advise, entries, find

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


def test_the_page_of_problems_names_what_is_advised():
    page = (ROOT / "docs/which-loss.md").read_text()
    sections = page.split("\n## ")[1:]
    for task in TASKS:
        for more in VARIANTS:
            # All losses of a task stand in one section.
            advised = {f"`{advice.loss}`" for advice in advise(task, **more)}
            assert any(advised <= set(re.findall(r"`[^`]+`", section)) for section in sections), (task, advised)
    named = set(re.findall(r"^\| `([a-z0-9_]+)` \|", page, re.MULTILINE))
    assert named and all(find(name) for name in named)


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


VARIANTS = [{}, dict(imbalance=0.05), dict(outliers=True), dict(noise=0.1), dict(pairs=False)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("more", VARIANTS)
def test_advice_names_losses_that_exist(task, more):
    assert all(find(advice.loss) for advice in advise(task, **more))


def test_advice_follows_the_problem():
    assert advise("regression")[0].loss == "mse_loss" and advise("regression", outliers=True)[0].loss == "huber_loss"
    first, second = advise("binary", imbalance=0.05)
    assert first.loss == "bce_with_logits_loss" and "pos_weight=19" in first.start and "log(19)" in first.why
    assert second.loss == "focal_loss" and "alpha=None" in second.start and "0.25" in second.why
    first, _, last = advise("multiclass", imbalance=0.05)
    assert first == Advice("cross_entropy_loss", first.start, first.why) and "effective" not in first.start
    assert last.loss == "multiclass_focal_loss"
    assert advise("preferences", noise=0.2)[0].loss == "robust"


def shown(capsys, *words):
    """What a command prints in a terminal of 80 columns."""
    assert main(["losses", *words]) == 0
    return capsys.readouterr().out


def test_alone_it_lists_losses_by_problem(capsys):
    said = shown(capsys)
    assert all(task in said and advice.loss in said for task in TASKS for advice in advise(task))
    assert "rlhf losses NAME" in said and len(said.splitlines()) < 24


def test_a_name_alone_shows_the_loss(capsys):
    said = shown(capsys, "focal_loss")
    assert said == shown(capsys, "show", "focal_loss") == shown(capsys, "FocalLoss") == shown(capsys, "focal")
    assert "alpha=0.25" in said and "arXiv 1708.02002" in said and "tensor(0.0433)" in said
    assert "arXiv 2405.14734" in shown(capsys, "simpo")


def test_the_options_of_advice_are_checked(capsys):
    assert "bce_with_logits_loss" in shown(capsys, "advise", "--task", "binary")
    assert main(["losses", "advise", "--task", "sums"]) == 2
    assert "rlhf losses: task must be one of regression" in capsys.readouterr().err


NEAR = {
    "simop": "no loss 'simop'; did you mean simpo",
    "entropy": "no loss 'entropy'; did you mean cross_entropy_loss, categorical_cross_entropy?",
    "advice": "no loss 'advice'; did you mean `rlhf losses advise`?",
    "xxxxxx": "no loss 'xxxxxx'; `rlhf losses list` names them all",
}


@pytest.mark.parametrize("name", NEAR)
def test_near_names_are_suggested(name, capsys):
    assert main(["losses", name]) == 2
    assert NEAR[name] in capsys.readouterr().err


@pytest.mark.parametrize("width", ["40", "80"])
def test_nothing_is_cut_off_in_a_narrow_terminal(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    listed = shown(capsys, "list")
    for entry in entries():
        assert entry.name in listed
        if width == "80":
            assert set(without_markup(entry.summary).split()) <= set(listed.split())
    assert "…" not in listed
    advised = shown(capsys, "advise", "--task", "multiclass", "--imbalance", "0.05")
    assert 'class_weights(counts, "effective")' in " ".join(advised.split())
    lines = [line for part in (listed, advised, shown(capsys)) for line in part.splitlines()]
    # The three commands at the end are to be copied, so that they keep their lines.
    assert all(len(line.rstrip()) <= int(width) for line in lines if not line.startswith("rlhf losses "))


def test_a_docstring_is_folded_without_losing_a_word():
    for entry in entries():
        text = without_markup(entry.documentation)
        folded = fold(text, 80)
        assert folded.split() == text.split()
        prose = [line for line in folded.splitlines() if ">>>" not in line and "..." not in line]
        too_long = [line for line in prose if len(line) > 80 and " " in line.strip()]
        assert not too_long or "tensor" in too_long[0], (entry.name, too_long)


def test_the_problems_of_the_command_are_those_of_the_catalogue():
    # They are written twice, so that help is there without torch.
    assert list(PROBLEMS) == list(catalogue.TASKS)


def test_help_needs_no_torch():
    code = "import sys; from rlhf.cli.losses import run\ntry: run(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n") and max(map(len, done.stdout.splitlines())) <= 80
