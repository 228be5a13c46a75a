"""The log-prob core against autograd's numerical gradient and the dense formula."""

import pytest
import torch
from conftest import ARCHITECTURES, close, tiny_model
from torch.autograd import gradcheck

from rlhf.kernels.recompute import fewer_activations
from rlhf.logprobs import Head, Scores, Targets, TokenLoss, model_scores, score, verified_settings


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradcheck(mode, entropy, softcap):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=g, dtype=torch.double, requires_grad=True)
    weight = torch.randn(11, 5, generator=g, dtype=torch.double, requires_grad=True)
    bias = torch.randn(11, generator=g, dtype=torch.double, requires_grad=True)
    targets = Targets(torch.tensor([0, 1, 1, 4, 6]), torch.tensor([3, 4, 0, 10, 2]), torch.tensor([0, 0, 1, 1, 2]))

    def run(hidden, weight, bias):
        scores = score(hidden, Head(weight, bias, 1.7, softcap, 0.6), targets, entropy=entropy, mode=mode, chunk_size=2)
        return scores[:2] if entropy else scores.logps

    assert gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_temperature_divides_what_enters_the_softmax(softcap):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = torch.randn(4, 5, generator=g), torch.randn(11, 5, generator=g), torch.randn(11, generator=g)
    targets = Targets(torch.arange(4), torch.tensor([3, 0, 10, 2]), torch.zeros(4, dtype=torch.int64))
    logits = (hidden @ weight.T + bias) * 1.7
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    want = (logits / 0.6).log_softmax(-1)
    scores = score(hidden, Head(weight, bias, 1.7, softcap, 0.6), targets, entropy=True)
    close(scores.logps, want.gather(1, targets.token[:, None])[:, 0])
    close(scores.entropy, -(want.exp() * want).sum(-1))
    close(Head(weight, bias, 1.7, softcap, 0.6).logits(hidden), logits / 0.6)


def clipped(scores, advantages, old):
    """A loss that is local to a token and not linear in its score."""
    ratio = (scores.logps - old).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return loss if scores.entropy is None else loss - 0.3 * scores.entropy**2


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradcheck_of_a_local_loss(entropy, softcap):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=g, dtype=torch.double, requires_grad=True)
    weight = torch.randn(11, 5, generator=g, dtype=torch.double, requires_grad=True)
    bias = torch.randn(11, generator=g, dtype=torch.double, requires_grad=True)
    targets = Targets(torch.tensor([0, 1, 1, 4, 6]), torch.tensor([3, 4, 0, 10, 2]), torch.tensor([0, 0, 1, 1, 2]))
    per_token = torch.linspace(-1, 1, 5, dtype=torch.double), torch.full((5,), -2.4, dtype=torch.double)

    def run(hidden, weight, bias):
        head = Head(weight, bias, 1.7, softcap, 0.6)
        return score(
            hidden, head, targets, entropy=entropy, chunk_size=2, objective=TokenLoss(clipped, per_token)
        ).loss  # fmt: skip

    # The backward pass scales its results in place, so each is called once.
    for output in (torch.tensor(1.0), torch.tensor(-0.3)):
        got = torch.autograd.grad(run(hidden, weight, bias) * output, (hidden, weight, bias))
        want = torch.autograd.grad(
            clipped(
                score(hidden, Head(weight, bias, 1.7, softcap, 0.6), targets, entropy=entropy, mode="save"), *per_token
            ).sum()
            * output,
            (hidden, weight, bias),
        )  # the other mode has its gradcheck above
        for a, b in zip(got, want, strict=True):
            close(a, b, torch.float64)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradcheck_of_unit(softcap):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=g, dtype=torch.double, requires_grad=True)
    weight, bias = (torch.randn(*shape, generator=g, dtype=torch.double) for shape in ((11, 5), (11,)))
    targets = Targets(torch.tensor([0, 1, 1, 4, 6]), torch.tensor([3, 4, 0, 10, 2]), torch.tensor([0, 0, 1, 1, 2]))
    head = Head(weight, bias, 1.7, softcap, 0.6)
    assert gradcheck(lambda h: score(h, head, targets, mode="unit", chunk_size=2).logps, (hidden,))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_agree_with_their_own_logits(name):
    model = tiny_model(name).eval()
    assert verified_settings(model) is not None
    ids = torch.randint(1, 330, (2, 12), generator=torch.Generator().manual_seed(0))
    dense = model(ids).logits.double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).view(-1)
    close(model_scores(model, Targets.from_labels(ids), input_ids=ids).logps.detach(), dense.detach())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_head_is_verified_outside_autocast(weights):
    with torch.autocast("cpu", torch.bfloat16):
        assert verified_settings(tiny_model().to(weights)) is not None


def problem(rows=40, vocabulary=50, size=8, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, size, generator=g, dtype=dtype, requires_grad=True)
    source = torch.randint(rows, (33,), generator=g)  # some rows several times, as under a shared prompt
    token = torch.randint(vocabulary, (33,), generator=g)
    return hidden, Head(weight), Targets(source, token, torch.zeros_like(token))


