"""Functions of the user's own: a wrong one is named in one line before anything is loaded."""

import pickle

import pytest

from rlhf import DistillConfig, DPOConfig, GRPOConfig, OnlineDPOConfig, SFTConfig
from rlhf.losses import policy_loss

BATCH = dict(per_device_train_batch_size=4, num_generations=4, use_cpu=True)


def broken_pair_losses():
    return {
        "the mean": (lambda pair, beta=0.1: pair.margin().mean(), r"returns the shape \[\]; expected \[3\]"),
        "no tensor": (lambda pair, beta=0.1: pair.margin().mean().item(), "returns a float; expected a tensor"),
        "no gradient": (lambda pair, beta=0.1: pair.margin().detach(), "has no gradient: compute it from the tensors"),
        "NaN": (lambda pair, beta=0.1: pair.chosen.log(), "returns nan, nan, nan for made-up numbers"),
        "NaN in the gradient": (lambda pair, beta=0.1: (pair.chosen * 0).sqrt(), "a gradient of NaN or infinity"),
        "a mistake": (
            lambda pair, beta=0.1: pair.margn(),
            r"fails at .*test_own_functions.py:\d+ \(AttributeError: 'Pair' object has no attribute 'margn'",
        ),
        "one argument too many": (lambda pair, beta, gamma: pair.margin(), "missing 1 required .* 'gamma'"),
        "a column that is not declared": (
            lambda pair, beta=0.1: pair["chosen_lengths"] * pair.margin(),
            "this loss reads chosen_lengths, which was not given: name it where the loss is registered",
        ),
    }


@pytest.mark.parametrize("case", broken_pair_losses())
def test_a_preference_loss(tmp_path, case):
    loss, message = broken_pair_losses()[case]
    for config in (DPOConfig, OnlineDPOConfig):
        with pytest.raises(ValueError, match=f"^loss_type .*{message}") as raised:
            config(str(tmp_path), use_cpu=True, loss_type=loss, per_device_train_batch_size=2)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (lambda tokens: (tokens.ratio * tokens.advantages).mean(), r"returns the shape \[\]; expected \[5\]"),
        (lambda tokens: tokens.advantages, "has no gradient"),
        (lambda tokens: tokens.ratios, "AttributeError"),
        (lambda tokens, width: tokens.ratio, "missing 1 required positional argument: 'width'"),
        (lambda tokens: tokens.spread(tokens.mean(tokens.log_ratio)), r"register it with policy_loss\("),
    ],
)
def test_a_policy_loss(tmp_path, term, message):
    loss = policy_loss("broken", mean="tokens")(term)
    with pytest.raises(ValueError, match=f"^loss_type broken.*{message}"):
        GRPOConfig(str(tmp_path), loss_type=loss, **BATCH)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (lambda rewards: rewards.tolist(), "returns a list; expected a tensor: an advantage for each completion"),
        (lambda rewards: rewards.mean(), r"returns the shape \[\]; expected \[8\] or \[8, 3\]"),
        (lambda rewards, group: rewards[group == 0], r"returns the shape \[4\]"),
        (lambda rewards: rewards / (rewards - rewards), "returns -inf, inf, inf"),
        (lambda rewards: rewards.view(-1, 3), r"RuntimeError: shape '\[-1, 3\]' is invalid"),
        (lambda token_rewards, values: (token_rewards, values.sum(1)), r"second result, returns the shape \[8\]"),
    ],
)
def test_an_advantage_estimator(tmp_path, estimator, message):
    with pytest.raises(ValueError, match=f"^advantage_estimator .*{message}"):
        GRPOConfig(str(tmp_path), advantage_estimator=estimator, **BATCH)
    # What reads the completions of a prompt in rows of num_generations fits.
    GRPOConfig(str(tmp_path), advantage_estimator=lambda rewards: (rewards.view(-1, 4) * 0).flatten(), **BATCH)


@pytest.mark.parametrize(
    ("divergence", "message"),
    [
        (lambda log_q, log_p: (log_q - log_p).abs(), r"returns the shape \[2, 5\]; expected \[2\]"),
        (lambda log_q, log_p: log_p.exp().sum(-1), "has no gradient"),
        (lambda log_q, log_p, alpha: alpha * log_q.sum(-1), "missing 1 required .* 'alpha'"),
    ],
)
def test_a_divergence(tmp_path, divergence, message):
    with pytest.raises(ValueError, match=f"^divergence .*{message}"):
        DistillConfig(str(tmp_path), divergence=divergence, use_cpu=True)
    DistillConfig(str(tmp_path), divergence=lambda log_q, log_p, alpha: alpha * log_q.sum(-1), alpha=0.5, use_cpu=True)


def test_a_loss_of_tokens(tmp_path):
    for loss, message in (
        (lambda logps: -logps.mean(), r"returns the shape \[\]; expected \[4\]"),
        (lambda logps, beta: -logps, "missing 1 required positional argument: 'beta'"),
        ("dfft", "loss_type 'dfft' is unknown: one of nll, chunked_nll, dft, or file.py:name; did you mean dft"),
    ):
        with pytest.raises(ValueError, match=message):
            SFTConfig(str(tmp_path), loss_type=loss, use_cpu=True)
    file = tmp_path / "mine.py"
    file.write_text("def focal(logps):\n    return -logps * (1 - logps.detach().exp())\n")
    args = SFTConfig(str(tmp_path), loss_type=f"{file}:focal", use_cpu=True)
    assert args.to_dict()["loss_type"] == f"{file}:focal"


def test_a_configuration_with_a_function_can_be_saved(tmp_path):
    loss = lambda pair, beta=0.1: pair.margin()  # noqa: E731
    args = DPOConfig(str(tmp_path), use_cpu=True, loss_type=[loss, "sigmoid"])
    name = f"{__name__}:test_a_configuration_with_a_function_can_be_saved.<locals>.<lambda>"
    assert pickle.loads(pickle.dumps(args)).loss_type == [name, "sigmoid"] == args.given_options["loss_type"]


def test_functions_of_the_package_are_not_tried(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("rlhf.losses.trials.tried", lambda what, call: calls.append(what))
    DPOConfig(str(tmp_path), use_cpu=True)
    GRPOConfig(str(tmp_path), **BATCH)
    DistillConfig(str(tmp_path), use_cpu=True)
    SFTConfig(str(tmp_path), use_cpu=True, loss_type="dft")
    assert calls == []
