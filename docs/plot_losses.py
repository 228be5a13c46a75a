"""Small plots of three families, loss above and gradient below; writes ``losses.png`` beside itself."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from rlhf import losses

ZERO = torch.zeros(601)
X = torch.linspace(-3, 3, 601)
ONE = torch.ones(601)
PAIRS = losses.PREFERENCE_LOSSES


def preference(name: str, **options: object):  # type: ignore[no-untyped-def]
    """Half of the margin comes from the chosen answer, half from the rejected one."""
    return lambda x: PAIRS[name](x / 2, -x / 2, ZERO, ZERO, 1.0, reduction="none", **options)


FAMILIES = {
    ("Regression", "prediction minus target"): {
        "mse": lambda x: losses.mse_loss(x, ZERO, reduction="none"),
        "mae": lambda x: losses.mae_loss(x, ZERO, reduction="none"),
        "huber(1)": lambda x: losses.huber_loss(x, ZERO, reduction="none"),
        "log-cosh": lambda x: losses.log_cosh_loss(x, ZERO, reduction="none"),
        "quantile(0.8)": lambda x: losses.quantile_loss(x, ZERO, 0.8, reduction="none"),
        "ε-insensitive(0.5)": lambda x: losses.epsilon_insensitive_loss(x, ZERO, 0.5, reduction="none"),
    },
    ("Classification", "logit of the true class"): {
        "cross-entropy": lambda x: losses.bce_with_logits_loss(x, ONE, reduction="none"),
        "focal(γ=2)": lambda x: losses.focal_loss(x, ONE, None, 2.0, reduction="none"),
        "poly-1": lambda x: losses.poly1_loss(
            torch.stack([x, ZERO], -1), torch.zeros(601, dtype=torch.int64), reduction="none"
        ),
        "hinge": lambda x: losses.hinge_loss(x, ONE, reduction="none"),
        "modified Huber": lambda x: losses.modified_huber_loss(x, ONE, reduction="none"),
    },
    ("Preferences", "reward margin, chosen minus rejected (β = 1)"): {
        "sigmoid (DPO)": preference("sigmoid"),
        "smoothed 0.2": preference("sigmoid", label_smoothing=0.2),
        "robust 0.2": preference("robust", label_smoothing=0.2),
        "hinge": preference("hinge"),
        "ipo": preference("ipo"),
        "apo_zero": preference("apo_zero"),
    },
}
figure, axes = plt.subplots(2, len(FAMILIES), figsize=(13, 6), layout="constrained", sharex="col")
for ((title, horizontal), family), (above, below) in zip(FAMILIES.items(), axes.T, strict=True):
    for name, loss in family.items():
        x = X.clone().requires_grad_()
        values = loss(x)
        (gradient,) = torch.autograd.grad(values.sum(), x)
        above.plot(X, values.detach(), label=name)
        below.plot(X, gradient)
    above.set(title=title, ylim=(-0.3, 4.2), ylabel="loss")
    below.set(ylim=(-4.2, 4.2), xlabel=horizontal, ylabel="gradient of the loss")
    above.tick_params(labelbottom=True)  # a shared axis has its numbers below only
    above.legend(frameon=False, fontsize=8)
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
figure.savefig(Path(__file__).with_name("losses.png"), dpi=90)
