"""A student beside its teacher against SciPy in a double loop, autograd on the plain formulas, limits, and counts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from anew import anew
from conftest import close, tiny_model
from scipy.special import log_softmax, rel_entr

from rlhf.logprobs import Divergence, Head, Predictions, Targets, compare, model_predictions, verified_settings
from rlhf.losses import DIVERGENCES

N, V = 9, 13


def kl(p, q):
    return sum(float(rel_entr(a, b)) for a, b in zip(p, q, strict=True))


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


# name: (options, formula of the probabilities of teacher and student)
CASES = {
    "kl_divergence": ({}, kl),
    "kl_divergence/reverse": (dict(reverse=True), lambda p, q: kl(q, p)),
    "generalized_jsd": (dict(beta=0.3), lambda p, q: jsd(p, q, 0.3)),
    "generalized_jsd/default": ({}, lambda p, q: jsd(p, q, 0.5)),
    "generalized_jsd/0": (dict(beta=0), kl),
    "generalized_jsd/1": (dict(beta=1.0), lambda p, q: kl(q, p)),
    "skew_kl": (dict(alpha=0.2), lambda p, q: kl(p, 0.2 * p + 0.8 * q)),
    "skew_kl/default": ({}, lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    "skew_kl/reverse": (dict(alpha=0.2, reverse=True), lambda p, q: kl(q, 0.8 * p + 0.2 * q)),
    "skew_kl/0": (dict(alpha=0, reverse=True), lambda p, q: kl(q, p)),
    "alpha_divergence": (dict(alpha=0.3), lambda p, q: (1 - (p**0.3 * q**0.7).sum()) / 0.21),
    "alpha_divergence/0": (dict(alpha=0), lambda p, q: kl(q, p)),
    "alpha_divergence/1": (dict(alpha=1), kl),
    "total_variation": ({}, lambda p, q: abs(p - q).sum() / 2),
}


def form(case, temperature=1.0, hard=0.0, soft=1.0, **options):
    return Divergence(case.split("/")[0], temperature, CASES[case][0] | options, soft, hard)


def problem(dtype=torch.float64, softcap=None, rows=N, vocabulary=V, sizes=(5, 4), seed=0, spread=1.0):
    """A student with gradients, a teacher with a head of another shape and scale, and the tokens."""
    g = torch.Generator().manual_seed(seed)

    def side(size, scale, cap, learns):
        hidden, weight, bias = (
            (spread * torch.randn(*shape, generator=g, dtype=dtype)).requires_grad_(learns)
            for shape in ((rows, size), (vocabulary, size), (vocabulary,))
        )
        return Predictions(hidden, Head(weight, bias, scale, cap, 0.8))

    student, teacher = side(sizes[0], 1.3, softcap, True), side(sizes[1], 0.7, None if softcap is None else 4.0, False)
    return student, teacher, torch.randint(vocabulary, (rows,), generator=g)


def logits(side):
    """The plain formula, without the head's own method."""
    hidden, head = side
    z = (hidden @ head.weight.T + head.bias) * head.scale
    return (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)) / head.temperature


def leaves(side):
    return side.rows, side.head.weight, side.head.bias


