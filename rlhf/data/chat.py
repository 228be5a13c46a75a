"""From a dialogue to token ids: one rendering, one encoding, and which of the tokens the model is to write.

A conversation is rendered once and tokenised as a whole, so that its ids are those of its text. Prompt, turns and
answers are cut out of it by characters. A token that reaches over the border before an answer belongs to the answer.
"""

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.data.formats import Dialogue
from rlhf.data.messages import ASSISTANT, Message, Turns, is_trained
from rlhf.data.prompts import common_length
from rlhf.data.rendering import Rendering, locate_answers, locate_lost_answer, split_prefill
from rlhf.data.templates import PROBE, ChatTemplate
from rlhf.data.token_offsets import TokenizedText, eos_id, tokenize, tokenize_plain


class Encoded(NamedTuple):
    """A dialogue as ids.

    Args:
        prompt_ids: The ids before every completion.
        completions: For each, its ids behind the prompt's and whether each of them is scored.
        answers: How many of the assistant's turns are in the completions.
        scored: How many of these have a scored token.
        notes: What the template leaves out, a line each.
    """

    prompt_ids: list[int]
    completions: list[tuple[list[int], list[bool]]]
    answers: int
    scored: int
    notes: tuple[str, ...] = ()


def encode(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, split: bool = False) -> Encoded:
    """Encode a prompt with its completions.

    Scored are a text completion, or the assistant's turns of a completion whose ``weight`` is not 0, each up to and
    including the token that ends it. The text behind the last scored answer is left out.

    Args:
        tokenizer: Has a chat template, unless the dialogue is text.
        dialogue: Text or messages.
        split: Whether each completion is one answer. It is then written as the model would write it behind its prompt,
            also if the template leaves out its reasoning.

    Returns:
        Ids of the prompt and of each completion.

    Raises:
        ValueError: There is no chat template or no EOS token, or the template refuses the conversation.
    """
    if isinstance(dialogue.prompt, str):
        return _encode_text(tokenizer, dialogue)
    template = ChatTemplate.of(tokenizer, dialogue)
    encoded_answers = [
        _encode_turns(template, dialogue.prompt, completion, split) for completion in dialogue.completions
    ]
    if not encoded_answers:
        return Encoded(encode_prompt(tokenizer, dialogue), [], 0, 0)
    # The prompt ends where the first of the answers begins. If a token reaches over that border, only the answers that
    # begin with the same token share it.
    shared_length = min(encoded_answer.border for encoded_answer in encoded_answers)
    shared_length = min(shared_length, common_length(*(encoded_answer.ids for encoded_answer in encoded_answers)))
    return Encoded(
        prompt_ids=encoded_answers[0].ids[:shared_length],
        completions=[encoded_answer.behind(shared_length) for encoded_answer in encoded_answers],
        answers=sum(encoded_answer.answers for encoded_answer in encoded_answers),
        scored=sum(encoded_answer.scored_answers for encoded_answer in encoded_answers),
        notes=tuple(dict.fromkeys(note for encoded_answer in encoded_answers for note in encoded_answer.notes)),
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Turns | Dialogue) -> list[int]:
    """Encode the text that a policy is given to answer.

    Args:
        tokenizer: Has a chat template, unless the prompt is text.
        prompt: Text, or turns. These are rendered up to the place where the assistant begins to write; an assistant's
            turn at the end is continued.

    Returns:
        The ids.

    Raises:
        ValueError: As :func:`encode`.
    """
    dialogue = prompt if isinstance(prompt, Dialogue) else Dialogue(prompt)
    if isinstance(dialogue.prompt, str):
        return tokenize_plain(tokenizer, dialogue.prompt, ends=False).ids
    template = ChatTemplate.of(tokenizer, dialogue)
    is_continued = bool(dialogue.prompt) and dialogue.prompt[-1]["role"] == ASSISTANT
    if is_continued:
        rendered_text = template.render(dialogue.prompt, continue_last=True)
    else:
        rendered_text = template.render_prompt(dialogue.prompt)
    return tokenize(tokenizer, rendered_text, add_special_tokens=False).ids


