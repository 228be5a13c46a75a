"""The reward of the run: did the answer do what its prompt asked for?"""

import re

from rlhf.rewards import completion_text


def one_short_sentence(completions, **_):
    """1 for a single sentence of 4 to 20 words that ends with a full stop, else 0."""
    return [float(_fits(completion_text(completion))) for completion in completions]


def _fits(text: str) -> bool:
    text = text.strip()
    sentences = re.findall(r"[.!?](?=\s|$)", text)
    return "\n" not in text and text.endswith(".") and len(sentences) == 1 and 4 <= len(text.split()) <= 20
