"""A conversation as one text, and where in it the assistant's answers stand."""

from dataclasses import dataclass

from rlhf.data.answer_spans import AnswerSpans, special_token_ends
from rlhf.data.marks import MARKS, THOUGHT_TAG, Marked, Note, lost_parts, mark_messages
from rlhf.data.messages import ASSISTANT, REASONING_KEYS, Message, is_trained
from rlhf.data.prompts import common_length
from rlhf.data.templates import ChatTemplate


@dataclass(frozen=True)
class Rendering:
    """A conversation as text.

    Args:
        text: The rendering.
        answers: First and last character (exclusive) of each scored answer, in order.
        needs_eos: Whether no token of the template ends the last answer.
        notes: What the template leaves out.
    """

    text: str
    answers: list[tuple[int, int]]
    needs_eos: bool = False
    notes: tuple[Note, ...] = ()

    @property
    def loses_reasoning(self) -> bool:
        """Whether the reasoning of an answer that is trained is not in the text."""
        return any(note.kind == "lost reasoning" for note in self.notes)


def split_prefill(prompt: list[Message], completion: list[Message]) -> tuple[list[Message], int, int]:
    """Join prompt and completion; an answer behind a prompt that ends with the assistant's turn continues that turn.

    Args:
        prompt: Messages before the completion.
        completion: The messages that are trained.

    Returns:
        All messages, the index of the first one that is answered, and how many of its characters are in the prompt.
    """
    all_messages = [*prompt, *completion]
    if not prompt or not completion:
        return all_messages, len(prompt), 0
    begun_turn, continuation = prompt[-1], completion[0]
    # Only text can be continued in the middle; calls and other parts are rendered as a whole.
    are_both_assistant = begun_turn["role"] == continuation["role"] == ASSISTANT
    are_both_text = isinstance(begun_turn.get("content"), str) and isinstance(continuation.get("content"), str)
    if not (are_both_assistant and are_both_text) or begun_turn.get("tool_calls"):
        return all_messages, len(prompt), 0
    # Keys of the answer come last: its weight decides whether the turn is trained.
    joined_turn = {**begun_turn, **continuation, "content": begun_turn["content"] + continuation["content"]}
    return [*prompt[:-1], joined_turn, *completion[1:]], len(prompt) - 1, len(begun_turn["content"])


def locate_answers(template: ChatTemplate, messages: list[Message], first: int, prefill: int = 0) -> Rendering:
    """Render messages and find the answers among them.

    Args:
        template: The chat template.
        messages: The conversation.
        first: Index of the first message that may be an answer.
        prefill: Characters of that message that belong to the prompt.

    Returns:
        The text, and the answers whose weight is not 0.

    Raises:
        ValueError: The template refuses the conversation.
    """
    rendered_text = template.render(messages)
    scored_indices = [index for index, message in enumerate(messages) if index >= first and is_trained(message)]
    marked_rendering = _mark_and_render(template, messages, first, prefill, rendered_text, scored_indices)
    if marked_rendering is None:
        return _locate_by_prefix(template, messages, scored_indices, rendered_text)
    marked_messages, rendering = marked_rendering
    notes = lost_parts(template, marked_messages, rendering, scored_indices)
    answer_spans = AnswerSpans(template, marked_messages, rendering)

    needs_eos = False
    # If the template marks answers itself, its marks count.
    marked_spans = answer_spans.generation_spans(scored_indices)
    if marked_spans is None:
        marked_spans, needs_eos = answer_spans.written_spans(scored_indices, prefilled=first if prefill else None)
    # The marks are the template author's choice, so they are followed, but a model that learns no end never stops.
    elif marked_spans and answer_spans.leaves_out_end(scored_indices[-1], marked_spans[-1][1]):
        notes = (*notes, Note("the template's {% generation %} marks leave out what ends an answer: it is not learned"))
    # Spans were found in the text with marks; ids are made of the text without.
    answers = [
        (answer_spans.without_marks(span_start), answer_spans.without_marks(span_end))
        for span_start, span_end in marked_spans
    ]
    return Rendering(rendered_text, answers, needs_eos, notes)


