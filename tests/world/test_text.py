"""Public reports about what is learned of a conversation, and where its answers begin and end."""

import pytest
from conftest import tiny_model
from datasets import Dataset
from kinds import FAMILIES, as_written, byte_level

from rlhf.data import (
    Dialogue,
    answer_end_ids,
    answer_ends,
    encode,
    encode_prompt,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_sft,
)
from rlhf.data.chat import split_turns
from rlhf.data.encoding import Reading
from rlhf.evaluation import prompts_of
from rlhf.models import add_answer_ends


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def spoken():
    return byte_level()


def with_template(tokenizer, family):
    tokenizer.chat_template = FAMILIES[family].template
    return tokenizer


def answers(tokenizer, found):
    """The text of each stretch that is learned."""
    runs, before = [], False
    for token, scored in zip(*found.completions[0], strict=True):
        if scored and not before:
            runs.append([])
        if scored:
            runs[-1].append(token)
        before = scored
    return [tokenizer.decode(run) for run in runs]


CALL = [{"type": "function", "function": {"name": "look", "arguments": {"what": "user", "n": 3}}}]
TOOL = {"role": "tool", "name": "look", "content": "42"}
EARLIER = "the chat template leaves out the reasoning of earlier answers (--split_turns learns it)"


@pytest.mark.parametrize("family", ["Qwen3", "gpt-oss"])
def test_every_answer_is_learned_where_earlier_thoughts_are_hidden(family, spoken):
    """NVIDIA-NeMo/Speech#16284, huggingface/trl#6363: only the last answer was supervised, unnoticed."""
    tokenizer = with_template(spoken, family)
    turns = [user("hello"), said("yes", reasoning_content="maybe"), user("yes"), said("no", reasoning_content="yes")]
    found = encode(tokenizer, Dialogue([], (turns,)))
    ids, scored = as_written(tokenizer, FAMILIES[family].write(turns))
    assert found.prompt_ids + found.completions[0][0] == ids
    assert [False] * len(found.prompt_ids) + found.completions[0][1] == scored
    assert (found.answers, found.scored, found.notes) == (2, 2, (EARLIER,))


def test_thoughts_and_calls_between_tools_are_learned(spoken):
    """axolotl-ai-cloud/axolotl#3088, NVIDIA-NeMo/RL#1181: calls and thoughts, an empty thought as prompt."""
    tokenizer = with_template(spoken, "Qwen3")
    turns = [
        user("how"),
        said("", reasoning_content="maybe", tool_calls=CALL),
        TOOL,
        said("yes"),
        user("no"),
        said("the"),
    ]
    for conversation in (turns, turns[:4]):
        found = encode(tokenizer, Dialogue([], (conversation,)))
        ids, scored = as_written(tokenizer, FAMILIES["Qwen3"].write(conversation))
        assert found.prompt_ids + found.completions[0][0] == ids
        assert [False] * len(found.prompt_ids) + found.completions[0][1] == scored


def test_a_call_by_a_name_at_which_the_template_looks_is_learned(spoken):
    """Llama 3.1's template writes calls of built-in functions in another way."""
    spoken.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for c in m.tool_calls or [] %}"
        "{{ ('<call>' if c.function.name == 'look' else '<|call|>') + c.function.name + c.function.arguments.what }}"
        "{% endfor %}{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    turns = [user("how"), said("", tool_calls=CALL), TOOL, said("yes")]
    assert answers(spoken, encode(spoken, Dialogue([], (turns,)))) == ["<call>lookuser<|im_end|>", "yes<|im_end|>"]


def test_a_thought_that_the_template_cuts_is_named_and_split_turns_learns_it(spoken):
    """huggingface/trl#6766: everything before </think> never reached the loss."""
    tokenizer = with_template(spoken, "DeepSeek-R1")
    thought = "<think>\nmaybe\n</think>\n\n"
    turns = [user("hello"), said(thought + "yes"), user("how"), said(thought + "no")]
    found = encode(tokenizer, Dialogue([], (turns,)))
    assert answers(tokenizer, found) == ["\n\nyes</s>", "\n\nno</s>"]
    assert found.notes[0] == EARLIER
    assert "leaves out 'content' of the role 'assistant' before </think>, which is lost" in found.notes[1]
    rows = [encode(tokenizer, one, split=True) for one in split_turns(Dialogue([], (turns,)))]
    assert [answers(tokenizer, row) for row in rows] == [["maybe\n</think>\n\nyes</s>"], ["maybe\n</think>\n\nno</s>"]]
    assert tokenizer.decode(rows[1].prompt_ids).endswith("yes</s><|User|>how<|Assistant|><think>\n")
    assert all(not row.notes for row in rows)


