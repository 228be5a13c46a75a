"""A reward model in minutes: the first layers of a model stay as they are, and a head on them is fitted exactly.

python frozen_reward.py MODEL LAYERS DATA OUT

The head is a logistic regression on the last token's hidden states of chosen and rejected answers; the length of the
answers is an offset, so that the head learns what the length does not tell. Five folds of prompts choose the penalty.
The states are kept in OUT/states.pt. Delete the file after a change of the data or the model.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rows import length_advantage, question, read
from torch import Tensor
from torch.nn.functional import softplus
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

PENALTIES = (0.03, 0.1, 0.2, 0.3, 0.6, 1.0)
FOLDS = 5


@torch.inference_mode()
def answer_states(model: Any, tokenizer: Any, row: dict[str, Any], layers: Sequence[int]) -> Tensor:
    """Hidden states of the chosen and the rejected answer.

    Args:
        model: without a head.
        tokenizer: its tokenizer.
        row: a pair.
        layers: to read; 1 is the first.
    Returns:
        The mean over the answer's tokens and the state of its last token, [2, layers, 2, width].
    """
    start = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    begin = len(tokenizer(start, add_special_tokens=False)["input_ids"])
    states = []
    for name in ("chosen", "rejected"):
        ids = tokenizer(start + row[name][-1]["content"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        output = model(torch.tensor([ids], device=model.device), use_cache=False, output_hidden_states=True)
        hidden = torch.stack([output.hidden_states[layer][0] for layer in layers]).float()
        states.append(torch.stack([hidden[:, begin:].mean(1), hidden[:, -1]], 1).half().cpu())
    return torch.stack(states)


def all_states(source: str, count: int, rows: dict[str, list[dict[str, Any]]], file: Path) -> dict[str, Tensor]:
    """The states of all answers. They take most of the time, and are kept in a file.

    Args:
        source: folder of the model.
        count: how many of its layers are used.
        rows: pairs of each part.
        file: where the states are kept.
    Returns:
        For each part [pairs, 2, 3, 2, width]: chosen and rejected, three layers, mean and last token.
    """
    if not file.exists():
        config = AutoConfig.from_pretrained(source)
        config.num_hidden_layers = count
        tokenizer = AutoTokenizer.from_pretrained(source)
        trunk = AutoModel.from_pretrained(source, config=config, dtype=torch.bfloat16).eval()
        trunk.to("cuda" if torch.cuda.is_available() else "cpu")
        layers = (count // 2, count - 1, count)
        found = {
            part: torch.stack([answer_states(trunk, tokenizer, row, layers) for row in rows[part]]) for part in rows
        }
        torch.save(found, file)
    kept: dict[str, Tensor] = torch.load(file)
    return kept


def fit(differences: Tensor, offsets: Tensor, penalty: float) -> Tensor:
    """The weights of a logistic regression without constant, whose label is always 1."""
    weights = torch.zeros(differences.size(1), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = softplus(-(differences @ weights + offsets)).mean() + penalty * weights @ weights
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]  # LBFGS takes what returns a tensor
    return weights.detach()


def folds_of(rows: Sequence[dict[str, Any]]) -> Tensor:
    """The fold of each row; rows of one prompt have the same."""
    questions = sorted({question(row) for row in rows})
    random.Random(0).shuffle(questions)
    fold_of = {text: index % FOLDS for index, text in enumerate(questions)}
    return torch.tensor([fold_of[question(row)] for row in rows])


def held_out_loss(differences: Tensor, offsets: Tensor, folds: Tensor, penalty: float) -> float:
    """The mean loss of the pairs of each fold under a fit to the others."""
    total = 0.0
    for fold in range(FOLDS):
        kept = folds != fold
        weights = fit(differences[kept], offsets[kept], penalty)
        total += float(softplus(-(differences[~kept] @ weights + offsets[~kept])).sum())
    return total / len(differences)


def with_head(source: str, layers: int, weights: Tensor) -> Any:
    """A reward model of the first layers and a head with these weights."""
    config = AutoConfig.from_pretrained(source, num_hidden_layers=layers, num_labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(source, config=config, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.copy_(weights[None])
    return model


def main() -> None:
    source, layers, data, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    rows = {part: read(data, part) for part in ("train", "eval")}
    kept = all_states(source, layers, rows, out / "states.pt")
    states = {part: kept[part][:, :, -1, -1].double() for part in rows}  # the last token in the last layer
    differences = states["train"][:, 0] - states["train"][:, 1]
    scale = differences.std(0) + 1e-6
    offsets = torch.tensor([length_advantage(row) for row in rows["train"]], dtype=torch.float64)
    folds = folds_of(rows["train"])
    losses = {penalty: held_out_loss(differences / scale, offsets, folds, penalty) for penalty in PENALTIES}
    best = min(losses, key=losses.__getitem__)
    weights = fit(differences / scale, offsets, best) / scale
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = with_head(source, layers, weights)
    model.config.pad_token_id = tokenizer.unk_token_id  # one that ends no answer
    folder = out / "models" / "reward-frozen"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "whole").touch()
    found = {"losses": losses, "penalty": best, "lines": [], "eval": (states["eval"] @ weights).tolist()}
    (out / "reward-frozen.json").write_text(json.dumps(found), encoding="utf-8")
    print(f"penalty {best}: held-out loss {losses[best]:.4f} of {len(differences)} pairs")


if __name__ == "__main__":
    main()
