"""The reward of the run: is the answer the right one, as a whole sentence?"""

from rlhf.rewards import completion_text


def whole_sentence(completions, chosen, **_):
    """1 for the chosen answer of the row, 0.5 for another whole sentence of at least four words, else 0."""
    texts = [completion_text(completion).strip() for completion in completions]
    answers = [completion_text(answer).strip() for answer in chosen]
    return [1.0 if text == answer else 0.5 * _is_sentence(text) for text, answer in zip(texts, answers, strict=True)]


def _is_sentence(text: str) -> bool:
    return text.endswith(".") and len(text.split()) >= 4
