"""What is kept of a teacher, and the divergence from it: against double loops, the whole divergence, and autograd."""

import math

import pytest
import torch
from anew import anew
from conftest import ARCHITECTURES, close, tiny_model

from rlhf import losses
from rlhf.logprobs import (
    Head,
    Targets,
    TopK,
    model_top_k,
    model_top_k_divergence,
    top_k,
    top_k_divergence,
    verified_settings,
)  # fmt: skip

N, V, H = 9, 13, 5
CASES = [(estimate, beta) for estimate in ("tail", "truncate") for beta in (0.0, 1.0, 0.3)]
TARGETS = Targets(
    torch.tensor([0, 1, 1, 4, 6, 6]), torch.tensor([3, 4, 0, 10, 2, 12]), torch.tensor([0, 0, 1, 1, 2, 2])
)


def problem(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(N, H, generator=g, dtype=dtype) for _ in range(2))
    weights = [torch.randn(V, H, generator=g, dtype=dtype) for _ in range(2)]
    bias = torch.randn(V, generator=g, dtype=dtype)
    return student.requires_grad_(), teacher, weights[0].requires_grad_(), weights[1], bias.requires_grad_()


def kept(teacher, weight, k, temperature=1.0):
    return top_k(teacher, Head(weight, temperature=temperature), TARGETS, k)


# The oracle: plain floats, two loops, nothing of rlhf.


