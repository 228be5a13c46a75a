"""Policy gradients against loops in Python floats, exact enumeration, limits; advantages against their definitions."""

import math

import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.losses import (
    POLICY_LOSSES,
    AdaptiveKLController,
    actor_critic_loss,
    gae,
    group_advantages,
    kl_estimate,
    ppo_loss,
    rloo_advantages,
    truncated_importance_weights,
    value_loss,
    whiten,
)  # fmt: skip

IDS = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
N, S = 8, 3


def data(seed=0, spread=0.4):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(N, generator=g, dtype=torch.float64) * 3
    new = old + torch.randn(N, generator=g, dtype=torch.float64) * spread
    return new, old, torch.randn(S, generator=g, dtype=torch.float64)


def clip(x, low, high):
    return min(max(x, low), high)


def surrogate(r, a, low, high):
    return -min(r * a, clip(r, 1 - low, 1 + high) * a)


def per_sequence(values):
    return [[v for v, s in zip(values, IDS.tolist(), strict=True) if s == i] for i in range(S)]


def mean(values):
    return sum(values) / len(values)


def token_losses(new, old, adv, one):
    return [one(math.exp(a - b), adv[s], a) for a, b, s in zip(new, old, IDS.tolist(), strict=True)]


def of_sequences(new, old, adv, one):
    ratios = per_sequence([a - b for a, b in zip(new, old, strict=True)])
    return mean([one(r, adv[s]) for s, r in enumerate(ratios)])


def gmpo(r, a):
    sign = math.copysign(1, a)
    return -a * math.exp(mean([sign * min(sign * x, sign * clip(x, -0.4, 0.4)) for x in r]))


def sapo(r, a, _):
    tau = 1.0 if a > 0 else 1.05
    return -4 / tau / (1 + math.exp(-tau * (r - 1))) * a


def vespo(new, old, adv):
    logs = [sum(x) for x in per_sequence([a - b for a, b in zip(new, old, strict=True)])]
    k, decay = zip(*[(2.0, 3.0) if a >= 0 else (3.0, 2.0) for a in adv], strict=True)
    phi = [math.exp(d) * math.exp(w) ** p * math.exp(-d * math.exp(w)) for w, p, d in zip(logs, k, decay, strict=True)]
    return mean([-phi[s] * adv[s] * a for a, s in zip(new, IDS.tolist(), strict=True)])


# name: (own arguments, formula of (new, old, advantages) lists)
CASES = {
    "ppo": ({}, lambda n, o, a: mean(token_losses(n, o, a, lambda r, A, _: surrogate(r, A, 0.2, 0.2)))),
    "grpo": ({}, lambda n, o, a: mean([mean(x) for x in per_sequence(token_losses(n, o, a, lambda r, A, _: surrogate(r, A, 0.2, 0.2)))])),
    "dr_grpo": (dict(max_completion_length=5), lambda n, o, a: sum(token_losses(n, o, a, lambda r, A, _: surrogate(r, A, 0.2, 0.2))) / (S * 5)),
    "dapo": ({}, lambda n, o, a: mean(token_losses(n, o, a, lambda r, A, _: surrogate(r, A, 0.2, 0.28)))),
    "bnpo": ({}, lambda n, o, a: mean(token_losses(n, o, a, lambda r, A, _: surrogate(r, A, 0.2, 0.2)))),
    "luspo": ({}, lambda n, o, a: sum(token_losses(n, o, a, lambda r, A, _: surrogate(r, A, 0.2, 0.2))) / S),
    "gspo": (dict(epsilon=0.05, epsilon_high=0.1), lambda n, o, a: of_sequences(n, o, a, lambda r, A: surrogate(math.exp(mean(r)), A, 0.05, 0.1))),
    "gmpo": ({}, lambda n, o, a: of_sequences(n, o, a, gmpo)),
    "cispo": (dict(max_ratio=1.2), lambda n, o, a: mean(token_losses(n, o, a, lambda r, A, lp: -min(r, 1.2) * A * lp))),
    "sapo": ({}, lambda n, o, a: mean([mean(x) for x in per_sequence(token_losses(n, o, a, sapo))])),
    "vespo": ({}, vespo),
    "reinforce": ({}, lambda n, o, a: mean(token_losses(n, o, a, lambda r, A, lp: -A * lp))),
    "rloo": ({}, lambda n, o, a: sum(token_losses(n, o, a, lambda r, A, lp: -A * lp)) / S),
}  # fmt: skip


