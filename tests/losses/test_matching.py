"""Hidden states and attention against plain loops and torch's own, and what all losses share."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from scipy.special import rel_entr
from torch import nn

from rlhf.losses import attention_loss, hidden_state_loss
from rlhf.losses.modules import HiddenStateLoss

N, C, D, K = 6, 4, 5, 8


def hidden(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((N, C), (N, D), (D, C))]


def attention(seed=0):
    """Causal rows: what lies ahead has exactly nothing."""
    g = torch.Generator().manual_seed(seed)
    ahead = torch.ones(2, K, K, dtype=torch.bool).triu(1)
    scores = (2 * torch.randn(2, K, K, generator=g, dtype=torch.float64) for _ in range(2))
    return [s.masked_fill(ahead, -math.inf).softmax(-1) for s in scores]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def squared(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)


def cosine(a, b):
    return 1 - dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


@pytest.mark.parametrize("distance", [squared, cosine])
def test_hidden_states_against_a_plain_loop(distance):
    student, teacher, w = hidden()
    moved = [[dot(row, s) for row in w.tolist()] for s in student.tolist()]
    want = [distance(a, b) for a, b in zip(moved, teacher.tolist(), strict=True)]
    options = dict(distance=distance.__name__, reduction="none")
    close(hidden_state_loss(student, teacher, projection=w, **options), want, torch.float64)
    want = [distance(a, b) for a, b in zip(student.tolist(), teacher[:, :C].tolist(), strict=True)]
    close(hidden_state_loss(student, teacher[:, :C], **options), want, torch.float64)


def test_hidden_states_are_torchs():
    student, teacher, _ = hidden(1)
    close(hidden_state_loss(student, teacher[:, :C]), F.mse_loss(student, teacher[:, :C]), torch.float64)
    ones = torch.ones(N)
    got = hidden_state_loss(student, teacher[:, :C], distance="cosine")
    close(got, F.cosine_embedding_loss(student, teacher[:, :C], ones), torch.float64)


@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_hidden_states_gradcheck_with_the_projection(distance):
    inputs = [x.requires_grad_() for x in hidden(2)]
    assert torch.autograd.gradcheck(lambda s, t, w: hidden_state_loss(s, t, projection=w, distance=distance), inputs)


def test_a_projection_is_learned_to_the_least_squares():
    student, teacher, _ = hidden(3)
    loss = HiddenStateLoss(projection=nn.Parameter(torch.zeros(D, C, dtype=torch.float64)))
    optimizer = torch.optim.LBFGS(loss.parameters(), line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(student, teacher)
        value.backward()
        return value

    for _ in range(10):
        optimizer.step(closure)
    best = torch.linalg.lstsq(student, teacher).solution.T
    assert torch.allclose(loss.projection, best, atol=1e-5)


@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_a_mask_deletes_tokens_and_what_they_hold(distance):
    student, teacher, w = hidden(4)
    mask = torch.tensor([True, False, True, True, False, True])
    want = hidden_state_loss(student[mask], teacher[mask], projection=w, distance=distance)
    w.requires_grad_()
    full = student.masked_fill(~mask[:, None], math.nan).requires_grad_()
    got = hidden_state_loss(full, teacher, projection=w, distance=distance, mask=mask)
    got.backward()
    close(got.detach(), want, torch.float64)
    assert torch.isfinite(full.grad).all() and torch.isfinite(w.grad).all()
    assert hidden_state_loss(student, teacher, projection=w, distance=distance, mask=mask & False) == 0


def test_attention_against_scipy_and_a_plain_loop():
    student, teacher = attention()
    want = rel_entr(teacher.numpy(), student.numpy()).sum(-1)
    close(attention_loss(student, teacher, reduction="none"), want, torch.float64)
    want = [
        [K * squared(a, b) for a, b in zip(*rows, strict=True)]
        for rows in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    close(attention_loss(student, teacher, distance="squared", reduction="none"), want, torch.float64)


@pytest.mark.parametrize("distance", ["kl", "squared"])
def test_attention_gradients_padding_and_agreement(distance):
    student, teacher = attention(1)
    g = torch.Generator().manual_seed(2)
    scores = torch.randn(3, K, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: attention_loss(s.softmax(-1), teacher[0, -3:], distance=distance), scores)
    want = attention_loss(student, teacher, distance=distance)
    padded = attention_loss(F.pad(student, (2, 3)), F.pad(teacher, (2, 3)), distance=distance)
    close(padded, want, torch.float64)
    student.requires_grad_()
    same = attention_loss(student, student.detach(), distance=distance)
    same.backward()
    assert same == 0 and torch.isfinite(student.grad).all()
    rows = torch.tensor([True, False]).expand(K, 2).T
    close(attention_loss(student[:1], teacher[:1], distance=distance).detach(),
          attention_loss(student, teacher, distance=distance, mask=rows).detach(), torch.float64)  # fmt: skip


def test_attention_to_what_the_student_does_not_see_stays_finite():
    student = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = attention_loss(student, torch.tensor([[0.5, 0.5]]))
    loss.backward()
    assert loss > 20 and torch.isfinite(loss) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("distance", ["kl", "squared"])
def test_attention_that_is_nan_is_not_passed_over(distance):
    rows = torch.tensor([[0.5, 0.5]]), torch.tensor([[math.nan, math.nan]])
    assert attention_loss(*rows, distance=distance).isnan() and attention_loss(*rows[::-1], distance=distance).isnan()


def test_half_precision_is_computed_in_float32():
    student, teacher, w = (x.bfloat16() for x in hidden(5))
    got = hidden_state_loss(student, teacher, projection=w)
    assert got.dtype == torch.float32
    close(got, hidden_state_loss(student.float(), teacher.float(), projection=w.float()))
    rows = [x.bfloat16() for x in attention(3)]
    close(attention_loss(*rows), attention_loss(*(x.float() for x in rows)))


def test_mistakes_are_named():
    student, teacher, w = hidden()
    with pytest.raises(ValueError, match="the student is 4 wide, the teacher 5: pass a projection"):
        hidden_state_loss(student, teacher)
    with pytest.raises(ValueError, match=r"projection must be \[5, 4\] .* got \(4, 5\)"):
        hidden_state_loss(student, teacher, projection=w.T)
    with pytest.raises(ValueError, match=r"student_hidden \(5, 4\), teacher_hidden \(6, 4\)"):
        hidden_state_loss(student[:5], teacher[:, :4])
    with pytest.raises(ValueError, match='distance must be "squared" or "cosine"'):
        hidden_state_loss(student, student, distance="l1")
    with pytest.raises(ValueError, match=r"student_attention must be probabilities in \[0, 1\]"):
        attention_loss(student, student)
    with pytest.raises(ValueError, match='distance must be "kl" or "squared"'):
        attention_loss(*attention(), distance="cosine")
