"""LoRA layers in fewer passes: the same figures as PEFT's own, and PEFT's own where the formula is another."""

import pytest
import torch
from conftest import close
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLayer
from torch import nn

from rlhf.kernels import matmul as products
from rlhf.kernels.linear import Linear, LoraLinear, speed_up_linear


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"], autouse=True)
def library(request, monkeypatch):
    """Both ways, whichever is the faster one here."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    monkeypatch.setattr("rlhf.kernels.linear.onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(products, "SMALL", 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 40), (7, 40), (1, 40), (0, 40)])
def test_a_linear_layer_against_float64(shape, bias):
    g = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(40, 24, bias=bias))
    twin = nn.Sequential(nn.Linear(40, 24, bias=bias, dtype=torch.float64))
    twin.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    speed_up_linear(layer)
    x = torch.randn(shape, generator=g).requires_grad_()
    y = x.detach().double().requires_grad_()
    upstream = torch.randn(*shape[:-1], 24, generator=g)
    for scale in (upstream, upstream[..., :1].expand_as(upstream)):  # an expanded gradient has strides of 0
        ours, theirs = layer(x), twin(y)
        close(ours, theirs.float())
        (ours * scale).sum().backward()
        (theirs * scale.double()).sum().backward()
    ours_sum, theirs_sum = layer(x).sum(), twin(y).sum()
    ours_sum.backward()
    theirs_sum.backward()
    close(x.grad, y.grad.float())
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad.float())


def test_products_of_any_strides():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 20, generator=g), torch.randn(20, 50, generator=g)
    want = (a.double() @ b.double()).float()
    for left in (a, a.T.contiguous().T, torch.stack((a, a), 2)[:, :, 0], a[:1].expand(30, 20)):
        for right in (b, b.T.contiguous().T, torch.stack((b, b), 2)[:, :, 1]):
            expected = want if left is not None and left.stride(0) else want[:1].expand(30, 50)
            close(products.product(left, right), expected)
    out = torch.empty(30, 50)
    close(products.product(a, b, out), want)
    close(products.product(a.double(), b.double()), a.double() @ b.double())  # float64 stays with torch


def test_a_frozen_layer_gets_no_gradient():
    layer = nn.Sequential(nn.Linear(8, 4))
    layer.requires_grad_(False)
    speed_up_linear(layer)
    x = torch.ones(2, 8, requires_grad=True)
    layer(x).sum().backward()
    close(x.grad, layer[0].weight.sum(0).expand(2, 8))
    assert layer[0].weight.grad is None and layer[0].bias.grad is None


def test_gradients():
    g = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    )
    for tensor in (x, a, b):
        tensor.requires_grad_()
    close(LoraLinear.apply(x, weight, bias, a, b, 0.7), x @ weight.T + bias + 0.7 * (x @ a.T) @ b.T)
    torch.autograd.gradcheck(lambda x, a, b: LoraLinear.apply(x, weight, bias, a, b, 0.7), (x, a, b))
    torch.autograd.gradcheck(Linear.apply, (x, weight.clone().requires_grad_(), bias.clone().requires_grad_()))
    torch.autograd.gradcheck(lambda a, b: LoraLinear.apply(x.detach(), weight, None, a, b, 2.0), (a, b))


def layers(**options):
    """One LoRA layer twice, with the same random weights: ours, and PEFT's own."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4))
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **options)
        made.append(get_peft_model(model, config))
    speed_up_linear(made[0])
    return made


def outcome(model, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # dropout
    model(x).square().sum().backward()
    return model(x.detach()), x.grad, [p.grad for p in model.parameters() if p.grad is not None]


def calls_of_ours(monkeypatch):
    calls = []
    apply = LoraLinear.apply
    monkeypatch.setattr(LoraLinear, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


def off(model):
    model.base_model.disable_adapter_layers()


def two(model):
    torch.manual_seed(2)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def learned_base(model):
    model.get_base_model()[0].base_layer.requires_grad_(True)


@pytest.mark.parametrize(
    ("options", "prepare", "own"),
    [
        ({}, None, True),
        (dict(use_rslora=True, lora_alpha=3), None, True),
        (dict(lora_dropout=0.5), lambda model: model.eval(), True),
        (dict(lora_dropout=0.5), None, False),
        (dict(use_dora=True), None, False),
        (dict(lora_bias=True), None, False),
        (dict(bias="lora_only"), None, False),
        ({}, off, False),
        ({}, two, False),
        ({}, learned_base, False),
        ({}, lambda model: model.merge_adapter(), False),
    ],
)
def test_as_pefts_own(options, prepare, own, monkeypatch):
    ours, theirs = layers(**options)
    assert "forward" in vars(ours.get_base_model()[0]) and type(ours.get_base_model()[0]) is LoraLayer
    for model in (ours, theirs):
        if prepare is not None:
            prepare(model)
    calls = calls_of_ours(monkeypatch)
    x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(3))
    got, want = outcome(ours, x), outcome(theirs, x)
    assert bool(calls) == own
    if not options.get("lora_dropout") or own:
        close(got[0], want[0])
    close(got[1], want[1])
    assert len(got[2]) == len(want[2])
    for a, b in zip(got[2], want[2], strict=True):
        close(a, b)


def test_under_autocast_peft_casts(monkeypatch):
    ours, theirs = layers()
    calls = calls_of_ours(monkeypatch)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
    assert not calls


@pytest.mark.parametrize("lora", [False, True])
def test_a_backward_pass_under_autocast_is_that_without(lora):
    """As the one of torch's own operators, which autocast casts in the forward pass alone."""
    gradients = []
    for autocast in (False, True):
        g = torch.Generator().manual_seed(0)
        inputs, weight, lora_a, lora_b = (
            torch.randn(shape, generator=g) for shape in ((6, 40), (24, 40), (4, 40), (24, 4))
        )
        leaves = [inputs, lora_a, lora_b] if lora else [inputs, weight]
        for leaf in leaves:
            leaf.requires_grad_()
        output = (
            LoraLinear.apply(inputs, weight, None, lora_a, lora_b, 0.5) if lora else Linear.apply(inputs, weight, None)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            gradients.append(torch.autograd.grad(output.square().sum(), leaves))
    assert all(map(torch.equal, *gradients))
