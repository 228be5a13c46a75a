"""Whatever is registered works in its trainer: each name trains a step, and so does an entry that a test adds."""

import math

import pytest
import torch
from conftest import close, sentences, tiny_model
from datasets import Dataset

from rlhf import DistillConfig, DistillTrainer, DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, OnlineDPOConfig
from rlhf.losses import (
    ADVANTAGE_ESTIMATORS,
    DIVERGENCES,
    POLICY_LOSSES,
    PREFERENCE_LOSSES,
    advantage_estimator,
    divergence,
    gae,
    policy_loss,
    preference_loss,
)

FILE = """
from rlhf.losses import preference_loss

@preference_loss("from_a_file")
def from_a_file(pair, beta=0.1, *, power=2):
    return (beta * pair.margin() - 1) ** power
"""


@pytest.fixture(autouse=True)
def restored():
    """Entries that a test adds are gone after it."""
    registries = (PREFERENCE_LOSSES, POLICY_LOSSES, ADVANTAGE_ESTIMATORS, DIVERGENCES)
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


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
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
        (dict(loss_type=lambda chosen, rejected: chosen), r"must be a function \(pair, beta, \.\.\.\)"),
        (dict(loss_kwargs={"taun": 1}, loss_type="discopop"), "takes no taun; it takes discopop_tau"),
        (dict(loss_type="simpo", label_smoothing=0.1), "loss_type simpo takes no label_smoothing"),
    ):
        with pytest.raises(ValueError, match=message):
            DPOConfig(str(tmp_path), use_cpu=True, **options)
    DPOConfig(str(tmp_path), use_cpu=True, loss_type="exo_pair")  # with the smoothing of its own


# Policy losses and advantage estimators


def vowels(completions, **_):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


@pytest.fixture
def grpo(tmp_path, tokenizer):
    """Train on two prompts, and return the losses and the weights."""
    rows = Dataset.from_list([{"prompt": text} for text in sentences(1, 2)])

    def train(batch=8, accumulation=1, rewards=vowels, **changes):
        options = dict(
            num_generations=4, max_steps=1, logging_steps=1, optim="sgd", learning_rate=0.1, report_to="none",
            save_strategy="no", max_length=32, max_completion_length=6, use_cpu=True, disable_tqdm=True,
            shuffle_dataset=False,
        ) | changes  # fmt: skip
        args = GRPOConfig(
            str(tmp_path / "run"), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            **options,
        )  # fmt: skip
        trainer = GRPOTrainer(tiny_model(), rewards, args, train_dataset=rows, processing_class=tokenizer)
        before = [weight.detach().clone() for weight in trainer.model.parameters()]
        trainer.train()
        after = [weight.detach() for weight in trainer.model.parameters()]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert all(math.isfinite(loss) for loss in losses)
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        return losses, after

    return train


@pytest.fixture
def policy_losses():
    """The registered ones, and two that no file of ours knows."""

    @policy_loss("squared", mean="tokens")
    def squared(tokens, scale=1.0):
        return -tokens.ratio * tokens.advantages * scale + tokens.log_ratio**2

    @policy_loss("of_sequences", mean="tokens", coupled=True)
    def of_sequences(tokens):
        return -tokens.spread(tokens.sum(tokens.log_ratio).exp()) * tokens.advantages

    return POLICY_LOSSES


@pytest.mark.parametrize("name", [*POLICY_LOSSES, "squared", "of_sequences"])
def test_every_policy_loss_trains_and_two_micro_batches_are_one(grpo, policy_losses, name):
    loss = policy_losses[name]
    # Two passes over the rollout, so that ratios are not 1; a loss without ratios has one.
    passes = 2 if loss.token_ratios or loss.coupled else 1
    options = dict(loss_type=name, num_iterations=passes, max_steps=passes, beta=0.1)
    one, weights = grpo(**options)
    other, other_weights = grpo(batch=4, accumulation=2, **options)
    close(other, one)
    for weight, other_weight in zip(weights, other_weights, strict=True):
        close(other_weight, weight)


def test_a_policy_loss_that_reads_whole_sequences_has_to_be_registered_so(grpo):
    @policy_loss("forgetful", mean="tokens")
    def forgetful(tokens):
        return -tokens.spread(tokens.mean(tokens.log_ratio)) * tokens.advantages

    with pytest.raises(ValueError, match="register it with policy_loss"):
        grpo(loss_type="forgetful")


