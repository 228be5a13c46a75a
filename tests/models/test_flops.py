"""FLOPs counted from shapes: against a count by hand, and against torch's counter of the operators that run."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from rlhf.data import Collator
from rlhf.logprobs import TokenLoss
from rlhf.models import Policy, flops, use_segments
from rlhf.models.flops import Flops, batch_flops, visible_pairs

SUM = TokenLoss(lambda scores: -scores.logps)
ROWS = [
    {"prompt_ids": [5, 3, 4, 9], "chosen_ids": [6, 7, 3, 2], "rejected_ids": [2, 4, 6]},
    {"prompt_ids": [2, 8], "chosen_ids": [3, 4], "rejected_ids": [7, 1, 1, 5, 9]},
]
LAYER = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64  # q, k, v, o; gate, up, down
HEAD = 32 * 330
# By hand: the prompts of 4 and 2 tokens once, with the first answer; the second answers behind their prompts.
SPANS = [(4 + 4, 0), (3, 4), (2 + 2, 0), (5, 2)]
PAIRS = (36 + 3 * 4 + 6) + (10 + 5 * 2 + 15)


def test_pairs_are_those_of_a_mask():
    for length, prefix, window in [
        (1, 0, None),
        (5, 0, None),
        (4, 3, None),
        (6, 0, 3),
        (4, 5, 3),
        (3, 2, 4),
        (2, 1, 9),
    ]:
        query = torch.arange(prefix, prefix + length)[:, None]
        key = torch.arange(prefix + length)
        mask = (key <= query) & (key > query - (window or 99))
        assert visible_pairs(length, prefix, window) == mask.sum()


def test_by_hand():
    model = tiny_model()
    assert use_segments(model) is None
    batch = Collator(layout="segments")(ROWS)
    assert [(span.length, span.prefix) for span in batch.segments.spans] == SPANS
    layers, attention, head = 2 * 2 * 20 * LAYER, 2 * 4 * 32 * PAIRS, 2 * 14 * HEAD
    forward = layers + attention + head
    assert batch_flops(model, batch, with_head=True, with_gradient=False) == Flops(forward, forward)
    both = batch_flops(model, batch, with_head=True, with_gradient=True)
    assert both == Flops(3 * forward, 3 * (layers + head) + int(3.5 * attention))
    assert batch_flops(model, batch, with_head=False, with_gradient=False).model == layers + attention
    # Padding is work of the hardware.
    padded = batch_flops(model, Collator()(ROWS), with_head=True, with_gradient=False)
    rows = 8 + 7 + 4 + 7
    assert padded.hardware - padded.model == 2 * 2 * (4 * 8 - rows) * LAYER


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"selective": True}])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_products_are_those_that_run(name, kwargs):
    model = tiny_model(name)
    policy = Policy(model).train()
    if kwargs is not None:
        policy.activation_checkpointing_enable(kwargs)
    batch = Collator()(ROWS)
    count = batch_flops(model, batch, with_head=True, with_gradient=True)
    with FlopCounterMode(display=False) as counter:
        policy(batch, SUM).loss.backward()
    # The counter does not know the attention of a CPU.
    pairs = sum(n * (n + 1) // 2 for n in (8, 7, 4, 7))
    attention_runs = 4.5 if kwargs == {"use_reentrant": False} else 3.5
    assert count.hardware - attention_runs * 2 * 4 * 32 * pairs == counter.get_total_flops()


def test_frozen_weights_have_no_gradient_and_adapters_count():
    base = tiny_model()
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["down_proj"]))
    batch = Collator()(ROWS)
    adapter = 4 * 64 + 4 * 32
    pairs = sum(n * (n + 1) // 2 for n in (8, 7, 4, 7))
    want = 2 * 2 * 26 * (2 * LAYER + 3 * adapter) + 3 * 2 * 4 * 32 * pairs + 2 * 2 * 14 * HEAD
    assert batch_flops(model.get_base_model(), batch, with_head=True, with_gradient=True).model == want
    plain, mixture = tiny_model("mixtral"), tiny_model("mixtral", num_experts_per_tok=1)
    counts = [batch_flops(m, batch, with_head=False, with_gradient=False).model for m in (plain, mixture)]
    assert counts[0] - counts[1] == 2 * 2 * 26 * 3 * 32 * 64  # one expert of four less


def test_names_of_settings_that_other_families_have():
    """Mistral's window is in its config alone; Ernie has another name for the experts of a token."""
    batch = Collator()(ROWS)
    models = [tiny_model(model_type="mistral", sliding_window=window) for window in (None, 3)]
    whole, windowed = (batch_flops(model, batch, with_head=False, with_gradient=False).model for model in models)
    hidden_pairs = [visible_pairs(row) - visible_pairs(row, window=3) for row in batch.attention_mask.sum(1).tolist()]
    # Two layers; scores and weighted values; a multiplication and an addition.
    assert whole - windowed == 2 * 2 * 2 * 32 * sum(hidden_pairs)
    assert flops._experts_of_a_token(SimpleNamespace(moe_k=2), 8) == 2