def dense(hidden, head, targets):
    """(logps, entropy) by the plain formula, from all the logits at once."""
    logits = head.logits(hidden).log_softmax(-1)[targets.source]
    return logits.gather(1, targets.token[:, None]).squeeze(1), -(logits.exp() * logits).sum(-1)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("mode", ["auto", "save", "recompute"])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 33, 100])
def test_any_mode_and_chunk_size_is_the_dense_formula(mode, chunk_size, entropy):
    hidden, head, targets = problem()
    weights = torch.linspace(-1, 1, len(targets))

    def gradients(logps, entropies):
        total = (weights * logps).sum() + ((1 + weights) * entropies).sum() if entropy else (weights * logps).sum()
        return torch.autograd.grad(total, (hidden, head.weight))

    want_logps, want_entropy = dense(hidden, head, targets)
    scores = score(hidden, head, targets, mode=mode, chunk_size=chunk_size, entropy=entropy)
    close(scores.logps.detach(), want_logps.detach())
    for got, want in zip(gradients(*scores[:2]), gradients(want_logps, want_entropy), strict=True):
        close(got, want)


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 33, 100])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_local_loss_is_the_dense_formula_at_any_chunk_size(chunk_size, frozen):
    hidden, head, targets = problem()
    if frozen:
        head = Head(head.weight.detach())
    inputs = (hidden,) if frozen else (hidden, head.weight)
    per_token = torch.linspace(-1, 1, len(targets)), torch.full((len(targets),), -4.0)
    scores = score(
        hidden, head, targets, entropy=True, chunk_size=chunk_size, objective=TokenLoss(clipped, per_token)
    )  # fmt: skip
    logps, entropy = dense(hidden, head, targets)
    want = clipped(Scores(logps, entropy), *per_token).sum()
    close(scores.loss.detach(), want.detach())
    close(scores.logps, logps.detach())
    close(scores.entropy, entropy.detach())
    for a, b in zip(torch.autograd.grad(3 * scores.loss, inputs), torch.autograd.grad(3 * want, inputs), strict=True):
        close(a, b)


def test_a_local_loss_of_no_tokens_is_a_zero_with_zero_gradients():
    hidden, head, _ = problem()
    none = torch.zeros(0, dtype=torch.int64)
    loss = score(hidden, head, Targets(none, none, none), objective=TokenLoss(lambda scores: -scores.logps)).loss
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not head.weight.grad.any()


COUNTED = [("none", 1), ("local", 3), ("save", 3), ("recompute", 4), ("local frozen", 2), ("unit frozen", 2)]


PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise")


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize(("mode", "products"), [*COUNTED, ("save frozen", 2), ("recompute frozen", 3)])
def test_the_profiler_counts_the_products_of_the_head(mode, products, onednn, monkeypatch):
    monkeypatch.setattr("rlhf.kernels.matmul.onednn_is_faster", lambda: onednn)
    monkeypatch.setattr("rlhf.kernels.matmul.SMALL", 1)
    hidden, head, targets = problem(rows=64)
    vocabulary = head.weight.size(0)
    if "frozen" in mode:
        mode, head = mode.split()[0], Head(head.weight.detach())
    with torch.profiler.profile(record_shapes=True) as profile:
        if mode == "none":
            with torch.no_grad():
                score(hidden, head, targets, chunk_size=len(targets))
        elif mode == "local":
            score(
                hidden, head, targets, chunk_size=len(targets), objective=TokenLoss(lambda s: -s.logps)
            ).loss.backward()
        else:
            score(hidden, head, targets, mode=mode, chunk_size=len(targets)).logps.sum().backward()
    large = [
        event
        for event in profile.events()
        if event.name in PRODUCTS and any(vocabulary in shape for shape in event.input_shapes)
    ]
    assert len(large) == products, [event.name for event in large]


def test_a_frozen_head_costs_one_product_less_and_gets_no_gradient():
    hidden, head, targets = problem()
    frozen = Head(head.weight.detach())
    with torch.profiler.profile() as profile:
        score(hidden, frozen, targets, mode="save", chunk_size=len(targets)).logps.sum().backward()
    assert sum(event.name in PRODUCTS for event in profile.events()) == 2
    assert hidden.grad is not None and frozen.weight.grad is None


def test_never_more_than_a_chunk_of_logits():
    hidden, head, _ = problem(rows=4096, vocabulary=4000)
    many = Targets(torch.arange(4096), torch.zeros(4096, dtype=torch.int64), torch.zeros(4096, dtype=torch.int64))
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        score(hidden, head, many, chunk_size=64)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 3 * 64 * 4000 * 4  # a few chunks; all the logits would be 64 times as much


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_float32_out(dtype):
    hidden, head, targets = problem(dtype=torch.float32)
    low = hidden.detach().to(dtype).requires_grad_()
    low_head = Head(head.weight.detach().to(dtype).requires_grad_())
    scores = score(low, low_head, targets)
    assert scores.logps.dtype == torch.float32
    want, _ = dense(low.detach().float(), Head(low_head.weight.detach().float()), targets)
    close(scores.logps.detach(), want)
    scores.logps.sum().backward()
    assert low.grad.dtype == dtype and low_head.weight.grad.dtype == dtype