def _mark_and_render(
    template: ChatTemplate, messages: list[Message], first: int, prefill: int, text: str, scored: list[int]
) -> tuple[Marked, str] | None:
    """The conversation with marks, and its rendering; None if the marks change more than themselves.

    Marks must not change the text around them, or positions in the two renderings differ. They do where a template
    compares what a message holds; often it is the name of a function, so that is left unmarked in a second try.
    """
    # Of two tries the first finds more: a call without arguments has no other mark than that of its name.
    for mark_names in (True, False):
        marked_messages = mark_messages(messages, first, prefill, mark_names)
        rendering = template.render(marked_messages.messages)
        has_all_marks = mark_names or all(marked_messages.parts[index] for index in scored)
        if has_all_marks and MARKS.sub("", rendering) == text:
            return marked_messages, rendering
    return None


def _locate_by_prefix(template: ChatTemplate, messages: list[Message], scored: list[int], text: str) -> Rendering:
    """Find answers without marks: an answer is the text behind the rendering of all messages before it.

    This is right where the template rewrites no earlier turn. Of the others, only the last answer is used.
    """
    answers: list[tuple[int, int]] = []
    needs_eos = False
    for message_index in scored:
        rendered_prompt = template.render_prompt(messages[:message_index])
        closed_text = template.render(messages[: message_index + 1])
        answer_start = len(rendered_prompt)
        answer_stop = common_length(closed_text, text)
        if not text.startswith(rendered_prompt):  # the template rewrote an earlier turn
            if message_index != scored[-1]:
                continue
            answer_start = common_length(rendered_prompt, text)
        token_ends = special_token_ends(template.tokenizer, text, answer_start, answer_stop)
        needs_eos = not token_ends
        answer_end = token_ends[-1] if token_ends else answer_start + len(text[answer_start:answer_stop].rstrip())
        answers.append((answer_start, answer_end))
    return Rendering(text, answers, needs_eos)


def locate_lost_answer(template: ChatTemplate, messages: list[Message]) -> Rendering:
    """Write the last message as the model would write it, for a template that leaves out its reasoning.

    Args:
        template: The chat template.
        messages: A conversation that ends with an answer.

    Returns:
        The prompt as the model is given it, and behind it reasoning and answer, up to the end that the template writes.

    Raises:
        ValueError: The template refuses the conversation.
    """
    usual_rendering = locate_answers(template, messages, len(messages) - 1)
    written_answer = ""
    if usual_rendering.answers:
        answer_start, answer_end = usual_rendering.answers[-1]
        written_answer = usual_rendering.text[answer_start:answer_end]
    # The reasoning brings the line breaks behind it along.
    whole_answer = _reasoning_text(messages[-1]) + written_answer.lstrip()
    rendered_prompt = template.render_prompt(messages[:-1])
    # The prompt may end with a beginning of the answer already, such as <think>.
    overlap = next(
        length for length in range(len(whole_answer), -1, -1) if rendered_prompt.endswith(whole_answer[:length])
    )
    whole_text = rendered_prompt + whole_answer[overlap:]
    # An answer that the template leaves out as a whole has no end of the template's either.
    return Rendering(
        whole_text, [(len(rendered_prompt), len(whole_text))], usual_rendering.needs_eos or not usual_rendering.answers
    )


def _reasoning_text(message: Message) -> str:
    """The reasoning of an answer as text: from a key of its own, or all before the last tag in its content."""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    if reasoning is not None:
        # The form of most models that think: the template cannot be asked, as it leaves reasoning out.
        return f"<think>\n{reasoning}\n</think>\n\n"
    content = str(message.get("content") or "")
    last_stretch = THOUGHT_TAG.split(content)[-1]
    return content[: len(content) - len(last_stretch.lstrip())]
