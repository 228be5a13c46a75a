"""Every preference loss against its formula in Python floats, numerical gradients, limits and identities."""

import inspect
import math

import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import hinge_loss as sklearn_hinge
from sklearn.metrics import log_loss

from rlhf.losses import (
    PREFERENCE_LOSSES,
    checks,
    dpo_loss,
    kto_loss,
    length_desensitized_logps,
    plackett_luce_loss,
    reward_loss,
)


def sig(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def ell(x):
    return math.log1p(math.exp(-abs(x))) + max(-x, 0.0)


def odds(logp):
    p = math.exp(logp)
    return math.log(p / (1 - p))


# name: (own arguments, formula of (c, r, rc, rr, beta, n_c, n_r)); lengths 3 and 5 below
E, N, M = 0.1, 3, 5


def _f(g):
    return lambda c, r, rc, rr, b: ell(b * (g(c - rc) - g(r - rr)))


FORMULAS = {
    "sigmoid": (dict(label_smoothing=E), lambda c, r, rc, rr, b: (1 - E) * ell(b * (c - rc - r + rr)) + E * ell(-b * (c - rc - r + rr))),
    "hinge": ({}, lambda c, r, rc, rr, b: max(0.0, 1 - b * (c - rc - r + rr))),
    "ipo": ("lengths", lambda c, r, rc, rr, b: ((c - rc) / N - (r - rr) / M - 1 / (2 * b)) ** 2),
    "sigmoid_norm": ("lengths", lambda c, r, rc, rr, b: ell(b * ((c - rc) / N - (r - rr) / M))),
    "robust": (dict(label_smoothing=E), lambda c, r, rc, rr, b: ((1 - E) * ell(b * (c - rc - r + rr)) - E * ell(-b * (c - rc - r + rr))) / (1 - 2 * E)),
    "exo_pair": (dict(label_smoothing=E), lambda c, r, rc, rr, b: _exo(sig(b * (c - rc - r + rr)))),
    "discopop": (dict(discopop_tau=0.5), lambda c, r, rc, rr, b: _discopop(b * (c - rc - r + rr), 0.5)),
    "dpop": (dict(dpop_lambda=2.0), lambda c, r, rc, rr, b: ell(b * (c - rc - r + rr - 2 * max(0.0, rc - c)))),
    "odpo": (dict(margin=0.7), lambda c, r, rc, rr, b: ell(b * (c - rc - r + rr) - 0.7)),
    "rpo": (dict(rpo_alpha=0.5, chosen_lengths=N), lambda c, r, rc, rr, b: ell(b * (c - rc - r + rr)) - 0.5 * c / N),
    "tdpo": (dict(chosen_kl=1.0, rejected_kl=3.0, tdpo_alpha=0.5), lambda c, r, rc, rr, b: ell(b * (c - rc - r + rr) - 0.5 * b * (3 - 1))),
    "beta_dpo": (dict(batch_margin=0.8, threshold=0.3, beta_dpo_alpha=0.6), lambda c, r, rc, rr, b: ell(b * (1 + 0.6 * 0.5) * (c - rc - r + rr))),
    "f_dpo": (dict(f_divergence_type="alpha", f_alpha_divergence_coef=0.3), _f(lambda s: (1 - math.exp(-0.3 * s)) / 0.3)),
    "nca_pair": ({}, lambda c, r, rc, rr, b: ell(b * (c - rc)) + ell(-b * (c - rc)) / 2 + ell(-b * (r - rr)) / 2),
    "bco_pair": (dict(shift=0.4), lambda c, r, rc, rr, b: ell(b * (c - rc) - 0.4) + ell(0.4 - b * (r - rr))),
    "sppo_hard": ({}, lambda c, r, rc, rr, b: (c - rc - 0.5 / b) ** 2 + (r - rr + 0.5 / b) ** 2),
    "apo_zero": ({}, lambda c, r, rc, rr, b: 1 - sig(b * (c - rc)) + sig(b * (r - rr))),
    "apo_down": ({}, lambda c, r, rc, rr, b: sig(b * (c - rc)) + 1 - sig(b * (c - rc - r + rr))),
    "cal_dpo": ({}, lambda c, r, rc, rr, b: ell(c - rc - r + rr) + (c - rc - 0.5 / b) ** 2 + (r - rr + 0.5 / b) ** 2),
    "kto_pair": (dict(kl=0.9), lambda c, r, rc, rr, b: (1 - sig(b * (c - rc - 0.9))) / 2 + (1 - sig(b * (0.9 - r + rr))) / 2),
    "simpo": (dict(simpo_gamma=0.6, lengths=True), lambda c, r, rc, rr, b: ell(b * (c / N - r / M) - 0.6)),
    "cpo": (dict(cpo_alpha=0.5), lambda c, r, rc, rr, b: ell(b * (c - r)) - 0.5 * c),
    "orpo": ("lengths", lambda c, r, rc, rr, b: -c / N + b * ell(odds(c / N) - odds(r / M))),
    "slic": (dict(slic_lambda=0.2), lambda c, r, rc, rr, b: max(0.0, b - c + r) - 0.2 * c),
    "sft": (dict(chosen_lengths=N), lambda c, r, rc, rr, b: -c / N),
}  # fmt: skip
SORTED = {"aot", "aot_unpaired"}


def _exo(q):
    return q * (math.log(q) - math.log(1 - E)) + (1 - q) * (math.log(1 - q) - math.log(E))


def _discopop(h, tau):
    m = sig(h / tau)
    return (1 - m) * ell(h) + m * math.exp(-h)


def own_arguments(name, count):
    own = dict(FORMULAS[name][0]) if isinstance(FORMULAS[name][0], dict) else {"lengths": True}
    if own.pop("lengths", False):
        own |= {"chosen_lengths": N, "rejected_lengths": M}
    return {
        key: torch.full((count,), value, dtype=torch.float64 if "kl" in key else torch.int64)
        if key.endswith("lengths") or key in ("chosen_kl", "rejected_kl") else value
        for key, value in own.items()
    }  # fmt: skip


def pairs(seed=0, count=6):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=g, dtype=torch.float64) * 3 - 12 for _ in range(4)]