def encode_reply(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, reply: Message, last: int) -> list[int]:
    """Encode the text between an answer of a policy and its next answer.

    Args:
        tokenizer: Has a chat template, unless the dialogue is text.
        dialogue: The prompt, with tools and options of the template.
        reply: The user's or a tool's turn; of a text prompt, its content alone is encoded.
        last: The last id of the answer. The token that ends a turn is not written twice.

    Returns:
        The ids that follow the answer.

    Raises:
        ValueError: The template refuses the conversation.
    """
    if isinstance(dialogue.prompt, str):
        return tokenize(tokenizer, str(reply["content"]), add_special_tokens=False).ids
    template = ChatTemplate.of(tokenizer, dialogue)
    # Without the system's turn: some templates write it before the last question, and so behind the answer.
    question = [turn for turn in dialogue.prompt if turn["role"] != "system"] or [{"role": "user", "content": "?"}]
    turns, _, _ = split_prefill(question, [{"role": ASSISTANT, "content": PROBE}])
    rendered_text = template.render_prompt([*turns, reply])
    rendered_tokens = tokenize(tokenizer, rendered_text, add_special_tokens=False)
    answer_end = rendered_text.rindex(PROBE) + len(PROBE)  # a probe stands for the answer, whose text is not needed
    reply_ids = rendered_tokens.ids[rendered_tokens.first_token_after(answer_end) :]
    # The answer ended with `last`. If the rendering begins with the same end of the turn, it is skipped.
    if last in reply_ids:
        position = reply_ids.index(last)
        is_turn_end = not str(tokenizer.decode(reply_ids[:position])).strip()
        if is_turn_end:
            return reply_ids[position + 1 :]
    return reply_ids


def split_turns(dialogue: Dialogue) -> list[Dialogue]:
    """Split a conversation into one dialogue for each answer, whose prompt is all that comes before it.

    Args:
        dialogue: A conversation; text stays as it is.

    Returns:
        The dialogues, without those whose answer has weight 0.
    """
    if isinstance(dialogue.prompt, str):
        return [dialogue]
    dialogues = []
    for completion in dialogue.completions:
        conversation = [*dialogue.prompt, *_messages(completion)]
        for turn_index in range(len(dialogue.prompt), len(conversation)):
            if is_trained(conversation[turn_index]):
                answer = [conversation[turn_index]]
                dialogues.append(
                    Dialogue(conversation[:turn_index], (answer,), dialogue.tools, dialogue.template_kwargs)
                )
    return dialogues


# Text


