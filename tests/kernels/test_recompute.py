"""What is made again in the backward pass: the same figures, fewer bytes kept."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, close, tiny_model
from peft import LoraConfig, get_peft_model
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhf.data import Collator
from rlhf.kernels import optimize, recompute
from rlhf.kernels.recompute import RMSNorm, SwiGLU, enable_recompute, fewer_activations, mark_recomputable
from rlhf.models import Policy

ROWS = [
    {"prompt_ids": [5, 3, 4, 9], "chosen_ids": [6, 7, 3, 2], "rejected_ids": [2, 4, 6]},
    {"prompt_ids": [2, 8], "chosen_ids": [3, 4], "rejected_ids": [7, 1, 1, 5, 9]},
]


def test_gradients():
    g = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 3, 5, dtype=torch.float64, generator=g).requires_grad_()
    torch.autograd.gradcheck(SwiGLU.apply, (gate, up))
    weight = torch.randn(5, dtype=torch.float64, generator=g).requires_grad_()
    torch.autograd.gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-3)[0], (gate, weight))
    torch.autograd.gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-3)[0], (up.view(3, 5, 1), weight[:1]))


def test_values_are_torchs():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 6, generator=g)
    weight = torch.randn(6, generator=g)
    close(SwiGLU.apply(x, y), torch.nn.functional.silu(x) * y)
    close(RMSNorm.apply(x, weight, 1e-5)[0], torch.nn.functional.rms_norm(x, (6,), weight, 1e-5))


@pytest.mark.parametrize("cast", [False, True])
def test_torchs_fused_norm_takes_its_place_on_a_gpu(monkeypatch, cast):
    """The choice is by the device; the CPU stands in for a GPU here."""
    assert recompute.has_fused_norm(torch.device("cuda", 0)) and not recompute.has_fused_norm(torch.device("cpu"))
    model, batch = tiny_model(), Collator()(ROWS)
    plain = copy.deepcopy(model)
    optimize(model)
    monkeypatch.setattr(recompute, "has_fused_norm", lambda device: True)
    found = []
    for one in (plain, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            score = Policy(one)(batch).logps.sum()
        found.append(gradients(lambda score=score: score, one))
    for name, gradient in found[0].items():
        difference = (found[1][name] - gradient).norm() / gradient.norm()
        close(difference, 0, torch.bfloat16 if cast else torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_norm_against_float64(gpu, dtype):
    g = torch.Generator().manual_seed(0)
    hidden, grad = torch.randn(2, 64, 256, generator=g).to(gpu, dtype)
    weight = torch.rand(256, generator=g).add(0.5).to(gpu, dtype)

    def run(dtype):
        inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight)]
        output = recompute._fused_norm(*inputs, 1e-6)
        assert output.dtype == dtype
        output.backward(grad.to(dtype))
        return [value.double() for value in (output.detach(), *(tensor.grad for tensor in inputs))]

    for got, want in zip(run(dtype), run(torch.float64), strict=True):
        assert (got - want).norm() < (1e-6 if dtype == torch.float32 else 3e-3) * want.norm()


def gradients(forward, model):
    forward().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_half_precision_rounds_no_whole_row():
    """1 / rms in bfloat16 would be 0.2 % off, for all entries of a row alike."""
    g = torch.Generator().manual_seed(0)
    hidden = (torch.randn(64, 256, generator=g) * torch.rand(64, 1, generator=g) * 3).bfloat16()
    weight = torch.rand(256, generator=g).add(0.5).bfloat16()
    grad = torch.randn(64, 256, generator=g).bfloat16()

    def run(norm, dtype):
        inputs = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        out = norm(*inputs)
        out.backward(grad.to(dtype))
        return [value.double() for value in (out.detach(), *(tensor.grad for tensor in inputs))]

    want = run(lambda x, w: torch.nn.functional.rms_norm(x, (256,), w, 1e-6), torch.float64)
    got = run(lambda x, w: RMSNorm.apply(x, w, 1e-6)[0], torch.bfloat16)
    row_errors = (got[0] * want[0]).sum(-1) / (want[0] * want[0]).sum(-1) - 1
    assert row_errors.abs().mean() < 5e-4  # 2e-3 where 1 / rms is rounded
    for one, exact in zip(got, want, strict=True):
        assert (one - exact).norm() < 3e-3 * exact.norm()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("peft", [False, True])
def test_models_compute_the_same(name, peft):
    model = tiny_model(name)
    if peft:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    plain = copy.deepcopy(model)
    optimize(model)
    policy = Policy(model)
    batch = Collator()(ROWS)
    other = model.get_base_model() if peft else model
    want = plain(**batch.inputs(), use_cache=False).logits.log_softmax(-1)
    want = want.flatten(0, 1)[batch.targets.source].gather(1, batch.targets.token[:, None]).mean()
    got = policy(batch).logps.mean()
    close(got, want)  # transformers rounds its norms to float32
    ours, theirs = gradients(lambda: got, model), gradients(lambda: want, plain)
    assert ours.keys() == theirs.keys() and ours
    for key, grad in theirs.items():
        close(ours[key], grad)
    if name in ("llama", "qwen2", "granite"):  # those it is for
        replaced = [
            type(m).__name__ for m in other.modules() if "forward" in vars(m) and type(m) is not torch.nn.Linear
        ]
        assert len(replaced) == 2 * 2 + 1 + 2 + (2 * 7 if peft else 0)  # norms, MLPs, LoRA layers


def bytes_kept(forward):
    """Bytes of all storages that the graph of ``forward`` keeps, parameters aside."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    return sum(kept.values()), out