def loss_of(name, *data, beta=0.1, **options):
    return PREFERENCE_LOSSES[name](*data, beta, **own_arguments(name, len(data[0])), **options)


def test_every_loss_has_a_formula_here():
    assert set(FORMULAS) | SORTED == set(PREFERENCE_LOSSES)


@pytest.mark.parametrize("name", FORMULAS)
@given(seed=st.integers(0, 10_000), beta=st.floats(0.02, 2))
@settings(max_examples=15, deadline=None)
def test_formula(name, seed, beta):
    data = pairs(seed)
    want = [FORMULAS[name][1](*column, beta) for column in zip(*(t.tolist() for t in data), strict=True)]
    got = loss_of(name, *data, beta=beta, reduction="none")
    close(got, want, torch.float64)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js"])
def test_f_divergences(kind):
    g = {"reverse_kl": lambda s: s, "forward_kl": lambda s: -math.exp(-s), "js": lambda s: math.log(sig(s))}[kind]
    data = pairs(3)
    want = [_f(g)(*column, 0.2) for column in zip(*(t.tolist() for t in data), strict=True)]
    close(PREFERENCE_LOSSES["f_dpo"](*data, 0.2, f_divergence_type=kind, reduction="none"), want, torch.float64)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradcheck(name):
    data = [t.requires_grad_(i < 2) for i, t in enumerate(pairs(1, 4))]
    weight = torch.rand(4, dtype=torch.float64)
    extra = {"batch_margin": 0.8} if name == "beta_dpo" else {}
    own = own_arguments(name, 4) | extra
    assert torch.autograd.gradcheck(
        lambda c, r: PREFERENCE_LOSSES[name](c, r, *data[2:], 0.3, weight=weight, **own), data[:2]
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_mask_is_selection_and_hides_what_is_not_finite(name):
    data = [t.requires_grad_(i < 2) for i, t in enumerate(pairs(6))]
    mask = torch.tensor([True, False, True, True, False, True])
    want = loss_of(name, *(t[mask] for t in data))
    broken = [t.detach().masked_fill(~mask, math.nan).requires_grad_(i < 2) for i, t in enumerate(data)]
    got = loss_of(name, *broken, mask=mask)
    close(got.detach(), want.detach(), torch.float64)
    got.backward()
    for t in broken[:2]:
        assert t.grad is None or torch.equal(t.grad[~mask], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("name", FORMULAS)
def test_mean_sum_none_weight_and_the_empty_batch(name):
    data = pairs(7)
    each = loss_of(name, *data, reduction="none")
    close(loss_of(name, *data), each.mean(), torch.float64)
    close(loss_of(name, *data, reduction="sum"), each.sum(), torch.float64)
    weight = torch.rand(6, dtype=torch.float64)
    close(loss_of(name, *data, weight=weight), (weight * each).sum() / weight.sum(), torch.float64)
    z = torch.zeros(6, requires_grad=True)
    nothing = loss_of(name, z, z, z.detach(), z.detach(), mask=torch.zeros(6, dtype=torch.bool))
    nothing.backward()
    assert nothing == 0 and torch.equal(z.grad, torch.zeros(6))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_far_pairs_stay_finite(name, size):
    far = torch.full((2,), -2e4, requires_grad=True)
    near = torch.full((2,), -2e4 + size).clamp(max=-1e-3).requires_grad_()
    ref = torch.full((2,), -2e4)
    loss = loss_of(name, near, far, ref, ref, beta=1.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(near.grad).all()


@pytest.mark.parametrize("name", [*FORMULAS, *sorted(SORTED)])
def test_half_precision_is_computed_in_float32(name):
    data = [t.to(torch.bfloat16) for t in pairs(8)]
    own = {} if name in SORTED else own_arguments(name, 6)
    own = {k: v.to(torch.bfloat16) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in own.items()}
    got = PREFERENCE_LOSSES[name](*data, 0.1, **own)
    assert got.dtype == torch.float32
    close(got, PREFERENCE_LOSSES[name](*(t.float() for t in data), 0.1, **own))


@pytest.mark.parametrize("name", sorted(SORTED))
def test_aot_compares_sorted_samples(name):
    data = [t.tolist() for t in pairs(9)]
    c, r, rc, rr = data
    if name == "aot":
        better, worse = [a - b for a, b in zip(c, r, strict=True)], [a - b for a, b in zip(rc, rr, strict=True)]
    else:
        better, worse = [a - b for a, b in zip(c, rc, strict=True)], [a - b for a, b in zip(r, rr, strict=True)]
    want = [ell(0.1 * (a - b)) for a, b in zip(sorted(better), sorted(worse), strict=True)]
    close(PREFERENCE_LOSSES[name](*pairs(9), 0.1), sum(want) / 6, torch.float64)
    mask = torch.tensor([True, False, True, True, False, True])
    chosen = PREFERENCE_LOSSES[name](*(t[mask] for t in pairs(9)), 0.1)
    close(PREFERENCE_LOSSES[name](*pairs(9), 0.1, mask=mask), chosen, torch.float64)
    with pytest.raises(TypeError, match="takes no weight"):
        PREFERENCE_LOSSES[name](*pairs(9), 0.1, weight=torch.ones(6))


def test_identities():
    data = pairs(10)
    sigmoid = PREFERENCE_LOSSES["sigmoid"](*data, 0.3)
    close(PREFERENCE_LOSSES["odpo"](*data, 0.3), sigmoid, torch.float64)
    close(PREFERENCE_LOSSES["dpop"](*data, 0.3, dpop_lambda=0.0), sigmoid, torch.float64)
    close(PREFERENCE_LOSSES["f_dpo"](*data, 0.3), sigmoid, torch.float64)
    close(PREFERENCE_LOSSES["robust"](*data, 0.3), sigmoid, torch.float64)
    rewards = [0.3 * (data[i] - data[i + 2]) for i in range(2)]
    close(reward_loss(*rewards), sigmoid, torch.float64)
    close(plackett_luce_loss(torch.stack(rewards, -1)), sigmoid, torch.float64)
    close(dpo_loss(*[data[0], data[1], *[torch.zeros_like(data[0])] * 2], 0.3),
          PREFERENCE_LOSSES["cpo"](*data[:2], beta=0.3, cpo_alpha=0.0), torch.float64)  # fmt: skip


def test_sigmoid_is_logistic_regression_on_margins():
    data = pairs(2)
    p = torch.sigmoid(0.1 * (data[0] - data[2] - data[1] + data[3])).numpy()
    close(dpo_loss(*data), log_loss([1] * 6, [[1 - q, q] for q in p], labels=[0, 1]), torch.float64)


def test_hinge_is_scikit_learns():
    data = pairs(3)
    margins = (0.1 * (data[0] - data[2] - data[1] + data[3])).numpy()
    want = sklearn_hinge([1] * 6 + [-1], [*margins, -2.0]) * 7 / 6  # one settled negative: it wants two classes
    close(dpo_loss(*data, loss_type="hinge"), want, torch.float64)


def test_policy_equal_to_reference_is_log_2():
    z = torch.randn(5)
    close(dpo_loss(z, -z, z, -z), math.log(2))


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "nca_pair"])
def test_index_form_is_the_pair_form(name):
    policy, ref = pairs(4)[:2]
    chosen, rejected = torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5])
    want = dpo_loss(policy[chosen], policy[rejected], ref[chosen], ref[rejected], 0.2, loss_type=name)
    assert torch.equal(dpo_loss(policy, ref, chosen, rejected, 0.2, loss_type=name), want)
    by_name = dict(policy_logps=policy, ref_logps=ref, yw_idx=chosen, yl_idx=rejected, beta=0.2)
    assert torch.equal(dpo_loss(**by_name, loss_type=name), want)


