"""Sampling in process against ``model.generate``: the same model, prompts, batch and number of tokens.

    python benchmarks/generation.py --model SmolLM2-135M-Instruct [--rounds 3] [--output FOLDER] [--profile]

Prompts are random ids of mixed length; every completion has exactly ``--tokens`` tokens on both sides (end tokens are
suppressed), drawn at temperature 1 from the whole vocabulary. Sides take turns, round by round, and the best round of
each counts. Each side has a copy of the model (ours changes how its linear layers compute). ``generate`` is given what
it is given in practice: a left-padded batch, a group's prompt once a sample.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rlhf.kernels import optimize
from rlhf.models import load_model, load_tokenizer
from rlhf.rollouts import LocalEngine, Sampling


class Case(NamedTuple):
    """``length`` is the range of the prompts' lengths in tokens."""

    prompts: int
    samples: int
    length: tuple[int, int]


CASES = {
    "16 prompts": Case(16, 1, (20, 160)),
    "4 prompts x 4 samples": Case(4, 4, (20, 160)),
    "4 long prompts x 4 samples": Case(4, 4, (300, 500)),
}


def prompts_of(case: Case, vocab: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(case.length[0], case.length[1] + 1, (case.prompts,), generator=g).tolist()
    return [torch.randint(3, vocab, (length,), generator=g).tolist() for length in lengths]


def transformers_side(model: Any, prompts: list[list[int]], samples: int, pad: int) -> Callable[[int], Any]:
    rows = [ids for ids in prompts for _ in range(samples)]
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    return lambda tokens: model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True,
        temperature=1.0, top_k=0, top_p=1.0, pad_token_id=pad,
    )  # fmt: skip


def our_side(engine: LocalEngine, prompts: list[list[int]], samples: int) -> Callable[[int], Any]:
    return lambda tokens: engine.generate(prompts, samples, Sampling(max_tokens=tokens, min_tokens=tokens), seed=0)


def seconds(run: Callable[[int], Any], tokens: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(tokens)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--profile", action="store_true", help="print where our time goes instead")
    args = parser.parse_args()
    model = load_model(args.model, dtype="float32").eval()
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    tokenizer = load_tokenizer(args.model)
    ours = copy.deepcopy(model)
    optimize(ours)
    engine = LocalEngine(ours, tokenizer)
    results: dict[str, dict[str, float]] = {}
    for name in args.case:
        case = CASES[name]
        prompts = prompts_of(case, model.config.vocab_size)
        sides = {
            "generate": transformers_side(model, prompts, case.samples, tokenizer.eos_token_id),
            "ours": our_side(engine, prompts, case.samples),
        }
        for run in sides.values():
            run(2)
        if args.profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
                sides["ours"](args.tokens)
            print(name, found.key_averages().table(sort_by="self_cpu_time_total", row_limit=15), sep="\n")
            continue
        whole: dict[str, list[float]] = {side: [] for side in sides}
        prefill: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, run in sides.items():
                prefill[side].append(seconds(run, 1))
                whole[side].append(seconds(run, args.tokens))
        count = case.prompts * case.samples * args.tokens
        best = {side: min(times) for side, times in whole.items()}
        for side in sides:
            step = (best[side] - min(prefill[side])) / (args.tokens - 1)
            print(
                f"{name:28} {side:9} {count / best[side]:7.1f} tokens/s   first token {min(prefill[side]):6.2f} s   "
                f"then {1e3 * step:6.1f} ms a step   rounds {' '.join(f'{t:.2f}' for t in whole[side])}"
            )
        print(f"{name:28} {'ratio':9} {best['generate'] / best['ours']:7.2f}", flush=True)
        results[name] = {side: count / best[side] for side in sides}
    if results:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "generation.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
