"""What a model says: greedy answers to the prompts of a data set."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.data import Dialogue, RowFormat, answer_end_ids, encode_prompt
from rlhf.data.formats import Turns, canonical, prompt_dialogue


def prompts_of(rows: Dataset, count: int, form: RowFormat | None = None) -> list[Dialogue]:
    """The first ``count`` different prompts, in the form that is trained; rows without one are passed by."""
    prompts: list[Dialogue] = []
    form = form or RowFormat()
    for row in rows if count else []:
        try:
            prompt = prompt_dialogue(canonical(row, form), form)
        except ValueError:
            continue
        if prompt.prompt and prompt not in prompts:
            prompts.append(prompt)
        if len(prompts) == count:
            break
    return prompts


@torch.no_grad()
def complete(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[Dialogue] | list[Turns], max_new_tokens: int
) -> list[str]:
    """Greedy completions, one prompt at a time: no padding, so nothing depends on the company a prompt keeps.

    They end at EOS, at the end of a turn of the chat template, or where ``model.generation_config`` says.
    """
    model.eval()
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = {*answer_end_ids(tokenizer), *(named if isinstance(named, list) else [named])} - {None}
    completions = []
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
        )
        completions.append(str(tokenizer.decode(output[0, ids.size(1) :], skip_special_tokens=True)))
    return completions
