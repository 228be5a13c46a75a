"""Divergences against SciPy in a double loop, torch's kl_div, their limits, and what all losses share."""

import math
from itertools import zip_longest

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax

from rlhf import losses

N, V, T = 7, 9, 1.7


def logits(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, V, generator=g, dtype=torch.float64) * 2 for _ in range(2)]


def kl(p, q):
    return sum(float(rel_entr(a, b)) for a, b in zip(p, q, strict=True))


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


# name: (own arguments, formula of the probabilities of teacher and student)
CASES = {
    "kl_divergence": ({}, kl),
    "kl_divergence/reverse": (dict(reverse=True), lambda p, q: kl(q, p)),
    "generalized_jsd": (dict(beta=0.3), lambda p, q: jsd(p, q, 0.3)),
    "jensen_shannon": ({}, lambda p, q: jensenshannon(p, q) ** 2),
    "skew_kl": (dict(alpha=0.2), lambda p, q: kl(p, 0.2 * p + 0.8 * q)),
    "skew_kl/reverse": (dict(alpha=0.2, reverse=True), lambda p, q: kl(q, 0.8 * p + 0.2 * q)),
    "total_variation": ({}, lambda p, q: abs(p - q).sum() / 2),
    "alpha_divergence": (dict(alpha=0.3), lambda p, q: (1 - (p**0.3 * q**0.7).sum()) / 0.21),
    "uld_loss": ({}, lambda p, q: sum(abs(a - b) for a, b in zip(sorted(p), sorted(q), strict=True))),
}


def run(case, *inputs, **options):
    return getattr(losses, case.split("/")[0])(*inputs, **CASES[case][0], **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [1.0, T])
