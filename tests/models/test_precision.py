"""Which dtype each product has, and which attention kernel a GPU would run: each dtype of weights under each autocast.

The products are counted on a CPU. What depends on the device is asked of pure functions, as if on a GPU.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.data import Collator
from rlhf.kernels.autocast import dtype_under_autocast
from rlhf.logprobs.head import head_dtype
from rlhf.models import ActorCritic, Policy, RewardModel, add_scalar_head, attention, use_segments
from rlhf.models.attention_kernels import choose_kernel

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
VOCABULARY, RANK = 330, 3
ROWS = [{"prompt_ids": [5, 3, 4], "chosen_ids": [6, 7, 3, 2], "rejected_ids": [2, 4, 6]}]
# Weights and autocast: the dtype of projections and attention, the kernel on a GPU, the dtype of the head there.
TABLE = {
    (FLOAT, None): (FLOAT, "sdpa", FLOAT),
    (FLOAT, BFLOAT): (BFLOAT, "varlen", BFLOAT),
    (FLOAT, HALF): (HALF, "varlen", HALF),
    (BFLOAT, None): (BFLOAT, "varlen", BFLOAT),
    (BFLOAT, BFLOAT): (BFLOAT, "varlen", BFLOAT),
    (BFLOAT, HALF): (HALF, "varlen", HALF),
    (HALF, None): (HALF, "varlen", HALF),
    (HALF, BFLOAT): (BFLOAT, "varlen", BFLOAT),
    (HALF, HALF): (HALF, "varlen", HALF),
}


class Products(TorchDispatchMode):
    """The dtypes of all matrix products by kind, forward and backward.

    Without those of a head: one with a vocabulary is asked of a pure function, and that of a value or a reward, which
    has one output, is in float32 on purpose.
    """

    def __init__(self):
        super().__init__()
        self.dtypes = {"projection": set(), "adapter": set(), "attention": set()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
        sizes = {size for tensor in tensors for size in tensor.shape}
        if "scaled_dot_product" in name:
            self.dtypes["attention"] |= {tensor.dtype for tensor in tensors[-3 if "backward" not in name else 0 :][:3]}
        elif name in ("mm.default", "addmm.default", "bmm.default") and not {VOCABULARY, 1} & sizes:
            self.dtypes["adapter" if RANK in sizes else "projection"] |= {tensor.dtype for tensor in tensors}
        return function(*args, **(kwargs or {}))


@contextmanager
def autocast(device, dtype):
    """Autocast on a device that is not there, as far as questions about it go."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype is not None)
    torch.set_autocast_dtype(device, dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def observe(module, dtype, monkeypatch, learns=True):
    """What a forward and backward pass multiplies in, which kernels a GPU would run, and the head's dtype there."""
    kernels, hidden = set(), []
    own_choice = attention.choose_kernel

    def choose(call, flash_options=None):
        kernels.add(choose_kernel(call._replace(device="cuda"), flash_options))
        return own_choice(call, flash_options)

    monkeypatch.setattr(attention, "choose_kernel", choose)
    backbone = module.without_adapter.base_model
    hook = backbone.register_forward_hook(lambda module, args, output: hidden.append(output[0].dtype))
    batch = Collator(layout="segments")(ROWS)
    with Products() as products:
        with torch.autocast("cpu", dtype, enabled=dtype is not None), nullcontext() if learns else torch.no_grad():
            output = module(batch)
        if learns:
            tensors = [output] if isinstance(output, torch.Tensor) else [t for t in output if t is not None]
            sum((tensor**2).sum() for tensor in tensors).backward()
    hook.remove()
    with autocast("cuda", dtype):
        heads = {head_dtype(dtype_of_rows, "cuda") for dtype_of_rows in hidden}
    return products.dtypes, kernels, heads


def ready(weights, **changes):
    model = tiny_model(**changes).to(weights)
    assert use_segments(model) is None
    return model


@pytest.mark.parametrize("weights, dtype", TABLE)
def test_the_table(weights, dtype, monkeypatch):
    products, kernels, heads = observe(Policy(ready(weights)), dtype, monkeypatch)
    want, kernel, head = TABLE[weights, dtype]
    assert products == {"projection": {want}, "adapter": set(), "attention": {want}}
    assert (kernels, heads) == ({kernel}, {head})


@pytest.mark.parametrize("weights, dtype", [(BFLOAT, None), (BFLOAT, BFLOAT), (FLOAT, BFLOAT)])
def test_an_adapter_in_float32(weights, dtype, monkeypatch):
    model = get_peft_model(ready(weights), LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules="all-linear"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {FLOAT}
    products, kernels, heads = observe(Policy(model), dtype, monkeypatch)
    assert products["projection"] == products["attention"] == {BFLOAT}
    assert products["adapter"] == {FLOAT if dtype is None else BFLOAT}
    assert (kernels, heads) == ({"varlen"}, {BFLOAT})


CASES = {
    "checkpointing": lambda: Policy(checkpointed(ready(FLOAT))),
    "a critic of its own": lambda: ActorCritic(ready(FLOAT), reward_model()),
    "a value head": lambda: ActorCritic(ready(FLOAT)),
    "a reward model": lambda: reward_model(),
    "query and key norms": lambda: Policy(ready(FLOAT, name="qwen3")),
    "biases": lambda: Policy(ready(FLOAT, name="qwen2")),
    "learned positions": lambda: Policy(ready(FLOAT, name="gpt2")),
}


def checkpointed(model):
    model.train().activation_checkpointing_enable()
    return model


def reward_model():
    model = add_scalar_head(tiny_model())
    assert use_segments(model) is None
    return RewardModel(model)


@pytest.mark.parametrize("case", CASES)
def test_float32_weights_under_autocast(case, monkeypatch):
    products, kernels, heads = observe(CASES[case](), BFLOAT, monkeypatch)
    assert products == {"projection": {BFLOAT}, "adapter": set(), "attention": {BFLOAT}}
    assert (kernels, heads) == ({"varlen"}, {BFLOAT})


def test_a_reference_without_gradient(monkeypatch):
    products, kernels, heads = observe(Policy(ready(FLOAT)), BFLOAT, monkeypatch, learns=False)
    assert products == {"projection": {BFLOAT}, "adapter": set(), "attention": {BFLOAT}}
    assert (kernels, heads) == ({"varlen"}, {BFLOAT})


def test_float64_is_never_cast():
    with autocast("cuda", BFLOAT):
        assert dtype_under_autocast(torch.float64, "cuda") == head_dtype(torch.float64, "cuda") == torch.float64
    assert dtype_under_autocast(FLOAT, "cuda") == FLOAT
