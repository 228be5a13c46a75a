"""Whatever is registered works in its trainer: each name trains a step, and so does an entry that a test adds."""

import math

import pytest
import torch
from conftest import close, tiny_model

from rlhf.losses import PREFERENCE_LOSSES, preference_loss
from rlhf.trainers import DPOConfig, DPOTrainer

FILE = """
from rlhf.losses import preference_loss

@preference_loss("from_a_file")
def from_a_file(pair, beta=0.1, *, power=2):
    return (beta * pair.margin() - 1) ** power
"""


@pytest.fixture(autouse=True)
def restored():
    """Entries that a test adds are gone after it."""
    registries = (PREFERENCE_LOSSES,)
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def dpo(tmp_path, tokenizer, preference_rows):
    rows = preference_rows.select(range(4))

    def train(loss_type, margins=None, **changes):
        args = DPOConfig(
            str(tmp_path / "run"), loss_type=loss_type, use_cpu=True, report_to="none", disable_tqdm=True,
            save_strategy="no", logging_steps=1, learning_rate=1e-3, per_device_train_batch_size=4,
            **{"max_steps": 1, "precompute_ref_log_probs": False} | changes,
        )  # fmt: skip
        data = rows if margins is None else rows.add_column("margin", margins)
        trainer = DPOTrainer(tiny_model(), args=args, train_dataset=data, processing_class=tokenizer)
        before = [weight.detach().clone() for weight in trainer.model.parameters()]
        trainer.train()
        moved = any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
        return trainer.state.log_history[0]["loss"], moved

    return train


MARGINS = [0.5, 1.0, 2.0, 0.0]


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - {"tdpo"}))
def test_every_preference_loss_trains(dpo, name):
    loss, moved = dpo(name, MARGINS if "margin" in PREFERENCE_LOSSES[name].columns else None)
    assert math.isfinite(loss) and moved


def test_the_margin_of_the_rows_reaches_the_loss(dpo):
    loss, _ = dpo("odpo", MARGINS)
    close(loss, sum(math.log1p(math.exp(margin)) for margin in MARGINS) / 4)  # at the start policy = reference
    with pytest.raises(ValueError, match="loss_type odpo reads the column margin, which the rows do not have"):
        dpo("odpo")
    close(dpo("odpo", loss_kwargs={"margin": 1.0})[0], math.log1p(math.exp(1.0)))


def test_a_preference_loss_of_ones_own_trains(dpo, tmp_path):
    @preference_loss("lifted", needs=("margin",))
    def lifted_loss(pair, beta=0.1, *, power=2):
        return (beta * pair.margin() - pair["margin"]) ** power

    def plain(pair, beta=0.1, *, power=2):
        return (beta * pair.margin() - 1) ** power

    (tmp_path / "mine.py").write_text(FILE)
    close(dpo("lifted", MARGINS)[0], (0.25 + 1 + 4) / 4)
    for loss_type in (plain, f"{tmp_path}/mine.py:from_a_file", [plain]):
        loss, moved = dpo(loss_type, loss_kwargs={"power": 4})
        assert loss == 1.0 and moved


def test_wrong_losses_and_options_are_named(tmp_path):
    for options, message in (
        (dict(loss_type="sigmod"), "loss_type 'sigmod' is unknown: .*did you mean sigmoid"),
        (dict(loss_type=3), "loss_type must be a name or a callable, got 3"),
        (dict(loss_kwargs={"taun": 1}, loss_type="discopop"), "takes no taun; it takes discopop_tau"),
        (dict(loss_type="simpo", label_smoothing=0.1), "loss_type simpo takes no label_smoothing"),
    ):
        with pytest.raises(ValueError, match=message):
            DPOConfig(str(tmp_path), use_cpu=True, **options)
    DPOConfig(str(tmp_path), use_cpu=True, loss_type="exo_pair")  # with the smoothing of its own