def test_policy_losses_from_elsewhere(grpo, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from rlhf.losses import policy_loss\n\n"
        "@policy_loss('plain', mean='tokens')\n"
        "def plain(tokens):\n"
        "    return -tokens.ratio * tokens.advantages\n"
    )
    by_file, _ = grpo(loss_type=f"{tmp_path}/mine.py:plain")
    by_object, _ = grpo(loss_type=POLICY_LOSSES["plain"])
    assert by_file == by_object == grpo(loss_type="plain")[0]


@pytest.mark.parametrize("name", sorted(set(ADVANTAGE_ESTIMATORS) - {"pairs"}))
def test_every_estimator_trains(grpo, name):
    more = {"loss_type": "reinforce"} if name == "best_of_n" else {}
    grpo(advantage_estimator=name, **more)


def test_an_estimator_of_ones_own(grpo, tmp_path):
    @advantage_estimator("lifted", needs_group=True)
    def lifted(rewards, group, scale="group"):
        assert scale == "batch"
        return rewards - rewards.mean()

    def with_critic(token_rewards, values, mask):
        return gae(token_rewards, values, 1.0, 1.0, mask=mask)

    def plain(rewards):
        return rewards - rewards.mean()

    (tmp_path / "mine.py").write_text("def plain(rewards):\n    return rewards - rewards.mean()\n")
    want, _ = grpo(advantage_estimator="lifted", scale_rewards="batch")
    for estimator in (plain, f"{tmp_path}/mine.py:plain"):
        assert grpo(advantage_estimator=estimator)[0] == want
    grpo(advantage_estimator=with_critic)
    with pytest.raises(ValueError, match="lifted compares completions of a prompt: num_generations must be 2 or more"):
        grpo(advantage_estimator="lifted", num_generations=1)
    with pytest.raises(ValueError, match="reads prizes, which is none of rewards, group"):
        grpo(advantage_estimator=lambda prizes: prizes)


def test_online_dpo_takes_what_is_registered(tmp_path):
    def plain(pair, beta=0.1):
        return pair.margin() ** 2

    args = dict(use_cpu=True, per_device_train_batch_size=2)
    assert "plain" in OnlineDPOConfig(str(tmp_path), loss_type=plain, **args).loss_type
    with pytest.raises(ValueError, match="loss_type odpo reads margin, which sampled pairs do not have"):
        OnlineDPOConfig(str(tmp_path), loss_type="odpo", **args)


# Divergences


@pytest.fixture
def distill(tmp_path, tokenizer, sft_rows):
    def train(name, **changes):
        args = DistillConfig(
            str(tmp_path / "run"), divergence=name, max_steps=1, logging_steps=1, learning_rate=1e-3, report_to="none",
            save_strategy="no", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4, **changes,
        )  # fmt: skip
        trainer = DistillTrainer(
            tiny_model(), tiny_model(seed=1), args, train_dataset=sft_rows.select(range(4)), processing_class=tokenizer
        )  # fmt: skip
        trainer.train()
        log = trainer.state.log_history[0]
        assert math.isfinite(log["loss"]) and log["grad_norm"] > 0
        return log["loss"], log["grad_norm"]

    return train


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_trains(distill, name):
    distill(name)


def test_a_divergence_of_ones_own(distill, tmp_path):
    @divergence("half_of_kl")
    def half_of_kl(log_q, log_p, alpha=0.5):
        return alpha * (log_p.exp() * (log_p - log_q)).sum(-1)

    def plain(log_q, log_p):
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    (tmp_path / "mine.py").write_text("def plain(log_q, log_p):\n    return (log_p.exp() * (log_p - log_q)).sum(-1)\n")
    want = distill("kl_divergence", temperature=2.0, scale_by_temperature=True)
    for name in (plain, f"{tmp_path}/mine.py:plain"):
        close(distill(name, temperature=2.0, scale_by_temperature=True), want)
    close(distill("half_of_kl", alpha=1.0, temperature=2.0, scale_by_temperature=True), want)
    with pytest.raises(ValueError, match="takes no reverse"):
        distill(plain, reverse=True)
