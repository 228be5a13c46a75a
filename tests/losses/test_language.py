"""Dense language-model losses against scikit-learn, torch's own module, TRL and plain Python."""

import math

import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from rlhf.losses import (
    bits_per_byte,
    causal_lm_loss,
    dft_loss,
    perplexity,
    sequence_logps,
    shift,
    token_logps,
    unlikelihood_loss,
)  # fmt: skip


def example(seed=0, batch=3, length=7, vocabulary=11, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, vocabulary, generator=g, dtype=dtype) * 3
    labels = torch.randint(vocabulary, (batch, length), generator=g)
    labels[torch.rand(batch, length, generator=g) < 0.3] = -100
    return logits, labels


def plain_nll(logits, labels):
    """(negative log-likelihoods of the scored tokens, one at a time, in Python floats)"""
    found = []
    for row, row_labels in zip(logits.tolist(), labels.tolist(), strict=True):
        for before, label in zip(row[:-1], row_labels[1:], strict=True):
            if label != -100:
                top = max(before)
                found.append(top + math.log(sum(math.exp(z - top) for z in before)) - before[label])
    return found


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_loss_and_perplexity_are_the_formula(seed):
    logits, labels = example(seed)
    nll = plain_nll(logits, labels)
    mean = sum(nll) / len(nll) if nll else 0.0
    close(causal_lm_loss(logits, labels), mean, torch.float64)
    close(causal_lm_loss(logits, labels, reduction="sum"), sum(nll), torch.float64)
    close(token_logps(logits, labels).sum(), -sum(nll), torch.float64)
    close(perplexity(logits, labels), math.exp(mean), torch.float64)


def test_loss_is_scikit_learns_log_loss():
    logits, labels = example(1)
    shifted, targets = shift(logits, labels)
    scored = targets != -100
    want = log_loss(targets[scored].numpy(), shifted[scored].softmax(-1).numpy(), labels=list(range(11)))
    close(causal_lm_loss(logits, labels), want, torch.float64)


def test_token_logps_are_trls():
    selective = pytest.importorskip("trl.trainer.utils").selective_log_softmax
    logits, labels = example(2, dtype=torch.float32)
    labels = labels.clamp(min=0)
    close(token_logps(logits, labels), selective(logits[:, :-1], labels[:, 1:]))


def test_gradcheck():
    logits, labels = example(3, batch=2, length=4, vocabulary=5)
    weight = torch.rand(2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: causal_lm_loss(z, labels, weight=weight), logits.requires_grad_())


def test_a_mask_is_the_same_as_ignoring():
    logits, labels = example(4)
    mask = labels != -100
    masked = causal_lm_loss(logits, labels.clamp(min=0), mask=mask)
    close(masked, causal_lm_loss(logits, labels), torch.float64)


def test_sequence_logps_sum_and_average():
    logits, labels = example(5)
    per_token = token_logps(logits, labels)
    close(sequence_logps(logits, labels), per_token.sum(1), torch.float64)
    counts = (labels[:, 1:] != -100).sum(1).clamp(min=1)
    close(sequence_logps(logits, labels, average=True), per_token.sum(1) / counts, torch.float64)


def test_without_shift_labels_are_taken_as_they_are():
    logits, labels = example(6)
    close(causal_lm_loss(*shift(logits, labels), shift=False), causal_lm_loss(logits, labels), torch.float64)


def test_nothing_scored_is_a_differentiable_zero():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = causal_lm_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_half_precision_is_computed_in_float32():
    logits, labels = example(7, dtype=torch.float32)
    half = causal_lm_loss(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    close(half, causal_lm_loss(logits.bfloat16().float(), labels))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.zeros(2, 4), r"pass labels.long\(\)"),
        (torch.full((2, 4), 5), r"labels\[0, 0\] is 5, outside the vocabulary \[0, 5\)"),
        (torch.zeros(2, 3, dtype=torch.int64), "labels must have the shape"),
    ],
)
def test_bad_labels_are_named(labels, said):
    with pytest.raises(ValueError, match=said):
        causal_lm_loss(torch.zeros(2, 4, 5), labels)


def test_unknown_reduction_is_named():
    with pytest.raises(ValueError, match='reduction must be "mean", "sum" or "none", got \'avg\''):
        causal_lm_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64), reduction="avg")


def scored(logits, labels):
    """(logits, labels) of the scored positions alone."""
    shifted, targets = logits[:, :-1], labels[:, 1:]
    return shifted[targets != -100], targets[targets != -100]


def test_label_smoothing_and_z_loss():
    logits, labels = example(8)
    rows, targets = scored(logits, labels)
    smooth = torch.nn.functional.cross_entropy(rows, targets, label_smoothing=0.1)
    z = torch.logsumexp(rows, -1).square().mean()
    close(causal_lm_loss(logits, labels, label_smoothing=0.1, z_loss=0.01), smooth + 0.01 * z, torch.float64)


def test_num_items_makes_accumulated_micro_batches_one_batch():
    logits, labels = example(9, batch=4)
    whole = causal_lm_loss(logits, labels)
    count = int((labels[:, 1:] != -100).sum())
    parts = [causal_lm_loss(logits[i : i + 1], labels[i : i + 1], num_items=count) for i in range(4)]
    close(sum(parts), whole, torch.float64)


def test_dft_is_cross_entropy_weighted_by_probability_without_gradient():
    logits, labels = example(10)
    logits.requires_grad_()
    rows, targets = scored(logits, labels)
    logp = rows.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    close(dft_loss(logits, labels).detach(), -(logp.exp() * logp).mean().detach(), torch.float64)
    (got,) = torch.autograd.grad(dft_loss(logits, labels), logits)
    (want,) = torch.autograd.grad(-(logp.exp().detach() * logp).mean(), logits)
    close(got, want, torch.float64)


def test_unlikelihood_is_the_rest_of_the_probability():
    logits, labels = example(11)
    rows, targets = scored(logits, labels)
    p = rows.softmax(-1).gather(1, targets[:, None]).squeeze(1)
    close(unlikelihood_loss(logits, labels), -(1 - p).log().mean(), torch.float64)
    sure = torch.tensor([[[0.0, 50.0], [0.0, 0.0]]], requires_grad=True)
    loss = unlikelihood_loss(sure, torch.tensor([[0, 1]]))
    loss.backward()
    close(loss.detach(), 50.0)
    assert torch.isfinite(sure.grad).all()


def test_gradcheck_of_unlikelihood():
    logits, labels = example(12, batch=2, length=4, vocabulary=5)
    assert torch.autograd.gradcheck(lambda z: unlikelihood_loss(z, labels), logits.requires_grad_())


def test_bits_per_byte():
    logits, labels = example(13)
    want = sum(plain_nll(logits, labels)) / math.log(2) / 57
    close(bits_per_byte(logits, labels, 57), want, torch.float64)