def test_formula(case, temperature):
    student, teacher = logits()
    q, p = (softmax(x.numpy() / temperature, -1) for x in (student, teacher))
    want = [CASES[case][1](a, b) for a, b in zip(p, q, strict=True)]
    close(run(case, student, teacher, temperature=temperature, reduction="none"), want, torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_in_both(case):
    student, teacher = (x[:3].requires_grad_() for x in logits(1))
    assert torch.autograd.gradcheck(lambda s, t: run(case, s, t, temperature=T), (student, teacher))


@pytest.mark.parametrize("case", CASES)
def test_agreement_costs_nothing_and_has_no_gradient(case):
    student, _ = logits(2)
    student.requires_grad_()
    loss = run(case, student, student.detach())
    loss.backward()
    close(loss.detach(), 0.0, torch.float64)
    close(student.grad, torch.zeros(N, V), torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_a_mask_deletes_tokens_and_what_they_hold(case):
    student, teacher = logits(3)
    mask = torch.tensor([True, False, True, True, False, True, True])
    want = run(case, student[mask], teacher[mask])
    hidden = student.masked_fill(~mask[:, None], math.nan).requires_grad_()
    got = run(case, hidden, teacher, mask=mask)
    got.backward()
    close(got.detach(), want, torch.float64)
    assert torch.isfinite(hidden.grad).all()
    nothing = run(case, student.requires_grad_(), teacher, mask=mask & False)
    nothing.backward()
    assert nothing == 0


@pytest.mark.parametrize("case", CASES)
def test_far_logits_stay_finite(case):
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = run(case, student, -student.detach())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_computed_in_float32(case):
    student, teacher = (x.bfloat16() for x in logits(4))
    got = run(case, student, teacher)
    assert got.dtype == torch.float32
    close(got, run(case, student.float(), teacher.float()))


def test_batchmean_is_torchs():
    student, teacher = logits(5)
    want = F.kl_div((student / T).log_softmax(-1), (teacher / T).softmax(-1), reduction="batchmean") * T**2
    close(losses.kl_divergence(student, teacher, T, scale_by_temperature=True), want, torch.float64)


def test_limits():
    student, teacher = logits(6)
    forward, reverse = (losses.kl_divergence(student, teacher, reverse=r) for r in (False, True))
    close(losses.generalized_jsd(student, teacher, 0.0), forward, torch.float64)
    close(losses.generalized_jsd(student, teacher, 1.0), reverse, torch.float64)
    for beta, limit in ((1e-8, forward), (1 - 1e-8, reverse)):
        near = losses.generalized_jsd(student, teacher, beta) / min(beta, 1 - beta)
        assert abs(near - limit) < 1e-5 * limit
    close(losses.skew_kl(student, teacher, 0.0), forward, torch.float64)
    close(losses.alpha_divergence(student, teacher, 1.0), forward, torch.float64)
    close(losses.alpha_divergence(student, teacher, 0.0), reverse, torch.float64)
    assert abs(losses.alpha_divergence(student, teacher, 1 - 1e-6) - forward) < 1e-4 * forward


def test_a_high_temperature_matches_centred_logits():
    student, teacher = logits(7)
    hot = losses.kl_divergence(student, teacher, 1e4, scale_by_temperature=True, reduction="none")
    gap = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    want = (gap**2).mean(-1) / 2
    assert torch.allclose(hot, want, rtol=1e-3)


@pytest.mark.parametrize("k", [1, 3, V])
def test_top_k_with_its_tail_never_exceeds_the_whole(k):
    student, teacher = logits(8)
    top = (teacher / T).log_softmax(-1).topk(k)
    got = losses.top_k_kl(student, top.values, top.indices, T, reduction="none")
    full = losses.kl_divergence(student, teacher, T, reduction="none")
    assert (got <= full + 1e-12).all() and (got >= -1e-12).all()
    if k == V:
        close(got, full, torch.float64)
    p, q = (torch.softmax(x / T, -1).numpy() for x in (teacher, student))
    ids = top.indices.numpy()
    pk, qk = (np.take_along_axis(x, ids, -1) for x in (p, q))
    want = rel_entr(pk, qk).sum(-1) + rel_entr(np.maximum(1 - pk.sum(-1), 0), np.maximum(1 - qk.sum(-1), 1e-300)) * (
        k < V
    )
    close(got, want, torch.float64)


@pytest.mark.parametrize("tail", [True, False])
def test_top_k_gradcheck(tail):
    student, teacher = logits(9)
    top = teacher.log_softmax(-1).topk(3)
    assert torch.autograd.gradcheck(
        lambda s: losses.top_k_kl(s, top.values, top.indices, tail=tail), student.requires_grad_()
    )


def test_distillation_is_its_two_parts():
    student, teacher = logits(10)
    labels = torch.tensor([0, 1, -100, 3, 4, 5, 6])
    keep = labels != -100
    soft = F.kl_div((student[keep] / T).log_softmax(-1), (teacher[keep] / T).softmax(-1), reduction="batchmean") * T**2
    hard = F.cross_entropy(student, labels)
    close(losses.distillation_loss(student, teacher, labels, 0.3, T), 0.3 * soft + 0.7 * hard, torch.float64)


@pytest.mark.parametrize("sizes", [(4, 9), (9, 4)])
def test_sorted_probabilities_of_vocabularies_of_different_sizes(sizes):
    student, teacher = (x[:, :size].clone().requires_grad_() for x, size in zip(logits(11), sizes, strict=True))
    q, p = (softmax(x.detach().numpy() / T, -1) for x in (student, teacher))
    want = [
        sum(abs(a - b) for a, b in zip_longest(sorted(y)[::-1], sorted(x)[::-1], fillvalue=0.0))
        for x, y in zip(p, q, strict=True)
    ]
    close(losses.uld_loss(student, teacher, T, reduction="none").detach(), want, torch.float64)
    assert torch.autograd.gradcheck(lambda s, t: losses.uld_loss(s, t, T), (student, teacher))


def test_sorted_probabilities_know_no_tokens():
    student, teacher = logits(12)
    shuffled = student[:, torch.randperm(V, generator=torch.Generator().manual_seed(0))]
    close(losses.uld_loss(student, shuffled), 0.0, torch.float64)
    want = losses.uld_loss(student, teacher, reduction="none")
    close(losses.uld_loss(shuffled, teacher, reduction="none"), want, torch.float64)
    assert (want <= 2 * losses.total_variation(student, teacher, reduction="none") + 1e-12).all()  # sorting is nearest
    close(losses.uld_loss(torch.tensor([[0.0, 1e4]]), torch.zeros(1, 1000)), 2 * (1 - 1 / 1000))


def spans(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [-torch.rand(N, generator=g, dtype=torch.float64) * 8 - 0.01 for _ in range(2)]


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_spans_against_a_plain_loop(temperature):
    student, teacher = spans()
    q, p = (np.exp(x.numpy() / temperature) for x in (student, teacher))
    want = [kl(np.array([a, 1 - a]), np.array([b, 1 - b])) for a, b in zip(p, q, strict=True)]
    close(losses.span_loss(student, teacher, temperature, reduction="none"), want, torch.float64)
    want = [((a - b) / temperature) ** 2 for a, b in zip(student.tolist(), teacher.tolist(), strict=True)]
    squared = losses.span_loss(student, teacher, temperature, distance="squared", reduction="none")
    close(squared, want, torch.float64)


def test_a_span_of_one_token_is_top_1_of_that_token():
    student, teacher = logits(13)
    ids = teacher.argmax(-1, keepdim=True)
    q, p = (x.log_softmax(-1).gather(-1, ids) for x in (student, teacher))
    got = losses.span_loss(q[:, 0], p[:, 0], reduction="none")
    close(got, losses.top_k_kl(student, p, ids, reduction="none"), torch.float64)
    assert (got <= losses.kl_divergence(student, teacher, reduction="none")).all()


@pytest.mark.parametrize("distance", ["kl", "squared"])
def test_spans_gradcheck_agree_and_end(distance):
    student, teacher = (x.requires_grad_() for x in spans(1))
    assert torch.autograd.gradcheck(lambda s, t: losses.span_loss(s, t, 2.0, distance=distance), (student, teacher))
    losses.span_loss(student, student.detach(), distance=distance).backward()
    close(student.grad, torch.zeros(N), torch.float64)
    # Certain and hopeless on both sides; then certain where the teacher is not.
    ends = torch.tensor([0.0, -1e4, 0.0], requires_grad=True)
    loss = losses.span_loss(ends, torch.tensor([0.0, -1e4, -1.0]), distance=distance, reduction="none")
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(ends.grad).all()
    close(loss[:2].detach(), [0.0, 0.0])
    never = losses.span_loss(torch.tensor([0.75]).log(), torch.tensor([-math.inf]))
    close(never, math.log(4))
    assert losses.span_loss(student, teacher, mask=torch.zeros(N, dtype=torch.bool), distance=distance) == 0


def test_mistakes_are_named():
    student, teacher = logits()
    with pytest.raises(ValueError, match=r"student_logits \(6,\), teacher_logits \(7,\)"):
        losses.uld_loss(student[:6], teacher[:, :4])
    with pytest.raises(ValueError, match='distance must be "kl" or "squared"'):
        losses.span_loss(student[0], teacher[0], distance="l1")
    with pytest.raises(ValueError, match=r"logps \(9,\), span \(3,\)"):
        losses.span_logps(student[0], torch.zeros(3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"student_logits \(7, 9\), teacher_logits \(7, 8\)"):
        losses.kl_divergence(student, teacher[:, :8])
    with pytest.raises(ValueError, match="temperature must be in"):
        losses.kl_divergence(student, teacher, temperature=0.0)
    with pytest.raises(ValueError, match="beta must be in"):
        losses.generalized_jsd(student, teacher, beta=1.5)