def _encode_text(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> Encoded:
    prompt = str(dialogue.prompt)
    if not dialogue.completions:
        return Encoded(encode_prompt(tokenizer, prompt), [], 0, 0)
    whole_texts = [prompt + str(completion) for completion in dialogue.completions]
    encoded_texts = [tokenize_plain(tokenizer, whole_text, ends=True) for whole_text in whole_texts]
    # If a token reaches over the border in one answer, the others begin there too: all are scored on the same text.
    shared_length = min(encoded_text.first_token_after(len(prompt)) for encoded_text in encoded_texts)
    shared_length = min(shared_length, common_length(*(encoded_text.ids for encoded_text in encoded_texts)))
    completions = [
        (encoded_text.ids[shared_length:], [True] * (len(encoded_text.ids) - shared_length))
        for encoded_text in encoded_texts
    ]
    return Encoded(encoded_texts[0].ids[:shared_length], completions, len(encoded_texts), len(encoded_texts))


# Conversations


class _EncodedTurns(NamedTuple):
    """One completion behind its prompt."""

    ids: list[int]
    is_scored: list[bool]
    border: int  # number of ids before the first one that is scored
    opens_with_answer: bool  # the completion begins with an answer, not with another's turn
    answers: int
    scored_answers: int
    notes: tuple[str, ...]

    def behind(self, shared: int) -> tuple[list[int], list[bool]]:
        """The ids behind the ``shared`` ones, and whether each is scored."""
        before_border = self.is_scored[shared : self.border]
        if self.opens_with_answer:
            # Another answer begins earlier (this one behind an empty thought, say): both are scored on all ids that
            # they do not share, or the two log-probs would be of different events.
            before_border = [True] * len(before_border)
        return self.ids[shared:], before_border + self.is_scored[self.border :]


def _encode_turns(template: ChatTemplate, prompt: list[Message], completion: Turns, split: bool) -> _EncodedTurns:
    tokenizer = template.tokenizer
    messages, first_answered, prefill = split_prefill(prompt, _messages(completion))
    rendering = locate_answers(template, messages, first_answered, prefill)
    template_notes = rendering.notes
    if split and rendering.loses_reasoning:
        rendering = locate_lost_answer(template, messages)
        template_notes = rendering.notes
    elif split:  # reasoning that earlier turns lose is learned from rows of their own
        template_notes = tuple(note for note in template_notes if note.kind != "earlier reasoning")

    # The template writes special tokens itself; added once more, BOS would be there twice.
    rendered_tokens = tokenize(tokenizer, rendering.text, add_special_tokens=False)
    spans = _token_spans(rendered_tokens, rendering)
    token_ids, is_scored = list(rendered_tokens.ids), [False] * len(rendered_tokens.ids)
    for span_start, span_stop in spans:
        is_scored[span_start:span_stop] = [True] * (span_stop - span_start)
    # The text behind the last answer is left out: the model never writes it, and it would only cost time.
    scored_end = max((span_stop for _, span_stop in spans), default=len(token_ids))
    token_ids, is_scored = token_ids[:scored_end], is_scored[:scored_end]
    if spans and rendering.needs_eos and token_ids[-1:] != [tokenizer.eos_token_id]:
        token_ids.append(eos_id(tokenizer))
        is_scored.append(True)

    answers = sum(message["role"] == ASSISTANT for message in messages[first_answered:])
    scored_spans = sum(span_start < span_stop for span_start, span_stop in spans)
    return _EncodedTurns(
        ids=token_ids,
        is_scored=is_scored,
        border=min((span_start for span_start, _ in spans), default=len(token_ids)),
        opens_with_answer=is_trained(messages[first_answered]),
        answers=answers,
        scored_answers=min(scored_spans, answers),  # an answer may have several spans
        notes=tuple(note.text for note in template_notes),
    )


def _token_spans(tokens: TokenizedText, rendering: Rendering) -> list[tuple[int, int]]:
    """First and last token (exclusive) of each answer."""
    return [
        (tokens.first_token_after(answer_start), tokens.first_token_from(answer_end))
        for answer_start, answer_end in rendering.answers
    ]


def _messages(turns: Turns) -> list[Message]:
    if isinstance(turns, str):
        raise ValueError("the prompt is a list of messages and the completion is text: give both the same form")
    return turns


# The ends of answers


def answer_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: EOS, and the token with which the chat template ends the assistant's turn.

    Args:
        tokenizer: With or without a chat template.

    Returns:
        One or two ids; none without EOS and template.
    """
    end_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not tokenizer.chat_template:
        return end_ids
    shortest_dialogue = Dialogue([{"role": "user", "content": "?"}], ([{"role": ASSISTANT, "content": "!"}],))
    try:
        encoded = encode(tokenizer, shortest_dialogue)
    except ValueError:  # the template refuses so short a conversation
        return end_ids
    completion_ids, _ = encoded.completions[0]
    return end_ids if completion_ids[-1] in end_ids else [*end_ids, completion_ids[-1]]


def answer_ends(rows: Any, tokenizer: PreTrainedTokenizerBase, look_at: int = 64) -> list[int]:
    """The ids of special tokens that end answers in tokenised rows.

    Args:
        rows: A ``Dataset`` or an ``IterableDataset`` of tokenised rows. For prompts without answers the template
            decides, if they are conversations.
        tokenizer: Made the rows.
        look_at: How many of the first rows are read.

    Returns:
        Different ids, in order of their first place.
    """
    is_sized = hasattr(rows, "__len__")
    first_rows = [rows[index] for index in range(min(len(rows), look_at))] if is_sized else list(rows.take(look_at))
    if first_rows and not _labels_of(first_rows[0]):
        is_text = isinstance(first_rows[0].get("prompt"), str)
        return [] if is_text else answer_end_ids(tokenizer)
    special_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    end_tokens: dict[int, None] = {}  # a dict keeps the order
    for row in first_rows:
        for token_labels in _labels_of(row):
            for token_label, next_label in zip(token_labels, [*token_labels[1:], -100], strict=True):
                if token_label in special_ids and next_label == -100:  # the last token of an answer
                    end_tokens[token_label] = None
    return list(end_tokens)


def _labels_of(row: dict[str, Any]) -> list[list[int]]:
    """The labels of each sequence of a tokenised row; the ids of answers that are scored as a whole."""
    if "input_ids" in row:
        return [row["labels"]]
    return row.get("labels") or [row[key] for key in ("chosen_ids", "rejected_ids") if key in row]
