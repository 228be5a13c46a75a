"""Losses on embeddings against plain loops, torch's own modules and identities."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import close

from rlhf.losses import (
    batch_triplet_loss,
    cosine_embedding_loss,
    info_nce_loss,
    siglip_loss,
    supervised_contrastive_loss,
    triplet_loss,
)  # fmt: skip

N, D = 8, 5


def embeddings(seed=0, count=2, rows=N):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, D, generator=g, dtype=torch.float64) for _ in range(count)]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(x):
    return [[v / math.sqrt(dot(row, row)) for v in row] for row in x.tolist()]


def nce(queries, keys, extra, tau, i):
    scores = [math.exp(dot(queries[i], k) / tau) for k in [*keys, *extra]]
    return -math.log(scores[i] / sum(scores))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("negatives", [0, 3])
def test_info_nce(symmetric, negatives):
    q, k = embeddings()
    n = embeddings(1, 1, negatives)[0] if negatives else None
    uq, uk, un = unit(q), unit(k), unit(n) if negatives else []
    want = [nce(uq, uk, un, 0.2, i) for i in range(N)]
    if symmetric:
        want = [(a + nce(uk, uq, [], 0.2, i)) / 2 for i, a in enumerate(want)]
    close(info_nce_loss(q, k, n, 0.2, symmetric=symmetric, reduction="none"), want, torch.float64)


def test_info_nce_learns_its_temperature_and_gradchecks():
    q, k = embeddings(2)
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, t: info_nce_loss(a, b, temperature=t), (q.requires_grad_(), k, tau))


def supcon(z, labels, tau, i):
    others = [j for j in range(len(z)) if j != i]
    total = sum(math.exp(dot(z[i], z[a]) / tau) for a in others)
    positives = [j for j in others if labels[j] == labels[i]]
    return -sum(math.log(math.exp(dot(z[i], z[p]) / tau) / total) for p in positives) / len(positives)


def test_supervised_contrastive_leaves_out_the_lonely():
    (x,) = embeddings(3, 1)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0, 3])
    want = [supcon(unit(x), labels.tolist(), 0.3, i) for i in (0, 1, 2, 3, 4, 6)]
    close(supervised_contrastive_loss(x, labels, 0.3), sum(want) / 6, torch.float64)
    assert torch.autograd.gradcheck(lambda z: supervised_contrastive_loss(z, labels, 0.3), x.requires_grad_())


def test_siglip():
    q, k = embeddings(4)
    uq, uk = unit(q), unit(k)
    want = [
        sum(math.log1p(math.exp(-(1 if i == j else -1) * (3 * dot(uq[i], uk[j]) - 1))) for j in range(N))
        for i in range(N)
    ]
    close(siglip_loss(q, k, 3.0, -1.0, reduction="none"), want, torch.float64)


PAIRWISE = {
    "info_nce": lambda q, k, **o: info_nce_loss(q, k, temperature=0.3, **o),
    "siglip": lambda q, k, **o: siglip_loss(q, k, 3.0, -1.0, **o),
    "supervised_contrastive": lambda q, k, **o: supervised_contrastive_loss(
        q, torch.arange(len(q)) % 2 if "mask" in o or len(q) == N else KEPT_LABELS, 0.3, **o
    ),
}
MASK = torch.tensor([True, True, False, True, True, False, True, True])
KEPT_LABELS = (torch.arange(N) % 2)[MASK]


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_mask_deletes_rows_as_candidates_too(name):
    q, k = embeddings(5)
    want = PAIRWISE[name](q[MASK], k[MASK])
    hidden = q.masked_fill(~MASK[:, None], math.nan).requires_grad_()
    got = PAIRWISE[name](hidden, k, mask=MASK)
    got.backward()
    close(got.detach(), want, torch.float64)
    assert torch.isfinite(hidden.grad).all()
    nothing = PAIRWISE[name](q.requires_grad_(), k, mask=MASK & False)
    nothing.backward()
    assert nothing == 0


@pytest.mark.parametrize("name", PAIRWISE)
def test_bfloat16_is_computed_in_float32(name):
    q, k = (x.bfloat16() for x in embeddings(6))
    got = PAIRWISE[name](q, k)
    assert got.dtype == torch.float32
    close(got, PAIRWISE[name](q.float(), k.float()))


def test_triplet_is_torchs():
    a, p, n = embeddings(7, 3)
    want = F.triplet_margin_loss(a, p, n, margin=0.7, eps=0, reduction="none")
    close(triplet_loss(a, p, n, 0.7, reduction="none"), want, torch.float64)
    squared = [max(0.0, float(sum((x - y) ** 2) - sum((x - z) ** 2)) + 0.7) for x, y, z in zip(a, p, n, strict=True)]
    close(triplet_loss(a, p, n, 0.7, distance="squared", reduction="none"), squared, torch.float64)
    cosine = F.triplet_margin_with_distance_loss(
        a, p, n, distance_function=lambda x, y: 1 - F.cosine_similarity(x, y), margin=0.7
    )
    close(triplet_loss(a, p, n, 0.7, distance="cosine"), cosine, torch.float64)


def mined(x, labels, mining, margin):
    """The definition, in loops."""
    d = torch.cdist(x, x).tolist()
    found = []
    for a in range(N):
        positives = [p for p in range(N) if p != a and labels[p] == labels[a]]
        negatives = [n for n in range(N) if labels[n] != labels[a]]
        if not positives or not negatives:
            continue
        if mining == "hard":
            found.append(max(0, max(d[a][p] for p in positives) - min(d[a][n] for n in negatives) + margin))
            continue
        for p in positives:
            if mining == "all":
                found += [max(0, d[a][p] - d[a][n] + margin) for n in negatives]
            else:
                beyond = [d[a][n] for n in negatives if d[a][n] > d[a][p]]
                found.append(max(0, d[a][p] - (min(beyond) if beyond else max(d[a][n] for n in negatives)) + margin))
    return sum(found) / len(found)


@pytest.mark.parametrize("mining", ["all", "hard", "semi-hard"])
@pytest.mark.parametrize("seed", range(4))
def test_mining(mining, seed):
    (x,) = embeddings(seed, 1)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0, 3])
    close(batch_triplet_loss(x, labels, 0.5, mining=mining), mined(x, labels.tolist(), mining, 0.5), torch.float64)
    lonely = batch_triplet_loss(x.requires_grad_(), torch.arange(N), mining=mining)
    lonely.backward()
    assert lonely == 0 and torch.isfinite(x.grad).all()


def test_equal_points_have_a_finite_gradient():
    x = torch.ones(4, D, requires_grad=True)
    batch_triplet_loss(x, torch.tensor([0, 0, 1, 1])).backward()
    assert torch.isfinite(x.grad).all()


def test_cosine_embedding_is_torchs():
    a, b = embeddings(8)
    y = torch.tensor([1, -1] * 4)
    close(cosine_embedding_loss(a, b, y, 0.2), F.cosine_embedding_loss(a, b, y, 0.2), torch.float64)


def test_mistakes_are_named():
    q, k = embeddings()
    with pytest.raises(ValueError, match=r"queries must be floating point \[N, D\], got torch.float64 \(8,\)"):
        info_nce_loss(q[:, 0], k)
    with pytest.raises(ValueError, match="temperature must be in"):
        info_nce_loss(q, k, temperature=0.0)
    with pytest.raises(ValueError, match="mining must be"):
        batch_triplet_loss(q, torch.arange(N), mining="easy")
    with pytest.raises(ValueError, match="distance must be"):
        triplet_loss(q, q, q, distance="manhattan")


def test_gathered_across_processes_with_gradient():
    """Two processes with half the batch each are one process with all of it, gradients averaged."""
    worker = Path(__file__).with_name("gathered.py")
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
