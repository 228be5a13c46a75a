"""A judge that PPO has not been trained against: a head on the mean of an answer's states.

python mean_state_judge.py MODEL DATA OUT adds its rewards to OUT/ppo.json

A logistic regression on the mean state of MODEL's layer 6, with the length as offset. The reward model of PPO reads
the last token alone. OUT/states.pt is what frozen_reward.py kept, or is made here.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from frozen_reward import all_states, fit
from reward_choices import differences, lengths
from rows import one_sentence_prompts, read
from settings import REWARD_LAYERS
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

STATES, PENALTY = "mean, layer 6", 0.1  # reward_choices.py chose among them by folds of training prompts
NAME = "mean-state"


def fitted(source: str, data: Path, out: Path) -> Tensor:
    """The weights of the judge."""
    rows = {part: read(data, part) for part in ("train", "eval")}
    features = differences(all_states(source, REWARD_LAYERS, rows, out / "states.pt")["train"], STATES)
    length = lengths(rows["train"])[:, [0]]
    length_weight = fit(length, torch.zeros(len(length), dtype=torch.float64), 0.0)
    scale = features.std(0) + 1e-6
    return fit(features / scale, length @ length_weight, PENALTY) / scale


@torch.inference_mode()
def rewards(source: str, weights: Tensor, prompts: list[Any], texts: list[str]) -> list[float]:
    """The reward of each answer."""
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers = REWARD_LAYERS
    tokenizer = AutoTokenizer.from_pretrained(source)
    trunk = AutoModel.from_pretrained(source, config=config, dtype=torch.bfloat16).eval()
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        begin = len(tokenizer(start, add_special_tokens=False)["input_ids"])
        ids = tokenizer(start + text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        hidden = trunk(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        found.append(float(hidden[begin:].float().mean(0).double() @ weights))
    return found


def main() -> None:
    source, data, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    weights = fitted(source, data, out)
    questions = one_sentence_prompts(data, "eval")
    file = out / "ppo.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    for part in ("before", "after"):
        prompts = [questions[entry["prompt"]]["prompt"] for entry in results[part]]
        scores = rewards(source, weights, prompts, [entry["text"] for entry in results[part]])
        for entry, score in zip(results[part], scores, strict=True):
            entry[NAME] = score
    file.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