def softmax(z, temperature):
    top = max(z)
    e = [math.exp((x - top) / temperature) for x in z]
    return [x / sum(e) for x in e]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def between(p, q, beta):
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def oracle(z_student, z_teacher, token, k, temperature, estimate, beta):
    """(divergence, log-prob of the target at temperature 1)."""
    q, p = softmax(z_student, temperature), softmax(z_teacher, temperature)
    best = sorted(range(len(p)), key=lambda v: -p[v])[:k]
    pk, qk = [p[v] for v in best], [q[v] for v in best]
    if estimate == "truncate":
        value = between([x / sum(pk) for x in pk], [x / sum(qk) for x in qk], beta)
    else:
        others = [v for v in range(len(p)) if v not in best]
        value = between([*pk, sum(p[v] for v in others)], [*qk, sum(q[v] for v in others)], beta)
    return value, math.log(softmax(z_student, 1.0)[token])


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("k", [1, 4, V - 1])
@pytest.mark.parametrize(("estimate", "beta"), CASES)
def test_a_double_loop(estimate, beta, k, temperature):
    student, teacher, weight, t_weight, bias = problem()
    know = kept(teacher, t_weight, k, temperature)
    head = Head(weight, bias, 1.3, 4.0, temperature)
    scores = top_k_divergence(
        student, head, TARGETS, know, estimate=estimate, beta=beta, soft=0.7, hard=0.4, chunk_size=4
    )
    z_student = [[4 * math.tanh(1.3 * x / 4) for x in row] for row in (student @ weight.T + bias).tolist()]
    z_teacher = (teacher @ t_weight.T).tolist()
    want = [
        oracle(z_student[s], z_teacher[s], y, k, temperature, estimate, beta)
        for i, (s, y) in enumerate(zip(TARGETS.source.tolist(), TARGETS.token.tolist(), strict=True))
    ]
    divergence, logps = zip(*want, strict=True)
    close(scores.divergence, divergence, torch.float64)
    close(scores.logps, logps, torch.float64)
    close(scores.loss.detach(), 0.7 * sum(divergence) - 0.4 * sum(logps), torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize(("estimate", "beta"), CASES)
def test_gradcheck(estimate, beta, temperature):
    student, teacher, weight, t_weight, bias = problem(1)
    know = kept(teacher, t_weight, 3, temperature)

    def loss(hidden, weight, bias):
        head = Head(weight, bias, 1.3, 4.0, temperature)
        options = dict(estimate=estimate, beta=beta, soft=0.7, hard=0.4, chunk_size=4)
        return 1.3 * top_k_divergence(hidden, head, TARGETS, know, **options).loss

    assert torch.autograd.gradcheck(anew(loss), (student, weight, bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_tail_never_exceeds_the_whole_and_is_it_at_k_of_v(beta, temperature):
    student, teacher, weight, t_weight, bias = problem(2)
    z = (student @ weight.T + bias)[TARGETS.source]
    whole = losses.generalized_jsd(z, (teacher @ t_weight.T)[TARGETS.source], beta, temperature, reduction="none")
    want = torch.autograd.grad(whole.sum(), (student, weight, bias))
    before = torch.zeros(len(TARGETS))
    for k in range(1, V + 1):
        head = Head(weight, bias, temperature=temperature)
        scores = top_k_divergence(student, head, TARGETS, kept(teacher, t_weight, k, temperature), beta=beta)
        assert (scores.divergence <= whole + 1e-12).all()
        assert (scores.divergence >= before - 1e-12).all()  # finer outcomes, more to tell apart
        before = scores.divergence
    close(scores.divergence, whole.detach(), torch.float64)
    for got, wanted in zip(torch.autograd.grad(scores.loss, (student, weight, bias)), want, strict=True):
        close(got, wanted, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("estimate", "beta"), CASES)
@pytest.mark.parametrize("k", [1, 3, V])
def test_a_student_that_is_the_teacher_has_neither_loss_nor_gradient(k, estimate, beta, dtype):
    student, _, weight, _, bias = problem(3, dtype)
    with torch.no_grad():
        know = top_k(student, Head(weight, bias), TARGETS, k)
    scores = top_k_divergence(student, Head(weight, bias), TARGETS, know, estimate=estimate, beta=beta)
    scores.loss.backward()
    for value in (scores.divergence, student.grad, weight.grad, bias.grad):
        close(value, torch.zeros_like(value), dtype)


def test_the_tail_has_no_force_beyond_its_mass_and_truncation_has_none_at_all():
    student, teacher, weight, t_weight, bias = problem(4)
    know = kept(teacher, t_weight, 1)
    head = Head(weight, bias)
    alone = top_k_divergence(student, head, TARGETS, know, estimate="truncate")
    alone.loss.backward()
    assert alone.loss == 0 and not student.grad.any()  # of one token, renormalised, all is known
    assert top_k_divergence(student, head, TARGETS, know).loss > 0.1


@pytest.mark.parametrize(("estimate", "beta"), CASES)
def test_chunks_do_not_matter(estimate, beta):
    student, teacher, weight, t_weight, bias = problem(6, torch.float32)
    know = kept(teacher, t_weight, 3)
    results = []
    for size in (None, 1, 4, 100):
        scores = top_k_divergence(
            student, Head(weight, bias), TARGETS, know, estimate=estimate, beta=beta, hard=0.5, chunk_size=size
        )
        results.append([*scores, *torch.autograd.grad(2 * scores.loss, (student, weight, bias))])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            close(got.detach(), want.detach())


def test_the_dense_forms_say_the_same():
    student, teacher, weight, t_weight, bias = problem(7)
    know = kept(teacher, t_weight, 3, 1.7)
    z = (student @ weight.T + bias)[TARGETS.source].detach()
    for estimate, beta in CASES:
        got = top_k_divergence(
            student, Head(weight, bias, temperature=1.7), TARGETS, know, estimate=estimate, beta=beta
        )
        options = dict(tail=estimate == "tail", reduction="none")
        want = losses.top_k_jsd(z, know.logps, know.ids, beta, 1.7, know.rest, **options)
        if beta in (0, 1):
            kl_of_top_k = losses.top_k_kl(z, know.logps, know.ids, 1.7, know.rest, reverse=bool(beta), **options)
            close(kl_of_top_k, want, torch.float64)
        close(got.divergence, want, torch.float64)


PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise")


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize(("who", "products"), [("learns", 3), ("frozen", 2), ("no gradient", 1), ("teacher", 1)])
def test_the_profiler_counts_the_products_of_the_head(who, products, temperature):
    student, teacher, weight, t_weight, _ = problem(8)
    know = kept(teacher, t_weight, 3, temperature)
    head = Head(weight.detach() if who == "frozen" else weight, temperature=temperature)
    with torch.profiler.profile() as profile:
        if who == "teacher":
            top_k(student, head, TARGETS, 3)
        elif who == "no gradient":
            with torch.no_grad():
                top_k_divergence(student, head, TARGETS, know, hard=0.5)
        else:
            top_k_divergence(student, head, TARGETS, know, hard=0.5).loss.backward()
    assert sum(event.name in PRODUCTS for event in profile.events()) == products


def test_far_logits_stay_finite():
    student, teacher, weight, t_weight, _ = problem(9, torch.float32)
    know = kept(teacher * 1e4, t_weight, 3)
    for estimate, beta in CASES:
        student.grad = None
        scores = top_k_divergence(student * -1e4, Head(weight), TARGETS, know, estimate=estimate, beta=beta)
        scores.loss.backward()
        assert torch.isfinite(scores.loss) and torch.isfinite(student.grad).all()


def test_no_tokens():
    student, _, weight, _, _ = problem()
    none = torch.zeros(0, dtype=torch.int64)
    targets = Targets(none, none, none)
    know = top_k(student, Head(weight), targets, 3)
    assert know.ids.shape == (0, 3)
    loss = top_k_divergence(student, Head(weight), targets, know).loss
    loss.backward()
    assert loss == 0 and not student.grad.any() and not weight.grad.any()


class Scaled(torch.nn.Linear):
    """A head that no config describes."""

    def forward(self, x):
        return super().forward(x) * 1.5


@pytest.mark.parametrize("name", [*ARCHITECTURES, "unreadable"])
def test_models(name):
    torch.manual_seed(0)
    student, teacher = (tiny_model("llama" if name == "unreadable" else name, seed=seed).eval() for seed in (0, 1))
    if name == "unreadable":
        for model in (student, teacher):
            odd = Scaled(32, 330, bias=False)
            odd.weight, model.lm_head = model.lm_head.weight, odd
    assert (verified_settings(student) is None) == (name == "unreadable")
    ids = torch.randint(1, 330, (2, 12), generator=torch.Generator().manual_seed(0))
    targets = Targets.from_labels(ids)
    know = model_top_k(teacher, targets, 5, temperature=1.3, input_ids=ids)
    z, z_teacher = (model(ids).logits.double()[:, :-1].reshape(-1, 330) for model in (student, teacher))
    p = (z_teacher / 1.3).log_softmax(-1)
    best = p.topk(5)
    close(know.logps, best.values.detach())
    assert (know.ids == best.indices).float().mean() > 0.95  # ties within rounding
    close(know.rest.exp(), 1 - best.values.exp().sum(-1).detach())
    for estimate, beta in CASES:
        student.zero_grad()
        got = model_top_k_divergence(
            student, targets, know, temperature=1.3, estimate=estimate, beta=beta, hard=0.5, input_ids=ids
        )
        got.loss.backward()
        assert student.get_input_embeddings().weight.grad.any()
        if estimate == "tail":
            kind = losses.top_k_jsd(z, best.values, best.indices, beta, 1.3, reduction="none")
            close(got.divergence, kind.detach())
            hard = -z.log_softmax(-1).gather(1, targets.token[:, None])[:, 0]
            close(got.loss.detach(), (kind + 0.5 * hard).sum().detach())


def test_mistakes_are_named():
    student, teacher, weight, t_weight, _ = problem()
    know, head = kept(teacher, t_weight, 3), Head(weight)
    for message, call in {
        "hidden states have size 4, the head 5": lambda: top_k_divergence(student[:, :4], head, TARGETS, know),
        "beta must be in": lambda: top_k_divergence(student, head, TARGETS, know, beta=1.5),
        "estimate must be": lambda: top_k_divergence(student, head, TARGETS, know, estimate="head"),
        "6 tokens are scored, but the teacher's ids are .5, 3.": lambda: top_k_divergence(
            student, head, TARGETS, TopK(*(x[:5] for x in know))
        ),
        r"teacher id 99 is outside the student's vocabulary \[0, 13\)": lambda: top_k_divergence(
            student, head, TARGETS, know._replace(ids=know.ids * 0 + 99)
        ),
        r"k must be in \[1, 13\].*got 14": lambda: top_k(student, head, TARGETS, 14),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