def test_a_lost_thought_before_a_call_is_learned_with_the_call(spoken):
    """NVIDIA-NeMo/RL#1181: the call stays behind the thought that the template has no word for."""
    spoken.chat_template = FAMILIES["Qwen3"].template.replace("reasoning_content", "hidden")
    turns = [user("how"), said("", reasoning_content="maybe", tool_calls=CALL)]
    (row,) = split_turns(Dialogue([], (turns,)))
    (learned,) = answers(spoken, encode(spoken, row, split=True))
    assert learned.startswith("<think>\nmaybe\n</think>\n\n<call>\n") and learned.endswith("</call><|im_end|>")


def test_each_answer_behind_what_the_model_would_have_seen(spoken):
    """huggingface/trl#6363: --split_turns learns the thoughts that a later rendering hides."""
    tokenizer = with_template(spoken, "Qwen3")
    turns = [user("a"), said("yes", reasoning_content="maybe"), user("b"), said("no", weight=0), user("c"), said("the")]
    rows = split_turns(Dialogue([], (turns,)))
    assert [len(row.prompt) for row in rows] == [1, 5]
    for row in rows:
        found = encode(tokenizer, row, split=True)
        whole = [{k: v for k, v in turn.items() if k != "weight"} for turn in (*row.prompt, *row.completions[0])]
        ids, scored = as_written(tokenizer, FAMILIES["Qwen3"].write(whole))
        assert found.prompt_ids + found.completions[0][0] == ids
        assert sum(found.completions[0][1]) == sum(scored[-len(found.completions[0][0]) :])
    assert answers(tokenizer, encode(tokenizer, rows[0], split=True)) == ["<think>\nmaybe\n</think>\n\nyes<|im_end|>"]


def test_turns_that_are_not_the_assistants_are_not_learned(spoken):
    """PrimeIntellect-ai/prime-rl#978, axolotl-ai-cloud/axolotl#1703: tools' and users' turns, answers of weight 0."""
    tokenizer = with_template(spoken, "ChatML")
    steps = [said("call"), {"role": "tool", "content": "42 cats"}, said("no", weight=0), user("how"), said("yes")]
    found = encode(tokenizer, Dialogue([user("hello")], (steps,)))
    assert answers(tokenizer, found) == ["call<|im_end|>", "yes<|im_end|>"]
    assert (found.answers, found.scored) == (3, 2)


def test_a_turn_that_the_template_does_not_write_is_named(spoken):
    """A developer's turn and keys that a template has no word for."""
    spoken.chat_template = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
        "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    turns = [{"role": "developer", "content": "be kind"}, user("hello"), said("yes", mood="good")]
    notes = encode(spoken, Dialogue([], (turns,), tools=[{"name": "look"}])).notes
    for told in ("'tools'", "message key 'mood' is not read", "leaves out 'content' of the role 'developer'"):
        assert any(told in note for note in notes)


@pytest.mark.parametrize("begun", ["yes", "yes "])
def test_an_answer_that_was_begun_is_continued(begun, spoken):
    """huggingface/transformers#33198: no second header behind a prompt that ends with the assistant."""
    tokenizer = with_template(spoken, "ChatML")
    prompt, rest = [user("hello"), said(begun)], " the cat"[begun.endswith(" ") :]
    found = encode(tokenizer, Dialogue(prompt, ([said(rest)], [said(rest + " sat")])))
    head = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(found.prompt_ids + ids) for ids, _ in found.completions] == [
        head + "yes the cat<|im_end|>",
        head + "yes the cat sat<|im_end|>",
    ]
    assert tokenizer.decode(found.prompt_ids) == head + "yes"
    assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == head + begun


def test_a_template_that_reads_parts_alone_gets_them(spoken):
    """Templates of models that see (Idefics, LLaVA) lost every content that was text."""
    spoken.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% for part in m.content %}{% if part.type == 'text' %}"
        "{{ part.text }}{% endif %}{% endfor %}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    found = encode(spoken, Dialogue([user("hello")], ([said("yes")],)))
    assert spoken.decode(found.prompt_ids) == "<|user|>hello<|end|><|assistant|>"
    assert answers(spoken, found) == ["yes<|end|>"] and not found.notes