def test_a_mixture_is_the_weighted_sum_of_its_parts():
    data, lengths = pairs(5), torch.full((6,), N)
    parts = [dpo_loss(*data, loss_type=n) for n in ("sigmoid", "bco_pair")]
    parts.append(dpo_loss(*data, loss_type="sft", chosen_lengths=lengths))
    mixed = dpo_loss(
        *data, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], chosen_lengths=lengths
    )
    close(mixed, 0.8 * parts[0] + 0.2 * parts[1] + parts[2], torch.float64)
    with pytest.raises(TypeError, match="none of sigmoid, hinge takes rpo_alpha"):
        dpo_loss(*data, loss_type=["sigmoid", "hinge"], rpo_alpha=1.0)


def test_kto_of_a_pair_is_its_two_answers():
    c, r, rc, rr = pairs(11)
    both = [kto_loss(p, q, torch.full((6,), good), 0.2, kl=0.3) for p, q, good in ((c, rc, True), (r, rr, False))]
    close(PREFERENCE_LOSSES["kto_pair"](c, r, rc, rr, 0.2, kl=0.3), sum(both) / 2, torch.float64)
    with pytest.raises(ValueError, match="labels must be bool"):
        kto_loss(c, rc, torch.ones(6))


def test_plackett_luce_is_the_product_of_choices():
    scores = [[1.0, 0.2, -0.5, 0.3]]
    want = -sum(s - math.log(sum(math.exp(t) for t in scores[0][i:])) for i, s in enumerate(scores[0][:-1]))
    close(plackett_luce_loss(torch.tensor(scores, dtype=torch.float64)), want, torch.float64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(beta=0.0), "beta must be in"),
        (dict(label_smoothing=0.5), "label_smoothing must be in"),
        (dict(loss_type="dpo"), "loss_type 'dpo' is unknown: one of sigmoid"),
        (dict(loss_type="f_dpo", f_divergence_type="kl"), "f_divergence_type must be one of reverse_kl"),
        (dict(loss_weights=[1.0, 2.0]), "loss_weights must have one entry"),
        (dict(mask=torch.ones(2, dtype=torch.bool)), r"mask \(2,\)"),
    ],
)
def test_bad_arguments_are_named(changes, said):
    z = torch.zeros(3)
    with pytest.raises(ValueError, match=said):
        dpo_loss(z, z, z, z, **changes)