def frozen(side):
    head = side.head
    return side._replace(head=replace(head, weight=head.weight.detach(), bias=head.bias.detach()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_formula(case, temperature, softcap):
    student, teacher, token = problem(softcap=softcap)
    log_q, log_p = (log_softmax(logits(side).detach().numpy(), -1) for side in (student, teacher))
    q, p = (np.exp(log_softmax(x / temperature, -1)) for x in (log_q, log_p))
    want = [CASES[case][1](a, b) for a, b in zip(p, q, strict=True)]
    for learns in (True, False):
        with torch.set_grad_enabled(learns):
            scores = compare(student, teacher, token, form(case, temperature, 0.4, 0.6), chunk_size=4)
        close(scores.teacher.divergence, want, torch.float64)
        at = np.arange(N), token.numpy()
        close(scores.logps, log_q[at], torch.float64)
        close(scores.teacher.logps, log_p[at], torch.float64)
        assert scores.teacher.agrees.tolist() == (log_q.argmax(-1) == log_p.argmax(-1)).tolist()
        close(scores.teacher.kl, [kl(a, b) for a, b in zip(np.exp(log_p), np.exp(log_q), strict=True)], torch.float64)
        close(scores.loss.detach(), 0.6 * sum(want) - 0.4 * log_q[at].sum(), torch.float64)


def plain(case, student, teacher, token, temperature, hard, soft):
    """The loss from probabilities, for autograd."""
    q, p = ((logits(side) / temperature).softmax(-1) for side in (student, teacher))
    options, name = CASES[case][0], case.split("/")[0]
    beta, alpha = options.get("beta", 0.5), options.get("alpha", 0.1)

    def kl(a, b):
        return (a * (a / b).log()).sum()

    match name:
        case "total_variation":
            value = (p - q).abs().sum() / 2
        case "alpha_divergence" if 0 < alpha < 1:
            value = (len(token) - (p**alpha * q ** (1 - alpha)).sum()) / (alpha * (1 - alpha))
        case "generalized_jsd" if 0 < beta < 1:
            m = beta * p + (1 - beta) * q
            value = beta * kl(p, m) + (1 - beta) * kl(q, m)
        case "skew_kl":
            a, b = (q, p) if options.get("reverse") else (p, q)
            value = kl(a, alpha * a + (1 - alpha) * b)
        case _:
            reverse = options.get("reverse") or beta == 1 or (name == "alpha_divergence" and alpha == 0)
            value = kl(q, p) if reverse else kl(p, q)
    return soft * value + hard * F.cross_entropy(logits(student), token, reduction="sum")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("hard", [0.0, 0.4])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients(case, temperature, hard, softcap):
    """Of rows, weight and bias; against autograd, and along a direction against the difference of two losses."""
    student, teacher, token = problem(softcap=softcap)
    how = form(case, temperature, hard, 0.6)
    want = torch.autograd.grad(plain(case, student, teacher, token, temperature, hard, 0.6), leaves(student))
    got = torch.autograd.grad(3 * compare(student, teacher, token, how, chunk_size=4).loss, leaves(student))
    for a, b in zip(got, want, strict=True):
        close(a / 3, b, torch.float64)
    for leaf, gradient in zip(leaves(student), got, strict=True):
        step = 1e-5 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1), dtype=leaf.dtype)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf.add_(step, alpha=sign)
                ends.append(float(compare(student, teacher, token, how).loss))
                leaf.sub_(step, alpha=sign)
        assert (ends[0] - ends[1]) / 2 == pytest.approx(float((gradient * step).sum()) / 3, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(case, softcap):
    """Every element of rows, weight and bias, in chunks."""
    student, teacher, token = problem(rows=4, vocabulary=7, sizes=(3, 2), softcap=softcap)

    def loss(rows, weight, bias):
        side = Predictions(rows, replace(student.head, weight=weight, bias=bias))
        return 1.3 * compare(side, teacher, token, form(case, 1.7, 0.4, 0.6), chunk_size=3).loss

    assert torch.autograd.gradcheck(anew(loss), leaves(student), rtol=1e-5, atol=1e-6)


def test_every_divergence_is_among_the_cases():
    assert {case.split("/")[0] for case in CASES} == DIVERGENCES.keys()
    assert all(form(case).fused() is not None for case in CASES)  # autograd on the chunk would be slower


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agreement_costs_nothing_and_has_no_gradient(case, temperature, dtype):
    student, _, token = problem(dtype, vocabulary=3000, spread=2.0)
    teacher = Predictions(student.rows.detach(), frozen(student).head)
    scores = compare(student, teacher, token, form(case, temperature))
    for gradient in torch.autograd.grad(scores.loss, leaves(student)):
        assert gradient.abs().max() < (1e-5 if dtype == torch.float32 else 1e-13)
    close(scores.teacher.divergence, torch.zeros(N), dtype)
    close(scores.teacher.kl, torch.zeros(N), dtype)
    assert scores.teacher.agrees.all() and torch.equal(scores.teacher.logps, scores.logps)


def squared_difference(student_logits, teacher_logits, power=2.0, temperature=1.0, reduction="none"):
    """A divergence that nobody knows: of probabilities, not of their logarithms."""
    q, p = ((logits / temperature).softmax(-1) for logits in (student_logits, teacher_logits))
    return ((p - q).abs() ** power).sum(-1)


@pytest.mark.parametrize("name", ["squared_difference", "kl_divergence"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("hard", [0.0, 0.4])
def test_a_divergence_that_is_added_has_its_own_value_and_gradient(name, softcap, hard, monkeypatch):
    """In chunks as by the plain formula; also under a name that was taken."""
    monkeypatch.setitem(DIVERGENCES, name, squared_difference)
    student, teacher, token = problem(softcap=softcap)
    how = Divergence(name, 1.7, dict(power=3.0), 0.6, hard)
    scores = compare(student, teacher, token, how, chunk_size=4)
    want = squared_difference(logits(student), logits(teacher), 3.0, 1.7)
    loss = 0.6 * want.sum() + hard * F.cross_entropy(logits(student), token, reduction="sum")
    close(scores.teacher.divergence, want.detach(), torch.float64)
    close(scores.loss.detach(), loss.detach(), torch.float64)
    for got, exact in zip(*(torch.autograd.grad(x, leaves(student)) for x in (scores.loss, loss)), strict=True):
        close(got, exact, torch.float64)
    with torch.no_grad():
        close(compare(student, teacher, token, how).loss, loss.detach(), torch.float64)


def test_a_high_temperature_matches_centred_logits():
    student, teacher, token = problem()
    hot = compare(student, teacher, token, Divergence("kl_divergence", 1e4, dict(scale_by_temperature=True)))
    s, t = (x - x.mean(-1, keepdim=True) for x in (logits(student), logits(teacher)))
    want = ((s - t) ** 2).mean(-1).sum() / 2
    assert float(hot.loss.detach()) == pytest.approx(float(want.detach()), rel=1e-3)
    for a, b in zip(*(torch.autograd.grad(x, leaves(student)) for x in (hot.loss, want)), strict=True):
        assert (a - b).abs().max() < 2e-3 * b.abs().max()


@pytest.mark.parametrize("reverse", [False, True])
def test_jensen_shannon_tends_to_both_kls(reverse):
    student, teacher, token = problem(spread=0.5)
    limit = compare(student, teacher, token, Divergence("kl_divergence", options=dict(reverse=reverse))).loss
    near = compare(student, teacher, token, Divergence(options=dict(beta=1 - 1e-7 if reverse else 1e-7))).loss * 1e7
    for a, b in zip(*(torch.autograd.grad(x, leaves(student)) for x in (near, limit)), strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()
    assert float(near.detach()) == pytest.approx(float(limit.detach()), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_classic_distillation(temperature):
    """Hinton's mixture, of torch's own parts."""
    student, teacher, token = problem()
    how = Divergence("kl_divergence", temperature, dict(scale_by_temperature=True), 0.7, 0.3)
    s, t = (logits(side) for side in (student, teacher))
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (s, t))
    soft = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    want = 0.7 * temperature**2 * soft + 0.3 * F.cross_entropy(s, token, reduction="sum")
    got = compare(student, teacher, token, how, chunk_size=2).loss
    close(got.detach(), want.detach(), torch.float64)
    for a, b in zip(*(torch.autograd.grad(x, leaves(student)) for x in (got, want)), strict=True):
        close(a, b, torch.float64)


@pytest.mark.parametrize("case", ["kl_divergence", "generalized_jsd", "skew_kl/reverse"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_any_chunk_and_block_gives_the_same(case, temperature, monkeypatch):
    student, teacher, token = problem(torch.float32)

    def run(size):
        scores = compare(student, teacher, token, form(case, temperature, 0.5), chunk_size=size)
        return scores.loss.detach(), *scores.teacher[:4], *torch.autograd.grad(scores.loss, leaves(student))

    want = run(100)
    for size in (None, 1, 4, 9):
        for block in (1, 3 * V):
            monkeypatch.setattr("rlhf.logprobs.divergence.IN_CACHE", block)
            for a, b in zip(run(size), want, strict=True):
                close(a, b)


@pytest.mark.parametrize("case", CASES)
def test_far_logits_stay_finite_and_right(case):
    """Where each is certain of another token; most probabilities are 0 in float32."""
    student, teacher, token = problem(torch.float32, vocabulary=40, spread=20.0)
    scores = compare(student, teacher, token, form(case, hard=0.5))
    gradients = torch.autograd.grad(scores.loss, leaves(student))
    assert all(gradient.isfinite().all() for gradient in gradients)
    s, t = (logits(side).double() for side in (student, teacher))
    want = form(case).dense(s, t)
    close(scores.teacher.divergence / want.detach().clamp(min=1), want.detach() / want.detach().clamp(min=1))
    exact = torch.autograd.grad(want.sum() + 0.5 * F.cross_entropy(s, token, reduction="sum"), leaves(student))
    for a, b in zip(gradients, exact, strict=True):
        assert (a - b).abs().max() < 2e-4 * b.abs().max()


PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise")


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("case", ["kl_divergence", "generalized_jsd"])
@pytest.mark.parametrize(("mode", "products"), [("learns", 4), ("frozen head", 3), ("no gradient", 2)])
def test_the_profiler_counts_the_products_of_the_heads(mode, products, case, onednn, monkeypatch):
    monkeypatch.setattr("rlhf.kernels.matmul.onednn_is_faster", lambda: onednn)
    monkeypatch.setattr("rlhf.kernels.matmul.SMALL", 1)
    student, teacher, token = problem(torch.float32, rows=64, vocabulary=50)
    if mode == "frozen head":
        student = frozen(student)
    with torch.profiler.profile(record_shapes=True) as profile:
        with torch.set_grad_enabled(mode != "no gradient"):
            scores = compare(student, teacher, token, form(case, 2.0, 0.5), chunk_size=64)
        if mode != "no gradient":
            scores.loss.backward()
    large = [e.name for e in profile.events() if e.name in PRODUCTS and any(50 in shape for shape in e.input_shapes)]
    assert len(large) == products, large
    assert (student.rows.grad is not None) == (mode != "no gradient") and teacher.head.weight.grad is None


@pytest.mark.parametrize("learns", [False, True])
def test_never_more_than_a_chunk_of_logits_of_each(learns):
    student, teacher, token = problem(torch.float32, rows=4096, vocabulary=4000)
    with torch.profiler.profile(profile_memory=True) as profile, torch.set_grad_enabled(learns):
        compare(student, teacher, token, Divergence(temperature=2.0, crossentropy_weight=1.0), chunk_size=64)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 5 * 64 * 4000 * 4  # all the logits of one would be 64 times a chunk's


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_float32_out(dtype):
    student, teacher, token = problem(torch.float32)
    sides = []
    for side in (student, teacher):
        head = side.head
        weight, bias = (x.detach().to(dtype).requires_grad_(side is student) for x in (head.weight, head.bias))
        rows = side.rows.detach().to(dtype).requires_grad_(side is student)
        sides.append(Predictions(rows, Head(weight, bias, head.scale, head.softcap, head.temperature)))
    wide = [
        Predictions(s.rows.detach().double(), Head(s.head.weight.detach().double(), s.head.bias.detach().double(),
        s.head.scale, None, s.head.temperature)) for s in sides
    ]  # fmt: skip
    scores = compare(*sides, token, Divergence(crossentropy_weight=0.5))
    want = compare(*wide, token, Divergence(crossentropy_weight=0.5))
    assert {x.dtype for x in (scores.loss, scores.logps, scores.teacher.divergence)} == {torch.float32}
    close(scores.loss.detach(), want.loss)
    close(scores.teacher.divergence, want.teacher.divergence)
    scores.loss.backward()
    assert all(leaf.grad.dtype == dtype for leaf in leaves(sides[0]))


def test_heads_that_differ_by_padding_are_compared_on_what_both_know():
    student, teacher, token = problem()
    known = 10
    token = token % known
    padded = Predictions(teacher.rows, Head(teacher.head.weight[:11], teacher.head.bias[:11], 0.7, None, 0.8))
    with pytest.raises(ValueError, match="has 13 tokens, the teacher's 11: if they differ by padding"):
        compare(student, padded, token, Divergence())
    with pytest.raises(ValueError, match="vocab_size is 12, the student's head has 13 tokens, the teacher's 11"):
        compare(student, padded, token, Divergence(vocab_size=12))
    scores = compare(student, padded, token, Divergence("kl_divergence", vocab_size=known))
    s, t = (logits(side)[:, :known].log_softmax(-1) for side in (student, teacher))
    want = F.kl_div(s, t, reduction="sum", log_target=True)
    close(scores.loss.detach(), want.detach(), torch.float64)
    for a, b in zip(*(torch.autograd.grad(x, leaves(student)) for x in (scores.loss, want)), strict=True):
        close(a, b, torch.float64)
        assert a.shape[0] == N or not a[known:].any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_a_side_that_gives_logits_is_compared_exactly(case, which):
    student, teacher, token = problem()
    want = compare(student, teacher, token, form(case, 1.7, 0.5))
    sides = [
        Predictions(logits(side)) if which in (name, "both") else side
        for name, side in (("student", student), ("teacher", teacher))
    ]
    got = compare(*sides, token, form(case, 1.7, 0.5))
    for a, b in zip((got.loss, got.logps, *got.teacher[:4]), (want.loss, want.logps, *want.teacher[:4]), strict=True):
        close(a.detach(), b.detach(), torch.float64)
    assert not got.logps.requires_grad
    for a, b in zip(*(torch.autograd.grad(x.loss, leaves(student)) for x in (got, want)), strict=True):
        close(a, b, torch.float64)


def test_no_tokens_are_a_zero_with_zero_gradients():
    student, teacher, token = problem(rows=0)
    loss = compare(student, teacher, token, Divergence()).loss
    loss.backward()
    assert loss.item() == 0 and not student.head.weight.grad.any()


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "phi"])
def test_models_are_compared_by_their_own_logits(name):
    """Student and teacher of different architectures; some rows of a batch are not scored."""
    student, teacher = tiny_model(name).eval(), tiny_model("llama", seed=1).eval()
    assert verified_settings(student) is not None
    ids = torch.randint(1, 330, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = -100
    targets = Targets.from_labels(labels)
    sides = [model_predictions(model, targets, input_ids=ids) for model in (student, teacher)]
    got = compare(*sides, targets.token, Divergence("kl_divergence", 2.0))
    log_q, log_p = ((m(ids).logits / 2).log_softmax(-1).view(-1, 330)[targets.source] for m in (student, teacher))
    close(got.loss.detach(), F.kl_div(log_q, log_p, reduction="sum", log_target=True).detach())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"divergence 'jsd' is unknown: one of kl_divergence, generalized_jsd, "):
        Divergence("jsd")
    with pytest.raises(ValueError, match="kl_divergence takes no beta"):
        Divergence("kl_divergence", options=dict(beta=0.5))
    with pytest.raises(ValueError, match="beta must be in"):
        Divergence(options=dict(beta=1.5))
    with pytest.raises(ValueError, match="temperature must be in"):
        Divergence(temperature=0.0)
    with pytest.raises(ValueError, match="crossentropy_weight must be at least 0, got nan"):
        Divergence(crossentropy_weight=math.nan)
    student, teacher, token = problem()
    with pytest.raises(ValueError, match="9, 9 and 8 rows"):
        compare(student, teacher, token[:8], Divergence())
    with pytest.raises(ValueError, match=r"target token 13 is outside the vocabulary \[0, 13\)"):
        compare(student, teacher, token * 0 + 13, Divergence())


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_large_vocabulary_loses_nothing(name):
    """50,000 terms: added one after another in float32, they lose 1e-4 of the sum."""
    g = torch.Generator().manual_seed(0)
    size = 50_000
    student, teacher = (torch.randn(4, 8, generator=g) * 3 for _ in range(2))
    heads = [torch.randn(size, 8, generator=g) for _ in range(2)]
    token = torch.randint(size, (4,), generator=g)
    sides = [Predictions(rows, Head(weight)) for rows, weight in zip((student, teacher), heads, strict=True)]
    found = compare(*sides, token, Divergence(name))
    exact = [
        Predictions(rows.double(), Head(weight.double()))
        for rows, weight in zip((student, teacher), heads, strict=True)
    ]
    z, y = (side.logits(torch.float64) for side in exact)
    close(found.teacher.divergence, DIVERGENCES[name](z, y, reduction="none"))
    close(found.teacher.kl, DIVERGENCES["kl_divergence"](z, y, reduction="none"))