def test_less_is_kept(monkeypatch):
    """Of 5 h-wide and 4 intermediate-wide tensors of norms and MLP in a layer, 2 and 2 stay."""
    model = tiny_model(num_hidden_layers=1)
    ids = torch.arange(64)[None]
    before, _ = bytes_kept(lambda: model(input_ids=ids, use_cache=False))
    enable_recompute(model)
    after = []
    inner = torch.autograd.graph.saved_tensors_hooks

    def counting(pack, unpack):
        def count(tensor):
            packed = pack(tensor)
            if isinstance(packed, torch.Tensor) and not isinstance(packed, torch.nn.Parameter):
                after.append((packed.untyped_storage().data_ptr(), packed.untyped_storage().nbytes()))
            return packed

        return inner(count, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", counting)
    with fewer_activations():
        out = model(input_ids=ids, use_cache=False)
    hidden, intermediate, tokens = 32, 64, 64
    # Two norms in the layer and the last one keep neither x / rms nor their output; silu and product go too.
    saved = 4 * tokens * (3 * 2 * hidden + 2 * intermediate)
    assert before - sum(dict(after).values()) == pytest.approx(saved, rel=0.02)
    out.logits.sum().backward()


def test_a_view_with_other_strides_is_kept():
    x = torch.randn(3, 4, requires_grad=True)
    with fewer_activations():
        y = mark_recomputable(x * 2, lambda: torch.full((3, 4), torch.nan))
        z = y.t() @ torch.ones(3, 1)
        w = (y.t() * y.t()).sum() + z.sum()
    w.backward()
    close(x.grad, 8 * x.detach() + 2)


def test_what_only_looks_alike_is_left(caplog):
    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.full((8,), 0.5)), 1e-6

        def forward(self, x):
            return (1 + self.weight) * torch.nn.functional.rms_norm(x, (8,), eps=self.variance_epsilon)

    odd = OddRMSNorm()
    enable_recompute(odd)
    assert "forward" not in vars(odd) and "OddRMSNorm computes something else" in caplog.text


class ClampedMLP(LlamaMLP):
    """As DeepSeek V4's and Step 3.7's, of which only some layers have a limit."""

    limit = 10.0

    def forward(self, x):
        gate, up = self.act_fn(self.gate_proj(x)).clamp(max=self.limit), self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj(gate * up)


def test_an_mlp_with_a_limit_keeps_it(caplog):
    config = tiny_model().config
    mlps = torch.nn.ModuleList(ClampedMLP(config) for _ in range(2))
    mlps[0].limit = torch.inf
    plain = copy.deepcopy(mlps)
    enable_recompute(mlps)
    assert "forward" in vars(mlps[0]) and "ClampedMLP computes something else" in caplog.text
    large = torch.full((1, config.hidden_size), 1e3)
    for got, want in zip(mlps, plain, strict=True):
        close(got(large).detach(), want(large).detach())


def test_a_copy_uses_its_own_weights():
    """The frozen reference is a deep copy."""
    model = tiny_model()
    enable_recompute(model)
    twin = copy.deepcopy(model)
    ids = torch.arange(1, 9)[None]
    want = model(input_ids=ids).logits
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    close(twin(input_ids=ids).logits, want)
