"""Modules say what their functions say; combined losses; mixed precision with a scaler."""

import math

import pytest
import torch
from conftest import close
from torch import nn

from rlhf import losses
from rlhf.losses import modules
from rlhf.losses.catalogue import EXTENSION_POINTS

P, Y = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.0, 1.0, 1.0])
Z, C = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 1])


@pytest.mark.parametrize(
    ("module", "want"),
    [
        (lambda: modules.FocalLoss(0.3, 1.5)(P, Y), lambda: losses.focal_loss(P, Y, 0.3, 1.5)),
        (lambda: modules.FocalLoss(gamma=1.5)(P, Y), lambda: losses.focal_loss(P, Y, gamma=1.5)),
        (lambda: modules.HuberLoss(0.4, reduction="sum")(P, Y), lambda: losses.huber_loss(P, Y, 0.4, reduction="sum")),
        (lambda: modules.InfoNCELoss(0.2)(Z, Z), lambda: losses.info_nce_loss(Z, Z, temperature=0.2)),
        (lambda: modules.CrossEntropyLoss(class_weights=torch.ones(4) / 2)(Z, C), lambda: losses.cross_entropy_loss(Z, C)),
        (lambda: modules.CrossEntropyLoss(ignore_index=3)(Z, C), lambda: losses.cross_entropy_loss(Z, C, ignore_index=3)),
        (lambda: modules.CausalLMLoss(z_loss=0.1)(Z[None], C[None]), lambda: losses.causal_lm_loss(Z[None], C[None], z_loss=0.1)),
        (lambda: modules.DPOLoss(0.3, "hinge")(P, Y, Y, P), lambda: losses.dpo_loss(P, Y, Y, P, 0.3, loss_type="hinge")),
        (lambda: modules.MSELoss()(P, Y, mask=Y > 0), lambda: losses.mse_loss(P[1:], Y[1:])),
        (lambda: modules.PPOLoss(0.1)(P, Y, P), lambda: losses.ppo_loss(P, Y, P, 0.1)),
        (lambda: modules.KLDivergence(2.0, reverse=True)(Z, -Z), lambda: losses.kl_divergence(Z, -Z, 2.0, reverse=True)),
    ],
)  # fmt: skip
def test_a_module_is_its_function(module, want):
    close(module(), want())


def test_every_loss_function_has_a_module():
    wrapped = {m.function.__name__ for m in vars(modules).values() if isinstance(m, type) and hasattr(m, "function")}
    by_name = {f.__name__ for f in losses.POLICY_LOSSES.values()} | {"dpo_loss", "top_k_kl", "as_compute_loss"}
    by_name |= {*EXTENSION_POINTS, "interpolated_kl"}  # of log-probs, not of logits
    functions = {
        n for n in losses.__all__ if n.endswith(("_loss", "_divergence", "_kl", "_jsd", "_entropy", "_shannon"))
    }
    assert functions - by_name - wrapped == set()


def test_parameters_are_trained_and_tensors_are_buffers():
    module = modules.InfoNCELoss(temperature=nn.Parameter(torch.tensor(0.5)))
    module(Z, Z.flip(0)).backward()
    assert module.temperature.grad is not None and module.temperature.grad != 0
    assert "class_weights" in dict(modules.CrossEntropyLoss(class_weights=torch.ones(4)).named_buffers())


def test_names_are_checked():
    with pytest.raises(TypeError, match="FocalLoss has no argument 'gama'; it takes alpha, gamma, reduction"):
        modules.FocalLoss(gama=2.0)
    assert repr(modules.FocalLoss(0.5)) == "FocalLoss(alpha=0.5)"


def test_combined_losses():
    parts = {"mse": modules.MSELoss(), "mae": losses.mae_loss}
    mse, mae = losses.mse_loss(P, Y), losses.mae_loss(P, Y)
    total, reported = modules.CombinedLoss(parts, {"mae": 0.5})(P, Y)
    close(total, mse + 0.5 * mae)
    close([reported["mse"], reported["mae"]], [mse, mae])
    scaled, _ = modules.CombinedLoss(parts, {"mae": 0.5}, scheme="scaled")(P, Y)
    close(scaled, 1.5)
    with pytest.raises(ValueError, match="weights are for"):
        modules.CombinedLoss(parts, {"mes": 0.5})


def test_scaled_parts_pull_alike_and_zero_is_safe():
    for size in (1.0, 1e6):
        p = (P * size).requires_grad_()
        total, _ = modules.CombinedLoss({"mse": losses.mse_loss}, scheme="scaled")(p, Y * 0)
        total.backward()
        close(p.grad * size, 2 * P / (P**2).sum())
    same = P.clone().requires_grad_()
    total, _ = modules.CombinedLoss({"mse": losses.mse_loss}, scheme="scaled")(same, P)
    total.backward()
    assert total == 0 and torch.isfinite(same.grad).all()


def test_uncertainty_weights_settle_where_the_paper_says():
    """For a constant loss l the optimum of l * exp(-s) + s is s = log l."""
    combined = modules.CombinedLoss(
        {"a": lambda: torch.tensor(3.0), "b": lambda: torch.tensor(0.2)}, scheme="uncertainty"
    )
    optimizer = torch.optim.LBFGS(combined.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        total, _ = combined()
        total.backward()
        return total

    optimizer.step(closure)
    close([combined.log_variances[n].detach() for n in "ab"], [math.log(3), math.log(0.2)], torch.bfloat16)


def test_an_fp16_overflow_skips_a_step_halves_the_scale_and_training_goes_on():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    history = []
    for step in range(4):
        before = model.weight.detach().clone()
        with torch.autocast("cpu", dtype=torch.float16):
            predictions = model(x * (6e4 if step == 1 else 1))  # beyond fp16's 65504
        loss = losses.mse_loss(predictions, y)
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        history.append((not torch.equal(before, model.weight), scaler.get_scale()))
    assert history == [(True, 2.0**10), (False, 2.0**9), (True, 2.0**9), (True, 2.0**9)]
    assert torch.isfinite(model.weight).all()
