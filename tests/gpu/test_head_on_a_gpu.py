"""The log-prob core on a GPU against float64: every mode, every precision, with and without a cap on the logits."""

import pytest
import torch

from rlhf.logprobs import Head, Targets, TokenLoss, score

pytestmark = pytest.mark.gpu
TOKENS, HIDDEN, VOCABULARY = 150, 64, 3001
# Log-probs absolute, gradients relative to their norm. Half precision rounds inputs of products and the gradients.
TOLERANCES = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-3, 1e-2), torch.float16: (2e-3, 1e-2)}
MODES = ["loss of tokens", "recompute", "save", "entropy", "frozen head", "no gradient"]


def problem(dtype, device):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(TOKENS, HIDDEN, generator=g).to(dtype)
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=g) * 3 / HIDDEN**0.5).to(dtype)
    tokens = torch.randint(VOCABULARY, (TOKENS,), generator=g)
    targets = Targets(torch.arange(TOKENS), tokens, torch.zeros(TOKENS, dtype=torch.int64), 1)
    return rows.to(device), weight.to(device), targets.to(device), torch.rand(TOKENS, generator=g).to(device)


def exact(rows, weight, targets, factors, settings, entropy):
    """Log-probs, and gradients of their weighted sum, in float64 on the CPU."""
    rows, weight = (tensor.detach().cpu().double().requires_grad_() for tensor in (rows, weight))
    logps = Head(weight, None, *settings).logits(rows).log_softmax(-1)
    own = logps.gather(1, targets.token.cpu()[:, None]).squeeze(1)
    loss = own - 0.5 * (logps.exp() * logps).sum(-1) if entropy else own
    return own, torch.autograd.grad((loss * factors.cpu()).sum(), [rows, weight])


def computed(mode, rows, weight, targets, factors, settings):
    rows, weight = (tensor.clone().requires_grad_() for tensor in (rows, weight))
    options = {"recompute": {"mode": "recompute"}, "save": {"mode": "save"}, "entropy": {"entropy": True}}.get(mode, {})
    if mode == "loss of tokens":
        options = {"objective": TokenLoss(lambda scores, factor: scores.logps * factor, (factors,))}
    head = Head(weight.detach() if mode == "frozen head" else weight, None, *settings)
    with torch.set_grad_enabled(mode != "no gradient"):
        scores = score(rows, head, targets, **options)
    if mode == "no gradient":
        return scores.logps, []
    loss = scores.loss if scores.loss is not None else (scores.logps * factors).sum()
    if mode == "entropy":
        loss = loss + 0.5 * (scores.entropy * factors).sum()
    loss.backward()
    return scores.logps, [tensor.grad for tensor in (rows, weight) if tensor.grad is not None]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("settings", [(1.0, None, 1.0), (0.25, 30.0, 0.7)], ids=["plain", "scaled and capped"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_the_formula_in_float64(mode, settings, dtype, gpu):
    inputs = problem(dtype, gpu)
    logps, gradients = computed(mode, *inputs, settings)
    want, wanted_gradients = exact(*inputs, settings, mode == "entropy")
    logp_tolerance, gradient_tolerance = TOLERANCES[dtype]
    assert (logps.detach().cpu().double() - want.detach()).abs().max() < logp_tolerance
    assert len(gradients) == {"no gradient": 0, "frozen head": 1}.get(mode, 2)
    for got, wanted in zip(gradients, wanted_gradients, strict=False):
        assert got.dtype == dtype
        assert (got.cpu().double() - wanted).norm() < gradient_tolerance * wanted.norm()