def test_logps_are_trls_chunked_ones():
    trl = pytest.importorskip("trl.trainer.utils")
    hidden, head, targets = problem()
    want = trl.selective_log_softmax(head.logits(hidden)[targets.source], targets.token)
    close(score(hidden, head, targets, chunk_size=5).logps.detach(), want.detach())


def test_unit_is_refused_where_the_head_learns():
    hidden, head, targets = problem()
    with pytest.raises(ValueError, match="unit"):
        score(hidden, head, targets, mode="unit")


def test_bad_input_is_named():
    hidden, head, targets = problem()
    with pytest.raises(ValueError, match="hidden states have size 7, the head 8"):
        score(hidden[:, :7], head, targets)
    with pytest.raises(ValueError, match=r"target token 50 is outside the vocabulary \[0, 50\)"):
        score(hidden, head, Targets(targets.source, targets.token * 0 + 50, targets.sequence))


class Scaled(torch.nn.Linear):
    """A head that no config describes."""

    def forward(self, x):
        return super().forward(x) * 1.5


@pytest.mark.parametrize("entropy", [False, True])
def test_a_head_that_fails_the_check_takes_the_exact_fallback(entropy, caplog):
    model = tiny_model().eval()
    odd = Scaled(32, 330, bias=False)
    odd.weight = model.lm_head.weight
    model.lm_head = odd
    ids = torch.randint(1, 330, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = -100
    targets = Targets.from_labels(labels)
    scores = model_scores(model, targets, entropy=entropy, input_ids=ids)
    assert verified_settings(model) is None
    assert sum("using the model's own head" in message for message in caplog.messages) == 1
    logits = model(ids).logits.log_softmax(-1).view(-1, 330)[targets.source]
    close(scores.logps.detach(), logits.gather(1, targets.token[:, None]).squeeze(1).detach())
    if entropy:
        close(scores.entropy.detach(), -(logits.exp() * logits).sum(-1).detach())


def test_an_adapter_on_the_head_is_not_passed_over():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).eval()
    ids = torch.randint(1, 330, (2, 12), generator=torch.Generator().manual_seed(0))
    want = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).view(-1)
    scores = model_scores(model, Targets.from_labels(ids), input_ids=ids)
    close(scores.logps.detach(), want.detach())
    scores.logps.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora" in n)


def test_an_adapter_that_comes_to_the_head_later_is_seen(caplog):
    """The head was checked before, in an earlier run of the same process."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model().eval()
    assert verified_settings(model) is not None
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).eval()
    ids = torch.arange(3, 15)[None]
    want = adapted(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).view(-1)
    close(model_scores(adapted, Targets.from_labels(ids), input_ids=ids).logps.detach(), want.detach())
    assert caplog.text.count("an adapter sits on the head") == 1


def test_a_loss_is_not_differentiated_twice():
    """Its gradient is scaled in place: a second time would scale it again, in silence."""
    head, hidden = Head(torch.randn(9, 4, requires_grad=True)), torch.randn(3, 4)
    targets = Targets(torch.arange(3), torch.arange(3), torch.zeros(3, dtype=torch.int64))
    with fewer_activations():  # without its hooks, autograd itself sees the change
        loss = score(hidden, head, targets, objective=TokenLoss(lambda scores: -scores.logps)).loss / 3
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


@pytest.mark.parametrize("flat", [True, False])
def test_the_entropy_of_a_large_vocabulary(flat):
    """50,000 terms: added one after another in float32, they lose 4e-4 of the sum where all are alike."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 8, generator=g), torch.randn(50_000, 8, generator=g) * (0.0 if flat else 1.0)
    targets = Targets(torch.arange(4), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    found = score(hidden, Head(weight), targets, entropy=True)
    logps = (hidden.double() @ weight.double().T).log_softmax(-1)
    close(found.entropy, -(logps.exp() * logps).sum(-1))


@pytest.mark.parametrize("mode", ["recompute", "save"])
def test_a_backward_pass_under_autocast_is_that_without(mode):
    gradients = []
    for autocast in (False, True):
        g = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(shape, generator=g).requires_grad_() for shape in ((5, 8), (30, 8)))
        targets = Targets(torch.arange(5), torch.arange(5), torch.zeros(5, dtype=torch.int64))
        logps = score(hidden, Head(weight), targets, mode=mode, chunk_size=2).logps
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            gradients.append(torch.autograd.grad(logps.square().sum(), [hidden, weight]))
    assert all(map(torch.equal, *gradients))
