"""Greedy answers of a model to the prompts of a data set."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.data import Dialogue, RowFormat, answer_end_ids, encode_prompt
from rlhf.data.formats import canonical, prompt_dialogue
from rlhf.data.messages import Turns


def prompts_of(rows: Dataset, count: int, form: RowFormat | None = None) -> list[Dialogue]:
    """Read the first prompts of a data set, exactly as they are trained. Rows without a prompt are skipped.

    Args:
        rows: Rows of text in any of the known columns.
        count: How many different prompts.
        form: How rows are read.

    Returns:
        At most ``count`` prompts.
    """
    form = form or RowFormat()
    prompts: list[Dialogue] = []
    for row in rows:
        if len(prompts) == count:
            break
        try:
            dialogue = prompt_dialogue(canonical(row, form), form)
        except ValueError:
            continue
        # Many data sets hold several answers to one prompt, and so the prompt several times.
        if dialogue.prompt and dialogue not in prompts:
            prompts.append(dialogue)
    return prompts


@torch.no_grad()
def complete(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Dialogue | Turns], max_new_tokens: int
) -> list[str]:
    """Complete prompts greedily, one at a time: without padding no answer depends on the other prompts.

    An answer ends at EOS, at the end of a turn of the chat template, or where ``model.generation_config`` says.

    Args:
        model: A causal LM of transformers.
        tokenizer: The tokenizer of the model.
        prompts: Text or messages.
        max_new_tokens: Longest answer in tokens.

    Returns:
        An answer for each prompt, without special tokens.
    """
    model.eval()
    end_ids = _end_ids(model, tokenizer)
    completions = []
    for prompt in prompts:
        prompt_ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
        generated = model.generate(
            input_ids=prompt_ids,
            # Without a mask, `generate` guesses one from the pad id, which may occur in the prompt.
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,  # a generation config with options of sampling would warn
            top_p=None,
            top_k=None,
            eos_token_id=end_ids or None,
            # A single prompt is never padded; the id only keeps `generate` from warning.
            pad_token_id=min(end_ids, default=0),
        )
        # `generate` returns the prompt too.
        answer_ids = generated[0, prompt_ids.size(1) :]
        completions.append(str(tokenizer.decode(answer_ids, skip_special_tokens=True)))
    return completions


def _end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the tokenizer's, and those of the model's generation config (one id, a list or None)."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured_ids = configured if isinstance(configured, list) else [configured]
    return sorted({*answer_end_ids(tokenizer), *configured_ids} - {None})