def run(name, new, old, advantages, **options):
    return POLICY_LOSSES[name](new, old, advantages, options.pop("sequence", IDS), **CASES[name][0], **options)


def test_every_loss_has_a_formula_here():
    assert set(CASES) == set(POLICY_LOSSES)


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_formula(name, seed):
    new, old, advantages = data(seed)
    close(
        run(name, new, old, advantages), CASES[name][1](new.tolist(), old.tolist(), advantages.tolist()), torch.float64
    )
    close(run(name, new, old, advantages[IDS]), run(name, new, old, advantages), torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_the_first_step_has_the_gradient_of_reinforce(name):
    """At ratio 1 every member goes along A * grad log pi, each with its own normalisation."""
    new, _, advantages = data(1)
    new.requires_grad_()
    (got,) = torch.autograd.grad(run(name, new, new.detach(), advantages), new)
    lengths = torch.bincount(IDS)[IDS].double()
    scale = {"grpo": 1 / (S * lengths), "gspo": 1 / (S * lengths), "gmpo": 1 / (S * lengths), "sapo": 1 / (S * lengths),
             "dr_grpo": 1 / (S * 5), "luspo": 1 / S, "rloo": 1 / S}.get(name, 1 / N)  # fmt: skip
    close(got, -advantages[IDS] * scale, torch.float64)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("cispo", "vespo")])
def test_gradcheck(name):
    new, old, advantages = data(2)
    assert torch.autograd.gradcheck(lambda x: run(name, x, old, advantages), new.requires_grad_())


