"""Compiled layers: the gradients of eager ones, and no compilation anew for batches of other shapes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import close, tiny_model
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from world.families import tiny_family

from rlhf.data import Collator
from rlhf.kernels import optimize
from rlhf.logprobs import TokenLoss
from rlhf.models import Policy, use_segments
from rlhf.models.activations import enable_checkpointing
from rlhf.models.compiling import compile_layers

SUM = TokenLoss(lambda scores: -scores.logps)
LENGTHS = ([(4, 3, 5), (2, 6, 3)], [(3, 7, 1), (5, 2, 2), (1, 4, 9)], [(6, 16, 8), (2, 2, 2)])


@pytest.fixture
def graphs_made():
    """How many graphs the compiler has made since the test began."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def batch(lengths, layout):
    g = torch.Generator().manual_seed(len(lengths))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: torch.randint(3, 300, (n,), generator=g).tolist() for name, n in zip(names, row, strict=True)}
        for row in lengths
    ]
    return Collator(layout=layout)(rows)


def check_gradients(got, want):
    assert got.keys() == want.keys() and len(got) > 6
    for name, gradient in want.items():
        close((got[name] - gradient).norm() / gradient.norm(), 0)


def gradients(policy, inputs):
    policy.zero_grad()
    loss = policy(inputs, SUM).loss
    loss.backward()
    return {"loss": loss} | {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


# The attention over segments divides a layer into four parts; both layers share their code.
@pytest.mark.parametrize(("layout", "backend", "num_graphs"), [("segments", "aot_eager", 4), ("rows", "eager", 1)])
def test_gradients_are_those_of_eager_layers_for_batches_of_any_shape(layout, backend, num_graphs, graphs_made):
    model = tiny_model()
    optimize(model)
    if layout == "segments":
        assert use_segments(model) is None
    eager, compiled = (Policy(m).train() for m in (model, copy.deepcopy(model)))
    compile_layers(compiled.model, backend, None)
    for lengths in LENGTHS:
        inputs = batch(lengths, layout)
        check_gradients(gradients(compiled, inputs), gradients(eager, inputs))
        assert graphs_made() == num_graphs  # after the first batch already


def test_adapters_and_checkpointing_under_the_compiler(graphs_made):
    targets = ["q_proj", "v_proj", "down_proj"]
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(tiny_model(num_hidden_layers=1), adapter)
    optimize(model)
    assert use_segments(model) is None
    plain = Policy(copy.deepcopy(model)).train()
    enable_checkpointing(model, None)
    policy = Policy(model).train()
    compile_layers(policy.model, "eager", None)
    inputs = batch(LENGTHS[0], "segments")
    check_gradients(gradients(policy, inputs), gradients(plain, inputs))
    # One token after another with a cache is not compiled.
    before = graphs_made()
    policy.model.eval().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3)
    assert graphs_made() == before


def test_a_wrong_gradient_is_noticed_and_the_layer_is_not_compiled(monkeypatch, caplog):
    """What a compiler once did on a GPU: the right loss, and another gradient."""

    def miscompiled(forward, **options):
        def detached(layer, hidden, *args, **kwargs):
            return forward(layer, hidden.detach() / 2 + hidden / 2, *args, **kwargs)

        return detached

    monkeypatch.setattr(torch, "compile", miscompiled)
    model = tiny_model("qwen2")
    eager, compiled = (Policy(m).train() for m in (model, copy.deepcopy(model)))
    compile_layers(compiled.model, "a backend", None)
    inputs = batch(LENGTHS[0], "rows")
    check_gradients(gradients(compiled, inputs), gradients(eager, inputs))
    assert "--torch_compile: a compiled Qwen2DecoderLayer has another gradient (relative diff" in caplog.text


def test_a_layer_that_draws_random_numbers_is_not_compared(monkeypatch, caplog):
    """OPT hands its probability to a function: no layer of dropout shows it."""
    model = tiny_family("opt", dropout=0.5, attention_dropout=0.0, layerdrop=0.0).train()
    compile_layers(model, "eager", None)
    model(input_ids=torch.arange(3, 20)[None], use_cache=False).logits.sum().backward()
    assert "another gradient" not in caplog.text


def test_a_model_without_known_layers_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.config = SimpleNamespace()
    with pytest.raises(ValueError, match="--torch_compile: Sequential has no layers that are known"):
        compile_layers(model, "eager", None)