def test_what_is_missing_is_named():
    z = torch.zeros(3)
    with pytest.raises(ValueError, match="relative to a reference"):
        PREFERENCE_LOSSES["sigmoid"](z, z, None, None)
    with pytest.raises(ValueError, match=r"policy_chosen \(3,\), policy_rejected \(2,\)"):
        dpo_loss(z, z[:2], z, z)
    with pytest.raises(TypeError, match="chosen_lengths"):
        PREFERENCE_LOSSES["simpo"](z, z)


def test_nan_is_found_on_request():
    with checks(), pytest.raises(ValueError, match=r"policy_chosen\[1\] is nan"):
        dpo_loss(torch.tensor([0.0, math.nan]), *[torch.zeros(2)] * 3)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_signatures_say_what_is_taken(name):
    names = list(inspect.signature(PREFERENCE_LOSSES[name]).parameters)
    assert names[:5] == ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "beta"]
    assert names[-2:] == ["reduction", "mask"] if name in SORTED else names[-3:] == ["reduction", "weight", "mask"]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_length_desensitised_sums(alpha):
    tokens = [[-1.0, -2.0, -3.0], [-0.5], [-4.0, -1.5], [-2.5, -0.1, -0.2, -0.3]]
    public = [1, 1, 2, 2]
    want = [sum(t[:n]) + alpha * sum(t[n:]) for t, n in zip(tokens, public, strict=True)]
    ids = torch.tensor([i for i, t in enumerate(tokens) for _ in t])
    flat = torch.tensor([x for t in tokens for x in t], dtype=torch.float64)
    close(length_desensitized_logps(flat, ids, torch.tensor(public), alpha), want, torch.float64)