def test_gradient_of_cispo_holds_the_weight_constant():
    new, old, advantages = data(3)
    new.requires_grad_()
    (got,) = torch.autograd.grad(run("cispo", new, old, advantages), new)
    close(got, -(new - old).exp().detach().clamp(max=1.2) * advantages[IDS] / N, torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_a_mask_deletes_tokens_and_what_they_hold(name):
    new, old, advantages = data(4)
    mask = torch.tensor([True, False, True, False, True, True, False, True])  # sequence 1 has nothing left
    kept = torch.tensor([0, 0, 1, 1, 1])
    want = run(name, new[mask], old[mask], advantages[[0, 2]], sequence=kept)
    hidden = new.masked_fill(~mask, math.nan).requires_grad_()
    got = run(name, hidden, old, advantages, mask=mask)
    got.backward()
    # Dr. GRPO and the others divide by sequences that have a token.
    close(got.detach(), want, torch.float64)
    assert torch.isfinite(hidden.grad).all()
    nothing = run(name, new.requires_grad_(), old, advantages, mask=mask & False)
    nothing.backward()
    assert nothing == 0


@pytest.mark.parametrize("name", CASES)
def test_far_ratios_stay_finite_and_bfloat16_is_float32(name):
    new, old, advantages = data(5)
    far = (old + torch.tensor([1e4, -1e4] * 4, dtype=torch.float64)).float().requires_grad_()
    loss = run(name, far, old.float(), advantages.float())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(far.grad).all()
    low = [t.bfloat16() for t in (new, old, advantages)]
    assert run(name, *low).dtype == torch.float32
    close(run(name, *low), run(name, *(t.float() for t in low)))


@pytest.mark.parametrize("name", CASES)
def test_weights_scale_each_token(name):
    new, old, advantages = data(6)
    one = torch.ones(N, dtype=torch.float64)
    close(run(name, new, old, advantages, weight=one), run(name, new, old, advantages), torch.float64)
    close(run(name, new, old, advantages, weight=2 * one), 2 * run(name, new, old, advantages), torch.float64)


def test_identities():
    new, old, advantages = data(7)
    close(run("dapo", new, old, advantages, epsilon_high=0.2), run("bnpo", new, old, advantages), torch.float64)
    close(run("bnpo", new, old, advantages), ppo_loss(new, old, advantages[IDS]), torch.float64)
    single = torch.arange(N)
    close(run("gspo", new, old, advantages[IDS], sequence=single), ppo_loss(new, old, advantages[IDS], 0.05, clip_ratio_high=0.1), torch.float64)  # fmt: skip


def test_grpo_adds_kl_to_the_reference():
    new, old, advantages = data(8)
    ref = old - 0.1
    kl = mean([mean(x) for x in per_sequence((torch.exp(ref - new) - 1 - (ref - new)).tolist())])
    close(
        run("grpo", new, old, advantages, ref_logps=ref, beta=0.3),
        run("grpo", new, old, advantages) + 0.3 * kl,
        torch.float64,
    )


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 2.0, 5.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_ppo_in_its_textbook_form(ratio, advantage):
    log_probs, old_log_probs = torch.tensor([math.log(ratio)], requires_grad=True), torch.zeros(1)
    loss = ppo_loss(log_probs, old_log_probs, torch.tensor([advantage]), clip_ratio=0.2)
    close(loss.detach(), surrogate(ratio, advantage, 0.2, 0.2))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    beyond = ratio > 1.2 if advantage > 0 else ratio < 0.8
    close(gradient, [0.0 if beyond else -ratio * advantage])
    dual = ppo_loss(log_probs, old_log_probs, torch.tensor([advantage]), dual_clip=3.0)
    close(dual.detach(), min(surrogate(ratio, advantage, 0.2, 0.2), -3 * advantage) if advantage < 0 else loss.detach())


def test_ppo_of_a_padded_grid_is_that_of_its_tokens():
    new, old, _ = data(9)
    advantages = torch.linspace(-1, 1, N, dtype=torch.float64)
    grid = [torch.nn.functional.pad(t, (0, 4), value=math.nan).view(3, 4) for t in (new, old, advantages)]
    mask = (torch.arange(12) < N).view(3, 4)
    close(ppo_loss(*grid, mask=mask), ppo_loss(new, old, advantages), torch.float64)


def test_value_loss():
    v, old, returns = torch.tensor([1.0, 0.1, -3.0]), torch.zeros(3), torch.tensor([2.0, 2.0, -0.1])
    want = [
        max((a - r) ** 2, (clip(a, -0.2, 0.2) - r) ** 2) / 2 for a, r in zip(v.tolist(), returns.tolist(), strict=True)
    ]
    close(value_loss(v, old, returns, reduction="none"), want)
    close(value_loss(v, old, returns, None), ((v - returns) ** 2).mean() / 2)


def test_actor_critic_gradients():
    logps, values, returns, entropy = (torch.randn(5, dtype=torch.float64, requires_grad=i != 2) for i in range(4))
    loss = actor_critic_loss(logps, values, returns, entropy, vf_coef=0.3, entropy_coef=0.01, reduction="sum")
    loss.backward()
    close(logps.grad, -(returns - values).detach(), torch.float64)
    close(values.grad, -0.6 * (returns - values).detach(), torch.float64)
    close(entropy.grad, torch.full((5,), -0.01), torch.float64)


def test_kl_estimates_by_enumeration():
    """Over a six-token policy: expected values, and whose gradient is the KL's."""
    g = torch.Generator().manual_seed(0)
    z, ref = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    logps, ref_logps = z.log_softmax(0), ref.log_softmax(0)
    p = logps.exp().detach()
    kl = (logps.exp() * (logps - ref_logps)).sum()
    for kind in ("k1", "k3"):
        close((p * kl_estimate(logps, ref_logps, kind)).sum().detach(), kl.detach(), torch.float64)
    (want,) = torch.autograd.grad(kl, z, retain_graph=True)
    gradient = {
        kind: torch.autograd.grad((p * kl_estimate(logps, ref_logps, kind)).sum(), z, retain_graph=True)[0]
        for kind in ("k1", "k2", "k3")
    }
    close(gradient["k2"], want, torch.float64)
    close(gradient["k1"], torch.zeros(6), torch.float64)
    (forward,) = torch.autograd.grad((ref_logps.exp() * (ref_logps - logps)).sum(), z)
    close(gradient["k3"], forward, torch.float64)


@given(seed=st.integers(0, 10_000), gamma=st.floats(0, 1), lam=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_gae_is_the_double_sum_over_tokens_that_count(seed, gamma, lam):
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(2, 7, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 7, generator=g) < 0.7
    advantages, returns = gae(rewards, values.masked_fill(~mask, math.nan), gamma, lam, mask=mask)
    for row in range(2):
        kept = mask[row].nonzero().flatten().tolist()
        r, v = rewards[row, kept].tolist(), [*values[row, kept].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        want = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(r))) for t in range(len(r))]
        close(advantages[row, kept], torch.tensor(want, dtype=torch.float64), torch.float64)
        close(returns[row, kept], advantages[row, kept] + values[row, kept], torch.float64)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_gae_limits():
    rewards, values = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    close(gae(rewards, values, 1.0, 1.0)[1], to_go, torch.float64)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    close(gae(rewards, values, 0.9, 0.0)[0], rewards + 0.9 * following - values, torch.float64)