def test_a_refusal_of_the_template_is_one_line(spoken):
    """unslothai/unsloth#334, huggingface/transformers#45419: roles must alternate, no system role."""
    tokenizer = with_template(spoken, "Gemma")
    system = {"role": "system", "content": "x"}
    rows = [{"messages": [user("hello"), said("yes")]}, {"messages": [system, user("hello"), said("yes")]}]
    with pytest.raises(ValueError, match=r"row 2: the chat template refuses .*System role not supported.*system, user"):
        tokenize_sft(Dataset.from_list(rows), tokenizer, max_length=64, vocab_size=len(tokenizer))


ENDS = {
    "ChatML": "<|im_end|>",
    "Phi-3": "<|end|>",
    "gpt-oss": "<|return|>",
    "Gemma": "<end_of_turn>",
    "Llama 2": "</s>",
}


@pytest.mark.parametrize("family", ENDS)
def test_the_end_that_is_taught_is_the_end_that_is_used(family, spoken):
    """modelscope/ms-swift#3113, huggingface/open-r1#663: a base model that is taught a template's end goes by it."""
    tokenizer = with_template(spoken, family)
    rows = Dataset.from_list([{"messages": [user("hello"), said("yes"), user("how"), said("the cat")]}] * 2)
    tokenised = tokenize_sft(rows, tokenizer, max_length=128, vocab_size=len(tokenizer))
    end = tokenizer.convert_tokens_to_ids(ENDS[family])
    assert end in answer_ends(tokenised, tokenizer)
    prompts = Dataset.from_list([{"prompt": [user("hello")], "prompt_ids": [5]}])
    assert end in answer_ends(prompts, tokenizer)
    assert set(answer_end_ids(tokenizer)) == {tokenizer.eos_token_id, end}
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = 7
    add_answer_ends(model, answer_ends(tokenised, tokenizer))
    assert {7, end} <= set(model.generation_config.eos_token_id)


def test_marks_of_a_template_that_leave_out_the_end_are_told(spoken):
    """A template's own marks are read; an end outside of them is not learned."""
    spoken.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}"
        "{% endfor %}"
    )
    found = encode(spoken, Dialogue([], ([user("hello"), said("yes"), user("how"), said("no")],)))
    assert answers(spoken, found) == ["yes", "no"]
    assert any("leave out what ends an answer" in note for note in found.notes)


SYSTEM = {"role": "system", "content": "be kind"}
PAIR = {"chosen": [user("how"), said("a")], "rejected": [user("how"), said("b")]}
FORMS = {
    "conversation": {"messages": [SYSTEM, user("how"), said("yes")]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "how"}, {"from": "gpt", "value": "yes"}]},
    "a question beside conversations": {"prompt": "how", **PAIR},
    "no prompt": PAIR,
    "text": {"prompt": "how", "completion": " yes"},
    "instruction": {"instruction": "how", "input": "much", "output": "yes"},
    "a begun answer": {"prompt": [user("how"), said("yes")], "completion": [said(" the cat")]},
    "a call": {"prompt": [user("how")], "completion": [said("call"), TOOL, said("yes")]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_asked_in_the_form_that_is_trained(form, spoken):
    """The prompt of a row is the same in training, evaluation and rollouts."""
    tokenizer, rows = with_template(spoken, "ChatML"), Dataset.from_list([FORMS[form]])
    sizes = {"vocab_size": len(tokenizer)}
    row = tokenize_sft(rows, tokenizer, max_length=128, **sizes)[0]
    prompt = row["input_ids"][: next(i for i, label in enumerate(row["labels"]) if label != -100)]
    (asked,) = prompts_of(rows, 1, Reading().for_tokenizer(tokenizer).form)
    assert encode_prompt(tokenizer, asked) == prompt
    assert tokenize_prompts(rows, tokenizer, max_prompt_length=99, **sizes)[0]["prompt_ids"] == prompt
    if "chosen" in FORMS[form]:
        assert tokenize_preferences(rows, tokenizer, max_length=128, **sizes)[0]["prompt_ids"] == prompt
