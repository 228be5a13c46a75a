"""A kept part of a teacher beside the whole: divergence, gradient, bytes. Prints the table of docs/teacher-cache.md.

    python benchmarks/teacher_cache.py --model MODEL --data ROWS     # minutes on 2 cores

The teacher is MODEL; the students are MODEL with noise on its weights, and MODEL without some of its layers. Gradients
are those of the mean over the tokens, with respect to the student's last hidden states (one token each) and to its head
(all tokens added up, as any weight sees them), compared with those of the whole divergence.
"""

import argparse
import copy
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data import Collator, load_data, tokenize_sft
from rlhf.logprobs import Head, Targets, TopK, top_k, top_k_divergence, verified_settings
from rlhf.logprobs.head import backbone_of, read_head
from rlhf.losses import kl_divergence
from rlhf.models import choose_layout, load_model, load_tokenizer

KS = (1, 8, 32, 128)


def noisy(model: Any, scale: float) -> Any:
    """Each matrix of the trunk with noise of ``scale`` times its own spread."""
    student = copy.deepcopy(model)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if weight.dim() == 2 and "embed" not in name and "lm_head" not in name:
                weight += scale * weight.std() * torch.randn(weight.shape, generator=g)
    return student


def shallower(model: Any, every: int) -> Any:
    """Without each ``every``-th layer, the first and last few kept."""
    student = copy.deepcopy(model)
    layers = student.model.layers
    kept = [layer for index, layer in enumerate(layers) if index % every != every - 1 or index + 1 == len(layers)]
    student.model.layers = nn.ModuleList(kept)
    student.config.num_hidden_layers = len(kept)
    return student


def hidden_states(model: Any, tokenizer: Any, rows: Any, chosen: Tensor) -> tuple[Tensor, Head, Targets]:
    """Those before the chosen ones of all scored tokens, and targets of them alone."""
    collate = Collator(layout=choose_layout(model, "auto"))
    hidden, token = [], []
    with torch.no_grad():
        for start in range(0, len(rows), 8):
            batch = collate([rows[i] for i in range(start, min(start + 8, len(rows)))])
            states = backbone_of(model)(**batch.inputs(), use_cache=False)[0]
            hidden.append(states.view(-1, states.size(-1))[batch.targets.source])
            token.append(batch.targets.token)
    settings = verified_settings(model)
    assert settings is not None
    head = read_head(model, settings)
    found = torch.cat(token)[chosen]
    targets = Targets(torch.arange(len(found)), found, torch.zeros_like(found))
    return torch.cat(hidden)[chosen].requires_grad_(), Head(head.weight.detach().clone().requires_grad_()), targets


def whole(student: tuple[Tensor, Head, Targets], teacher: tuple[Tensor, Head, Targets], reverse: bool) -> Any:
    """(mean, gradients) of the divergence over the whole vocabulary."""
    (hidden, head, _), (t_hidden, t_head, _) = student, teacher
    gradients = [torch.zeros_like(hidden), torch.zeros_like(head.weight)]
    total = 0.0
    for start in range(0, len(hidden), 256):
        part = slice(start, start + 256)
        with torch.no_grad():
            wanted = t_head.logits(t_hidden[part])
        loss = kl_divergence(head.logits(hidden[part]), wanted, reverse=reverse, reduction="sum") / len(hidden)
        for into, added in zip(gradients, torch.autograd.grad(loss, (hidden, head.weight)), strict=True):
            into += added
        total += float(loss.detach())
    return total, gradients


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().view(-1), b.double().view(-1)  # millions of terms: float32 is wrong in the third digit
    return float(a @ b / (a.norm() * b.norm()))


def stored(kept: TopK) -> TopK:
    """As it comes back from the file: float16, normalised again."""
    logps = torch.cat([kept.logps, kept.rest[:, None]], 1).half().float().log_softmax(-1)
    return kept._replace(logps=logps[:, :-1], rest=logps[:, -1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--students", nargs="+", default=["noise", "layers"], choices=["noise", "layers"])
    args = parser.parse_args()
    teacher_model = load_model(args.model, dtype="float32").eval()
    tokenizer = load_tokenizer(args.model)
    size = int(teacher_model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    data = load_data(args.data, f"train[:{args.rows}]")
    rows = tokenize_sft(data, tokenizer, max_length=256, vocab_size=size, drop_long_prompts=True)
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: args.tokens].sort().values
    teacher = hidden_states(teacher_model, tokenizer, rows, chosen)
    print(f"{len(rows)} rows, {len(chosen)} of {count} scored tokens; vocabulary {size}")
    known = {}
    for k in KS:
        exact = top_k(*teacher, k)
        known[k] = stored(exact)
        lost = known[k]
        p = torch.cat([exact.logps, exact.rest[:, None]], 1).double().log_softmax(1)
        apart = (p.exp() * (p - torch.cat([lost.logps, lost.rest[:, None]], 1).double().log_softmax(1))).sum(1)
        mass = float(exact.logps.exp().sum(1).mean())
        print(f"k {k}: mass {mass:.4f}; KL(exact, float16) mean {apart.mean():.1e}, most {apart.max():.1e}")
    for name in args.students:
        model = noisy(teacher_model, 0.1) if name == "noise" else shallower(teacher_model, 10)
        student = hidden_states(model, tokenizer, rows, chosen)
        for reverse in (False, True):
            total, want = whole(student, teacher, reverse)
            print(f"\n{name}, {'KL(q, p)' if reverse else 'KL(p, q)'} {total:.4f}\n")
            print("| estimate | k | bytes/token | estimate / whole | cosine, hidden | cosine, head | norm, head |")
            print("|---|---:|---:|---:|---:|---:|---:|")
            for estimate in ("tail", "truncate"):
                for k in KS:
                    scores = top_k_divergence(*student, known[k], estimate=estimate, beta=float(reverse))
                    got = torch.autograd.grad(scores.loss / len(chosen), (student[0], student[1].weight))
                    value = float(scores.divergence.mean())
                    cosines = [cosine(g, w) for g, w in zip(got, want, strict=True)]
                    norm = float(got[1].norm() / want[1].norm())
                    size = 4 * k + 2
                    shown = " | ".join(f"{c:.4f}" if norm > 1e-6 else "none" for c in cosines)
                    print(f"| {estimate} | {k} | {size} | {value / total:.3f} | {shown} | {norm:.3f} |", flush=True)


if __name__ == "__main__":
    main()
