"""Health of what a model writes: its samples at the last step."""

import zlib
from typing import Any

from rlhf.runs.figures import Figures
from rlhf.runs.findings import Check, Finding, FindingOrNot

# Text that zlib makes smaller than this repeats itself; Whisper uses the same limit (arXiv 2212.04356, section 4.5).
COMPRESSION = 2.4
MIN_CHARACTERS = 200  # shorter texts hardly compress
MANY = 0.5  # share of the samples
MIN_PROMPTS = 3


def text_of(messages: Any) -> str:
    """A prompt or completion as text.

    Args:
        messages: text, or a list of messages.

    Returns:
        The contents of the messages, a line each.
    """
    if isinstance(messages, str):
        return messages
    if not isinstance(messages, list):
        return ""
    contents = [message.get("content") if isinstance(message, dict) else message for message in messages]
    return "\n".join(content for content in contents if isinstance(content, str))


def samples_repeat(figures: Figures) -> FindingOrNot:
    """Samples in loops."""
    long_texts = [text for _, text in _last_samples(figures) if len(text) >= MIN_CHARACTERS]
    if not long_texts:
        return None
    repeated = [text for text in long_texts if _compression(text) > COMPRESSION]
    if len(repeated) <= MANY * len(long_texts):
        return []
    return [
        Finding(
            "warning",
            "Samples repeat themselves.",
            f"{len(repeated)} of {len(long_texts)} long samples at the last step compress by more than {COMPRESSION}",
            "Lower learning_rate, train for fewer steps, and check that rows end with the end token.",
        )
    ]


def samples_differ(figures: Figures) -> FindingOrNot:
    """The same completion, or an empty one, for different prompts."""
    samples = _last_samples(figures)
    if len({prompt for prompt, _ in samples}) < MIN_PROMPTS:
        return None
    texts = [text.strip() for _, text in samples]
    empty = sum(not text for text in texts)
    if empty > MANY * len(texts):
        return [
            Finding(
                "warning",
                "Samples are empty: the model ends at once.",
                f"{empty} of {len(texts)} at the last step",
                "Check that rows have an answer that is scored (`rlhf data`), and the chat template.",
            )
        ]
    if len(set(texts)) > 1:
        return []
    return [
        Finding(
            "warning",
            "All prompts get the same answer.",
            f"{len(texts)} samples at the last step",
            "Lower learning_rate, raise beta, and check that the reward depends on the prompt.",
        )
    ]


def _last_samples(figures: Figures) -> list[tuple[str, str]]:
    """Prompt and completion of the last step that has samples."""
    entries = figures.run.samples or figures.run.completions
    if not entries:
        return []
    last_step = entries[-1].get("step")
    return [
        (text_of(entry.get("prompt")), text_of(entry.get("completion")))
        for entry in entries
        if entry.get("step") == last_step
    ]


def _compression(text: str) -> float:
    encoded = text.encode()
    return len(encoded) / len(zlib.compress(encoded))


SAMPLE_CHECKS = (
    Check("Samples do not repeat themselves", samples_repeat),
    Check("Samples differ, and are not empty", samples_differ),
)