def test_whiten():
    x = torch.randn(4, 5, dtype=torch.float64) * 3 + 7
    mask = torch.rand(4, 5) < 0.7
    mask[0, :2] = True
    w = whiten(x.masked_fill(~mask, math.nan), mask=mask, eps=0.0)
    close(w[mask].mean(), 0.0, torch.float64)
    close(w[mask].var(unbiased=False), 1.0, torch.float64)
    scaled = whiten(x, mask=mask, shift_mean=False, eps=0.0)
    close(scaled[mask].mean(), x[mask].mean(), torch.float64)
    assert (w[~mask] == 0).all() and torch.isfinite(whiten(torch.ones(3))).all()


def test_group_and_leave_one_out_advantages():
    rewards = torch.tensor([1.0, 4.0, 2.0, 5.0, 5.0, math.nan, 3.0], dtype=torch.float64)
    group = torch.tensor([7, 7, 7, 2, 2, 9, 9])
    r = [1.0, 4.0, 2.0]
    m, sd = sum(r) / 3, torch.tensor(r).double().std().item()
    got = group_advantages(rewards, group)
    close(got[:3], [(x - m) / (sd + 1e-4) for x in r], torch.float64)
    assert got[3:].tolist() == [0, 0, 0, 0]  # equal rewards; a reward that could not be had, and its only partner
    loo = rloo_advantages(rewards, group)
    close(loo[:3], [1 - 3, 4 - 1.5, 2 - 2.5], torch.float64)
    assert loo[3:].tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="group 1 has one completion"):
        group_advantages(torch.ones(3), torch.tensor([0, 0, 1]))


def test_truncated_importance_weights():
    old, sampled = torch.tensor([0.0, -1.0, -1.0], requires_grad=True), torch.tensor([-3.0, -1.0, -0.5])
    weights = truncated_importance_weights(old, sampled)
    close(weights, [2.0, 1.0, math.exp(-0.5)])
    assert not weights.requires_grad
    close(truncated_importance_weights(old, sampled, beyond="zero"), [0.0, 1.0, math.exp(-0.5)])


def test_adaptive_kl_controller_follows_the_papers_rule():
    controller = AdaptiveKLController(0.2, target=6.0, horizon=1000)
    for kl, n in ((3.0, 64), (6.6, 64), (60.0, 128)):
        want = controller.value * (1 + clip(kl / 6 - 1, -0.2, 0.2) * n / 1000)
        assert controller.update(kl, n) == pytest.approx(want)


@pytest.mark.parametrize("name", CASES)
def test_a_bandit_finds_its_best_arm(name):
    torch.manual_seed(0)
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    for _ in range(60):
        actions = torch.multinomial(logits.softmax(0).detach(), 64, replacement=True)
        rewards = (actions == 2).float() + 0.3 * (actions == 1).float()
        logps = logits.log_softmax(0)[actions]
        advantages = rewards - rewards.mean()
        own = {**CASES[name][0], **({"max_completion_length": 1} if name == "dr_grpo" else {})}
        loss = POLICY_LOSSES[name](logps, logps.detach(), advantages, torch.arange(64), **own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.softmax(0)[2] > 0.9


def test_mistakes_are_named():
    new, old, advantages = data()
    with pytest.raises(ValueError, match="logps must be flat"):
        run("grpo", new.view(2, 4), old, advantages)
    with pytest.raises(ValueError, match=r"logps \(8,\), advantages \(5,\)"):
        run("grpo", new, old, torch.zeros(5))
    with pytest.raises(ValueError, match="epsilon must be in"):
        run("dapo", new, old, advantages, epsilon=0.0)
    with pytest.raises(TypeError, match="unknown argument 'epslon'"):
        run("dapo", new, old, advantages, epslon=0.1)
    with pytest.raises(ValueError, match='kind must be "k1"'):
        kl_estimate(new, old, "k4")


@pytest.mark.parametrize("name", ["grpo", "dapo", "bnpo", "luspo", "dr_grpo"])
def test_delta_bounds_the_ratio_where_the_advantage_is_negative(name):
    """TRL's two-sided clip: without it the loss of a bad token grows with its ratio for ever."""
    own = CASES[name][0]
    new, old, advantages = torch.tensor([0.0]), torch.tensor([-2.0]), torch.tensor([-1.0])
    run_one = lambda **o: float(POLICY_LOSSES[name](new, old, advantages, torch.tensor([0]), **own, **o))  # noqa: E731
    scale = 1 / own.get("max_completion_length", 1)
    assert run_one() == pytest.approx(math.exp(2) * scale)
    assert run_one(delta=3.0) == pytest.approx(3 * scale)
    assert run_one(delta=9.0) == run_one()
