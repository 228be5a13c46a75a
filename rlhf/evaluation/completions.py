"""What a model says: greedy answers to the prompts of a data set."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.data.formats import Turns


def prompts_of(rows: Dataset, count: int) -> list[Turns]:
    """The first ``count`` different prompts: the ``prompt`` column, or a conversation's first turns up to an answer."""
    prompts: list[Turns] = []
    for row in rows if count else []:
        prompt = _prompt(row)
        if prompt and prompt not in prompts:
            prompts.append(prompt)
        if len(prompts) == count:
            break
    return prompts


def _prompt(row: dict[str, Any]) -> Turns:
    if row.get("prompt") is not None:
        return row["prompt"]
    turns = row.get("messages") or row.get("conversations") or row.get("chosen") or []
    if isinstance(turns, str):
        return ""
    first = next((i for i, turn in enumerate(turns) if turn.get("role", turn.get("from")) in ("assistant", "gpt")), 0)
    return turns[:first]


@torch.no_grad()
def complete(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[Turns], max_new_tokens: int) -> list[str]:
    """Greedy completions, one prompt at a time: no padding, so nothing depends on the company a prompt keeps."""
    model.eval()
    completions = []
    for prompt in prompts:
        if isinstance(prompt, str):
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            inputs = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        inputs = {k: v.to(model.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        completions.append(str(tokenizer.decode(output[0, inputs["input_ids"].size(1) :], skip_special_tokens=True)))
    return completions
