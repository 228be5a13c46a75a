"""TRL 1.16's own preference losses, run on made-up log-probs: value and gradient agree to 1e-10 in float64.

Known exceptions, where TRL is not followed: ``sigmoid`` ignores label smoothing there, the alpha divergence is that of
1 - alpha, and ``sft`` is a mean over the micro-batch's tokens (ours: over pairs).
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import close

from rlhf.losses import PREFERENCE_LOSSES

trl = pytest.importorskip("trl")
PAIRS, LENGTH = 5, 7
COMPLETION = torch.zeros(2 * PAIRS, LENGTH, dtype=torch.int64)
for row, count in enumerate([3, 6, 1, 4, 2, 5, 2, 6, 3, 1]):
    COMPLETION[row, LENGTH - count :] = 1
LENGTHS = COMPLETION.sum(1)


def logps(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (-2 * torch.rand(2 * PAIRS, LENGTH - 1, generator=g, dtype=torch.float64)).to(dtype) * COMPLETION[:, 1:]


def trls(policy, ref, loss_type, **changes):
    """``DPOTrainer._compute_loss`` with everything around the formula stubbed."""
    nothing = torch.zeros_like(policy)
    outputs = SimpleNamespace(log_probs=policy, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    settings = dict(
        model=SimpleNamespace(training=False), accelerator=same, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, loss_types=[loss_type],
        loss_weights=[1.0], beta=0.3, label_smoothing=0.0, use_weighting=False, _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)), args=SimpleNamespace(discopop_tau=0.05), discopop_tau=0.05,
    )  # fmt: skip
    sums = ref.sum(1).chunk(2)
    inputs = {
        "input_ids": COMPLETION, "attention_mask": COMPLETION, "completion_mask": COMPLETION,
        "ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1],
    }  # fmt: skip
    trainer = SimpleNamespace(**{**settings, **changes})
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


def ours(policy, ref, name, **own):
    return PREFERENCE_LOSSES[name](*policy.sum(1).chunk(2), *ref.sum(1).chunk(2), 0.3, **own)


BOTH = dict(chosen_lengths=LENGTHS[:PAIRS], rejected_lengths=LENGTHS[PAIRS:])
SAME = {
    "sigmoid": ({}, {}), "hinge": ({}, {}), "ipo": (BOTH, {}), "sigmoid_norm": (BOTH, {}),
    "exo_pair": (dict(label_smoothing=0.1), dict(label_smoothing=0.1)),
    "robust": (dict(label_smoothing=0.1), dict(label_smoothing=0.1)),
    "nca_pair": ({}, {}), "bco_pair": ({}, {}), "sppo_hard": ({}, {}), "apo_zero": ({}, {}), "apo_down": ({}, {}),
    "discopop": ({}, {}), "aot": ({}, {}), "aot_unpaired": ({}, {}),
}  # fmt: skip


def agree(one, other, policy, rtol=1e-10):
    gradients = [torch.autograd.grad(loss, policy, retain_graph=True)[0] for loss in (one, other)]
    torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)
    torch.testing.assert_close(*gradients, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient(name, seed):
    own, changes = SAME[name]
    policy, ref = logps(seed).requires_grad_(), logps(seed + 10)
    # TRL builds epsilon in float32 for EXO, so that it is 0.1 only to 8 digits.
    agree(
        ours(policy, ref, name, **own),
        trls(policy, ref, name, **changes),
        policy,
        1e-7 if name == "exo_pair" else 1e-10,
    )


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js_divergence"])
def test_f_divergences(kind):
    policy, ref = logps(0).requires_grad_(), logps(10)
    mine = ours(policy, ref, "f_dpo", f_divergence_type=kind.removesuffix("_divergence"))
    agree(mine, trls(policy, ref, "sigmoid", f_divergence_type=kind), policy)


def test_the_alpha_divergence_is_that_of_one_minus_alpha():
    policy, ref = logps(0, torch.float32).requires_grad_(), logps(10, torch.float32)
    mine = ours(policy, ref, "f_dpo", f_divergence_type="alpha", f_alpha_divergence_coef=0.7)
    peer = trls(policy, ref, "sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3)
    agree(mine, peer, policy, 1e-5)


def test_sigmoid_ignores_label_smoothing_there():
    policy, ref = logps(0), logps(10)
    close(trls(policy, ref, "sigmoid", label_smoothing=0.2), trls(policy, ref, "sigmoid"), torch.float64)
    assert ours(policy, ref, "sigmoid", label_smoothing=0.2) != ours(policy, ref, "sigmoid")
