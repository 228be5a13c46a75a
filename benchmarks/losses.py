"""Each loss against the plain torch expression that people write, value and gradient, side by side in one run.

    python benchmarks/losses.py     # or: make bench

Prints the ratio of the times (ours / plain), the median over rounds that alternate between the two. 1 is the goal;
where the inputs are small, what is left above 1 is the checks.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlhf import losses

G = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G)


LOGITS, LABELS = normal(512, 32_000), torch.randint(32_000, (512,), generator=G)
TEACHER = normal(512, 32_000)
X, Y = normal(1_000_000), torch.rand(1_000_000, generator=G).round()
A, B = normal(1024, 256), normal(1024, 256)
PAIRS = [normal(100_000) - 50 for _ in range(4)]
OLD, ADVANTAGES = normal(1_000_000), normal(1_000_000)


def plain_focal(z: Tensor) -> Tensor:
    bce = F.binary_cross_entropy_with_logits(z, Y, reduction="none")
    p = torch.sigmoid(z)
    p_t = p * Y + (1 - p) * (1 - Y)
    return ((0.25 * Y + 0.75 * (1 - Y)) * (1 - p_t) ** 2 * bce).mean()


def plain_clip(a: Tensor, b: Tensor) -> Tensor:
    logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / 0.07
    own = torch.arange(len(a))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def plain_ppo(logps: Tensor) -> Tensor:
    ratio = (logps - OLD).exp()
    return -torch.minimum(ratio * ADVANTAGES, ratio.clamp(0.8, 1.2) * ADVANTAGES).mean()


Case = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]
CASES: dict[str, Case] = {
    "mse_loss, 1e6": (lambda x: losses.mse_loss(x, Y), lambda x: F.mse_loss(x, Y), (X,)),
    "bce_with_logits_loss, 1e6": (
        lambda x: losses.bce_with_logits_loss(x, Y), lambda x: F.binary_cross_entropy_with_logits(x, Y), (X,),
    ),
    "focal_loss, 1e6": (lambda x: losses.focal_loss(x, Y), plain_focal, (X,)),
    "cross_entropy_loss, 512 x 32k": (
        lambda z: losses.cross_entropy_loss(z, LABELS), lambda z: F.cross_entropy(z, LABELS), (LOGITS,),
    ),
    "causal_lm_loss, 512 x 32k": (
        lambda z: losses.causal_lm_loss(z[None], LABELS[None]),
        lambda z: F.cross_entropy(z[:-1], LABELS[1:]),
        (LOGITS,),
    ),
    "kl_divergence, 512 x 32k": (
        lambda z: losses.kl_divergence(z, TEACHER),
        lambda z: F.kl_div(z.log_softmax(-1), TEACHER.log_softmax(-1), log_target=True, reduction="batchmean"),
        (LOGITS,),
    ),
    "info_nce_loss, 1024 x 256": (losses.info_nce_loss, plain_clip, (A, B)),
    "dpo_loss, 1e5": (
        lambda c, r: losses.dpo_loss(c, r, *PAIRS[2:]),
        lambda c, r: -F.logsigmoid(0.1 * ((c - PAIRS[2]) - (r - PAIRS[3]))).mean(),
        (PAIRS[0], PAIRS[1]),
    ),
    "dpo_loss, 8": (
        lambda c, r: losses.dpo_loss(c, r, PAIRS[2][:8], PAIRS[3][:8]),
        lambda c, r: -F.logsigmoid(0.1 * ((c - PAIRS[2][:8]) - (r - PAIRS[3][:8]))).mean(),
        (PAIRS[0][:8], PAIRS[1][:8]),
    ),
    "ppo_loss, 1e6": (lambda x: losses.ppo_loss(x, OLD, ADVANTAGES), plain_ppo, (OLD + 0.1 * normal(1_000_000),)),
}  # fmt: skip


def seconds(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    own = [x.clone().requires_grad_() for x in inputs]
    start = time.perf_counter()
    loss(*own).backward()
    return time.perf_counter() - start


def main(rounds: int = 15) -> None:
    table = Table("loss", "ours, ms", "plain, ms", "ratio")
    for name, (ours, plain, inputs) in CASES.items():
        seconds(ours, inputs), seconds(plain, inputs)
        times = [(seconds(ours, inputs), seconds(plain, inputs)) for _ in range(rounds)]
        ratio = statistics.median(a / b for a, b in times)
        mine, other = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
        table.add_row(name, f"{mine:.3g}", f"{other:.3g}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
