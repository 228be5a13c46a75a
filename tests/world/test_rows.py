"""Rows as people have them: columns, roles, calls, weights and prompts of public data sets, in small."""

import copy
import json
import logging

import pytest
from conftest import TEMPLATE, tiny_model, write_rows
from datasets import Dataset

from rlhf.cli.main import main
from rlhf.data import Reading, RowFormat, load_data, tokenize_preferences, tokenize_prompts, tokenize_sft
from rlhf.data.tokenizing import tokenize_unpaired

TOOLS = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t.function.name }}: {{ t.function.parameters | tojson }}\n"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def with_tools(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = TOOLS
    return changed


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


U, A, N = turn("user", "why"), turn("assistant", "yes"), turn("assistant", "no")
S, U2, A2 = turn("system", "be kind"), turn("user", "how"), turn("assistant", "so")
P = turn("assistant", [{"type": "text", "text": "yes"}])
E = "<|im_end|>"


def chat(*turns):
    """The rendering of (role, text), by hand."""
    return "\n".join(f"<|im_start|>{role}\n{text}{E}" for role, text in turns)


def options(**form):
    return {"max_length": 256, "vocab_size": 330, "reading": Reading(RowFormat(**form))}


def sft(rows, tokenizer, **form):
    return tokenize_sft(Dataset.from_list(rows), tokenizer, **options(**form))


def parts(tokenizer, row):
    """(all of the text, the part of it that is scored)"""
    return tokenizer.decode(row["input_ids"]), tokenizer.decode([i for i in row["labels"] if i != -100])


WHY_YES = chat(("user", "why"), ("assistant", "yes"))
LEARNED = {
    # name: (row, text, scored)
    "Alpaca": (
        {"instruction": "why", "input": "the cat", "output": "yes"},
        chat(("user", "why\n\nthe cat"), ("assistant", "yes")),
    ),
    "Alpaca, empty input": ({"instruction": "why", "input": "", "output": "yes"}, WHY_YES),
    "Alpaca with history and system": (
        {"instruction": "how", "input": "", "output": "so", "system": "be kind", "history": [["why", "yes"]]},
        chat(("system", "be kind"), ("user", "why"), ("assistant", "yes"), ("user", "how"), ("assistant", "so")),
        "so" + E,
    ),
    "Dolly": (
        {"instruction": "why", "context": "a tree", "response": "yes", "category": "qa"},
        chat(("user", "why\n\na tree"), ("assistant", "yes")),
    ),
    "SQL with a context": (
        {"question": "why", "context": "a tree", "answer": "yes"},
        chat(("user", "why\n\na tree"), ("assistant", "yes")),
    ),
    "query, response": ({"query": "why", "response": "yes"}, WHY_YES),
    "HelpSteer": ({"prompt": "why", "response": "yes", "helpfulness": 3}, WHY_YES),
    "problem, solution": ({"problem": "why", "solution": "yes"}, WHY_YES),
    "input, output": ({"input": "why", "output": "yes"}, WHY_YES),
    "Capybara": (
        {"conversation": [{"input": "why", "output": "yes"}, {"input": "how", "output": "so"}], "source": "a"},
        chat(("user", "why"), ("assistant", "yes"), ("user", "how"), ("assistant", "so")),
        f"yes{E}so{E}",
    ),
    "OpenHermes: ShareGPT with a system turn and null weights": (
        {
            "conversations": [
                {"from": "system", "value": "be kind", "weight": None},
                {"from": "human", "value": "why", "weight": None},
                {"from": "gpt", "value": "yes", "weight": None},
            ]
        },
        chat(("system", "be kind"), ("user", "why"), ("assistant", "yes")),
    ),
    "ToolACE: a system column": (
        {"system": "be kind", "conversations": [{"from": "user", "value": "why"}, {"from": "model", "value": "yes"}]},
        chat(("system", "be kind"), ("user", "why"), ("assistant", "yes")),
    ),
    "a system column that the conversation repeats": (
        {"system": "be kind", "messages": [S, U, A]},
        chat(("system", "be kind"), ("user", "why"), ("assistant", "yes")),
    ),
    "messages as JSON text": ({"messages": json.dumps([U, A])}, WHY_YES),
    "messages as pandas writes them": ({"messages": str([U, A])}, WHY_YES),
    "parts": (
        {"messages": [turn("user", [{"type": "text", "text": "wh"}, {"type": "text", "text": "y"}]), P]},
        WHY_YES,
    ),
    "parts named value": ({"messages": [turn("user", [{"type": "text", "value": "why"}]), P]}, WHY_YES),
    "parts of the answers' interface": (
        {"messages": [turn("user", [{"type": "input_text", "text": "why"}]), P]},
        WHY_YES,
    ),
    "other roles, any case": ({"messages": [turn("Human", "why"), turn("MODEL", "yes")]}, WHY_YES),
    "a prompt that the completion repeats": ({"prompt": [U], "completion": [U, A]}, WHY_YES),
    "a text prompt that a conversation repeats, with a system turn": (
        {"prompt": " why ", "completion": [S, U, A]},
        chat(("system", "be kind"), ("user", " why "), ("assistant", "yes")),
    ),
    "a text prompt that is the last question": (
        {"prompt": "how", "completion": [U, A, U2, A2]},
        chat(("user", "why"), ("assistant", "yes"), ("user", "how"), ("assistant", "so")),
        "so" + E,
    ),
    "a completion with tool and user turns": (
        {"prompt": [U], "completion": [N, turn("tool", "a cat"), U2, A2]},
        chat(("user", "why"), ("assistant", "no"), ("tool", "a cat"), ("user", "how"), ("assistant", "so")),
        f"no{E}so{E}",
    ),
    "the last answer with tool turns": (
        {"completion": [U2, A2, U, N, turn("tool", "a cat"), A]},
        chat(("user", "how"), ("assistant", "so"), ("user", "why"), ("assistant", "no"), ("tool", "a cat"),
             ("assistant", "yes")),
        f"no{E}yes{E}",
    ),
    "weights": (
        {"messages": [U, {**N, "weight": 0}, U2, {**A2, "weight": 1}]},
        chat(("user", "why"), ("assistant", "no"), ("user", "how"), ("assistant", "so")),
        "so" + E,
    ),
    "an unlearned answer that is empty": (
        {"messages": [U, {**N, "content": "", "train": False}, U2, A2]},
        chat(("user", "why"), ("assistant", ""), ("user", "how"), ("assistant", "so")),
        "so" + E,
    ),
    "a text column beside questions": ({"instruction": "why", "output": "yes", "text": "the cat"}, "the cat" + E),
    "plain prompt and answer": ({"prompt": "the", "completion": " cat"}, "the cat" + E, " cat" + E),
    "a prompt's text that the completion repeats": (
        {"prompt": "the cat is big", "completion": "the cat is big and red"},
        "the cat is big and red" + E,
        " and red" + E,
    ),
    "Anthropic's text": (
        {"chosen": "\n\nHuman: why\n\nAssistant: the river", "rejected": "\n\nHuman: why\n\nAssistant: the house"},
        "\n\nHuman: why\n\nAssistant: the river" + E,
        " the river" + E,
    ),
    "Orca's pairs": (
        {"system": "be kind", "question": "why", "chosen": "yes", "rejected": "no"},
        chat(("system", "be kind"), ("user", "why"), ("assistant", "yes")),
    ),
    "UltraFeedback": (
        {"prompt": "why", "prompt_id": "7", "chosen": [U, A], "rejected": [U, N], "score_chosen": 8.0},
        WHY_YES,
    ),
    "a pair's answer as one message": (
        {"conversations": [{"from": "human", "value": "why"}], "chosen": {"from": "gpt", "value": "yes"},
         "rejected": {"from": "gpt", "value": "no"}},
        WHY_YES,
    ),
    "tokenised, with a mask": ({"input_ids": [3, 4, 5], "completion_mask": [0, 1, 1]}, None, [4, 5]),
    "tokenised, padded": (
        {"input_ids": [0, 3, 4], "assistant_masks": [0, 0, 1], "attention_mask": [0, 1, 1]}, None, [4],
    ),
    "tokenised prompt and answer": ({"prompt_ids": [3], "completion_ids": [4, 5]}, None, [4, 5]),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_rows_of_public_data_sets_are_learned_as_they_are_meant(name, tokenizer):
    """hiyouga/LlamaFactory#7982, InternScience/GraphGen#43, argilla-io/distilabel#343, axolotl-ai-cloud/axolotl#1703,
    lm-sys/FastChat#3017, PrimeIntellect-ai/prime-rl#978: columns, roles, parts, weights and prompts of other names."""
    row, text, *scored = LEARNED[name]
    found = sft([row], tokenizer)[0]
    if text is None:
        assert [i for i in found["labels"] if i != -100] == scored[0]
        return
    default = "yes" + E if text.startswith("<|im_start|>") else text
    assert parts(tokenizer, found) == (text, scored[0] if scored else default)


CALL = {"name": "find", "arguments": {"word": "cat"}}
CALLED = '<call>find {"word": "cat"}' + E
CALLS = {
    "objects": turn("assistant", None, tool_calls=[{"type": "function", "function": CALL}]),
    "arguments as text": turn("assistant", "", tool_calls=[{"function": {**CALL, "arguments": '{"word": "cat"}'}}]),
    "bare": turn("assistant", None, tool_calls=[CALL]),
    "all as JSON text": turn("assistant", None, tool_calls=json.dumps([CALL])),
    "the older form": turn("assistant", None, function_call=CALL),
    "ShareGPT": {"from": "function_call", "value": json.dumps(CALL)},
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_rendered_as_objects(name, with_tools):
    """PrimeIntellect-ai/prime-rl#2968, hiyouga/LlamaFactory#4187: calls with arguments as JSON text."""
    found = sft([{"messages": [U, CALLS[name], {"role": "observation", "content": "a cat"}, A]}], with_tools)[0]
    text, scored = parts(with_tools, found)
    assert scored == CALLED + "yes" + E
    assert text == chat(("user", "why"), ("assistant", CALLED.removesuffix(E)), ("tool", "a cat"), ("assistant", "yes"))


def test_a_call_stays_text_where_the_template_reads_no_calls(tokenizer):
    turns = [{"from": "human", "value": "why"}, {"from": "function_call", "value": json.dumps(CALL)}]
    assert parts(tokenizer, sft([{"conversations": turns}], tokenizer)[0])[1] == json.dumps(CALL) + E


SCHEMA = {"name": "find", "description": "it finds", "parameters": {"type": "object", "enum": [None]}}
TOOL_COLUMNS = {
    "objects": {"tools": [{"type": "function", "function": SCHEMA}]},
    "JSON text": {"tools": json.dumps([{"type": "function", "function": SCHEMA}])},
    "bare": {"tools": [SCHEMA]},
    "functions": {"functions": json.dumps([SCHEMA])},
    "each as text": {"tools": [json.dumps(SCHEMA)]},
}


@pytest.mark.parametrize("name", TOOL_COLUMNS)
def test_tools_reach_the_template_everywhere(name, with_tools):
    """OpenRLHF/OpenRLHF#1228, hiyouga/LlamaFactory#4187, NVIDIA-NeMo/RL#1181: a column of tools."""
    tools = TOOL_COLUMNS[name]
    written = '<|im_start|>tools\nfind: {"type": "object", "enum": [null]}\n<|im_end|>\n'
    rows = {
        "sft": (tokenize_sft, {"messages": [U, A]}, "input_ids"),
        "dpo": (tokenize_preferences, {"prompt": "why", "chosen": "yes", "rejected": "no"}, "prompt_ids"),
        "kto": (tokenize_unpaired, {"prompt": [U], "completion": [A], "label": True}, "prompt_ids"),
    }
    for command, (tokenise, row, column) in rows.items():
        found = tokenise(Dataset.from_list([{**row, **tools}]), with_tools, max_length=256, vocab_size=330)
        assert with_tools.decode(found[0][column]).startswith(written), command
    found = tokenize_prompts(
        Dataset.from_list([{"prompt": "why", **tools}]), with_tools, max_prompt_length=99, vocab_size=330
    )
    assert with_tools.decode(found[0]["prompt_ids"]).startswith(written)


def test_answers_that_are_calls(with_tools):
    """xLAM's columns: a query, tools and the calls that answer it, as JSON text."""
    row = {"query": "why", "tools": json.dumps([SCHEMA]), "answers": json.dumps([CALL])}
    assert parts(with_tools, sft([row], with_tools)[0])[1] == CALLED


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "python"])
def test_no_row_gets_the_keys_of_another(suffix, with_tools, tmp_path):
    """PrimeIntellect-ai/prime-rl#2968: Arrow gives every object the keys of all, as nulls, deep inside too."""
    arguments = [{"city": {"name": "Rome"}}, {"count": 3, "city": {"code": "x"}}]
    rows = [
        {"messages": [U, turn("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": a}}])]}
        for a in arguments
    ]
    data = Dataset.from_list(rows)
    if suffix == "jsonl":
        data = load_data(str(write_rows(tmp_path / "rows.jsonl", rows)))
    elif suffix == "parquet":
        data.to_parquet(tmp_path / "rows.parquet")
        data = load_data(str(tmp_path / "rows.parquet"))
    found = tokenize_sft(data, with_tools, max_length=256, vocab_size=330)
    for row, given in zip(found, arguments, strict=True):
        said = parts(with_tools, row)[1].removeprefix("<call>f ").removesuffix(E)
        assert json.loads(said) == given


def test_a_null_that_was_written_stays(with_tools, tmp_path):
    rows = [
        {"messages": [U, turn("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": {"x": None}}}])]}
    ]
    data = load_data(str(write_rows(tmp_path / "rows.jsonl", [*rows, {"messages": [U, A]}])))
    found = tokenize_sft(data, with_tools, max_length=256, vocab_size=330)
    assert parts(with_tools, found[0])[1] == '<call>f {"x": null}' + E
    as_text = [{"messages": json.dumps(rows[0]["messages"])}]
    assert parts(with_tools, sft(as_text, with_tools)[0])[1] == '<call>f {"x": null}' + E


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_several_names(key, with_tools):
    found = sft([{"messages": [U, {**A, key: "the cat"}]}], with_tools)[0]
    assert parts(with_tools, found)[1] == "<think>the cat</think>yes" + E


def test_options_of_the_template_come_from_a_column_or_an_option(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{{ mood | default('calm') }} " + TEMPLATE
    rows = [
        {"messages": [U, A], "chat_template_kwargs": given} for given in ({"mood": "red"}, '{"mood": "blue"}', None)
    ]
    found = [sft([row], changed, template_kwargs={"mood": "green"})[0] for row in rows]
    assert [parts(changed, row)[0].split()[0] for row in found] == ["red", "blue", "green<|im_start|>user"[:5]]


def test_names_of_columns_and_roles_can_be_given(tokenizer):
    """huggingface/trl and axolotl map names of columns and roles; here --columns and --roles."""
    rows = [{"talk": [{"role": "customer", "content": "why"}, {"role": "agent", "content": "yes"}], "messages": "note"}]
    form = dict(columns={"talk": "messages"}, roles={"customer": "user", "agent": "assistant"})
    assert parts(tokenizer, sft(rows, tokenizer, **form)[0]) == (WHY_YES, "yes" + E)
    with pytest.raises(ValueError, match="--columns: no column 'text2'; found talk, messages"):
        sft(rows, tokenizer, columns={"text2": "messages"})
    with pytest.raises(
        ValueError, match=r"without an assistant's turn \(roles: agent, customer; --roles theirs=assistant"
    ):
        sft([{"messages": [turn("customer", "why"), turn("agent", "yes")]}], tokenizer)


PAIRS = {
    "UltraFeedback": {"prompt": "why", "chosen": [U, A], "rejected": [U, N]},
    "Orca": {"system": "", "question": "why", "chosen": "yes", "rejected": "no"},
    "one message each": {"conversations": [U], "chosen": A, "rejected": N},
    "a prompt of messages that is repeated with a space": {
        "prompt": [turn("user", "why ")],
        "chosen": [U, A],
        "rejected": [U, N],
    },
    "other names": {"prompt": [U], "chosen_response": [A], "rejected_response": [N]},
    "JSON text": {"chosen": json.dumps([U, A]), "rejected": json.dumps([U, N])},
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_share_one_prompt_and_differ_in_the_last_answer(name, tokenizer):
    """argilla-io/distilabel#343, hiyouga/LlamaFactory#5743: text prompts beside whole conversations."""
    row = tokenize_preferences(Dataset.from_list([PAIRS[name]]), tokenizer, max_length=128, vocab_size=330)[0]
    prompt = tokenizer.decode(row["prompt_ids"]).replace("why ", "why")
    assert prompt == f"<|im_start|>user\nwhy{E}\n<|im_start|>assistant\n"
    assert [tokenizer.decode(row[key]) for key in ("chosen_ids", "rejected_ids")] == ["yes" + E, "no" + E]


def test_labelled_answers_are_paired_by_their_prompt(tokenizer, model_folder, tmp_path):
    """trl-lib/kto-mix-14k: prompt, completion, label; the command for pairs takes them too."""
    rows = [{"prompt": "why", "completion": text, "label": good} for text, good in ((" yes", True), (" no", False))]
    found = tokenize_preferences(Dataset.from_list(rows), tokenizer, max_length=128, vocab_size=330)[0]
    assert [tokenizer.decode(found[key]) for key in ("chosen_ids", "rejected_ids")] == [" yes" + E, " no" + E]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    argv = (
        f"dpo --model_name_or_path {model_folder} --dataset_name {file} --output_dir {tmp_path / 'run'} --max_steps 1"
    )
    assert main([*argv.split(), *["--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]]) == 0
    assert main(["data", str(file), "--command", "dpo", "--model", str(model_folder)]) == 0


def test_turns_that_both_answers_begin_with_are_prompt(tokenizer):
    row = {"prompt": "why", "chosen": [U, A, U2, A2], "rejected": [U, A, U2, N]}
    found = tokenize_preferences(Dataset.from_list([row]), tokenizer, max_length=128, vocab_size=330)[0]
    assert [tokenizer.decode(found[key]) for key in ("chosen_ids", "rejected_ids")] == ["so" + E, "no" + E]


def test_foreign_turns_in_an_answer_of_a_pair_are_masked(tokenizer):
    """PrimeIntellect-ai/prime-rl#978: trajectories with tool turns."""
    row = {"prompt": [U], "chosen": [N, turn("tool", "a cat"), A], "rejected": [N, turn("tool", "a dog"), A2]}
    found = tokenize_preferences(Dataset.from_list([row]), tokenizer, max_length=128, vocab_size=330)[0]
    assert [tokenizer.decode([i for i in own if i != -100]) for own in found["labels"]] == ["yes" + E, "so" + E]


PROMPTS = {
    "UltraFeedback": PAIRS["UltraFeedback"],
    "ShareGPT": {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "yes"}]},
    "question": {"question": "why", "answer": "7"},
    "a text prompt with an answer for rewards": {"prompt": "why", "answer": "7"},
    "an answered conversation": {"messages": [U, N, turn("tool", "a cat"), A]},
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_policy_is_asked_in_the_form_that_is_trained(name, tokenizer):
    found = tokenize_prompts(
        Dataset.from_list([PROMPTS[name]]), tokenizer, max_prompt_length=99, vocab_size=330
    )[0]  # fmt: skip
    plain = "text prompt" in name
    asked = "why" if plain else f"<|im_start|>user\nwhy{E}\n<|im_start|>assistant\n"
    assert tokenizer.decode(found["prompt_ids"]) == asked


REFUSED = {
    "an image": ({"messages": [turn("user", [{"type": "image_url", "image_url": {"url": "x"}}]), P]}, "message 1: a part of 'content' is 'image_url'"),  # noqa: E501
    "a column of images": ({"messages": [U, A], "images": ["x.png"]}, "'images' is not empty"),
    "half a weight": ({"messages": [U, {**A, "weight": 0.5}]}, "message 2: 'weight' is 0.5, expected 0 or 1"),
    "another prompt in the answer": ({"prompt": [U], "completion": [U2, A2]}, "the answer begins with a user turn"),
    "another system turn": ({"messages": [S, U, A], "system": "be bad"}, "the column 'system' and the system turn differ"),  # noqa: E501
    "tools that are no list": ({"messages": [U, A], "tools": "find"}, "'tools' is text that is not valid JSON"),
    "a call without a name": ({"messages": [U, turn("assistant", None, tool_calls=[{"id": "a"}])]}, "message 2: a tool call has no 'name'"),  # noqa: E501
    "a mask of another length": ({"input_ids": [1, 2], "completion_mask": [1]}, "'completion_mask' has 1 entries"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_is_named_with_its_row(name, tokenizer):
    row, said = REFUSED[name]
    with pytest.raises(ValueError) as error:
        sft([row], tokenizer)
    assert f"data set, row 1: {said}" in str(error.value).replace("'messages', ", "") and "\n" not in str(error.value)


def test_labels_of_another_kind_are_no_verdict(tokenizer, caplog):
    """TRL's kto-mix has true and false; a class of a text is something else."""
    with caplog.at_level(logging.INFO, "rlhf"):
        assert len(sft([{"messages": [U, A], "label": "sports"}] * 2, tokenizer)) == 2
        rows = [{"prompt": "why", "completion": "yes", "label": good} for good in (True, False, True)]
        assert len(sft(rows, tokenizer)) == 2
    assert "dropped 1 of 3 rows with label false" in caplog.text


def test_answers_that_are_all_marked_not_to_be_learned(tokenizer, caplog):
    """openai/openai-cookbook#1074: a conversation with nothing to learn is left out."""
    rows = [{"messages": [U, {**A, "weight": weight}]} for weight in (0, 1)]
    assert len(sft(rows, tokenizer)) == 1
    assert "dropped 1 of 2 rows whose answers are all marked not to be learned" in caplog.text


def test_what_is_not_read_is_told(tokenizer, caplog):
    with caplog.at_level(logging.INFO, "rlhf"):
        sft([{"messages": [U, A], "id": 3, "response": "x", "source": "y"}], tokenizer)
    assert "columns not read: id, response, source" in caplog.text


def test_bad_rows_are_left_out_and_listed(tokenizer, tmp_path, caplog):
    """unslothai/unsloth#334, huggingface/transformers#45419: a template that refuses one row of many."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
        + TEMPLATE
    )
    rows = Dataset.from_list([{"messages": [U, A]}, {"messages": [S, U, A]}, {"messages": [U, {**A, "content": ""}]}])
    with pytest.raises(ValueError, match=r"row 2: the chat template refuses this conversation \(no system\)"):
        tokenize_sft(rows, changed, max_length=99, vocab_size=330)
    file = tmp_path / "bad_rows.jsonl"
    assert len(tokenize_sft(rows, changed, max_length=99, vocab_size=330, reading=Reading(bad_rows=str(file)))) == 1
    listed = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["row"] for line in listed] == [2, 3] and "empty" in listed[1]["error"]
    assert "left out 2 of 3 rows that cannot be read" in caplog.text


def test_rows_keep_the_numbers_of_their_file(tokenizer):
    rows = Dataset.from_list([{"messages": [U, A]}] * 5 + [{"messages": [U, {**A, "content": ""}]}])
    for chosen in (rows.select([5, 0, 2]), rows.filter(lambda row: True).select([1, 5])):
        with pytest.raises(ValueError, match="row 6: "):
            tokenize_sft(chosen, tokenizer, max_length=64, vocab_size=330)


def test_the_list_of_bad_rows_belongs_to_the_last_run(model_folder, tmp_path):
    """The list survives --overwrite, which clears the rest, and a run that ends before its first checkpoint."""
    bad = {"messages": [U, {**A, "content": ""}]}
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": [U, A]}, bad])
    argv = (
        f"sft --model_name_or_path {model_folder} --dataset_name {file} --output_dir {tmp_path / 'run'} --max_steps 1"
    )
    argv += " --drop_bad_rows --report_to none --use_cpu true --disable_tqdm true"
    assert main(argv.split()) == 0 and main([*argv.split(), "--overwrite"]) == 0
    listed = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in listed] == [2]


def test_the_cache_knows_every_option(tokenizer):
    rows = Dataset.from_list([{"messages": [U, A], "talk": [U, N]}])
    prints = {
        tokenize_sft(rows, tokenizer, **options(**form))._fingerprint
        for form in ({}, {"columns": {"talk": "messages"}}, {"roles": {"a": "user"}}, {"template_kwargs": {"a": 1}})
    }
    assert len(prints) == 4


def test_rewards_are_asked_in_the_same_form(tokenizer):
    from rlhf import GRPOConfig, GRPOTrainer

    asked = []

    def reward(prompts, completions, **columns):
        asked.extend(prompts)
        return [float(len(completion[-1]["content"])) for completion in completions]

    rows = Dataset.from_list([{"frage": "why", "answer": "7"}] * 4)
    args = GRPOConfig(
        "runs/unused",
        max_steps=1, per_device_train_batch_size=4, num_generations=2, max_completion_length=4, max_length=64,
        columns="frage=question", report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    GRPOTrainer(tiny_model(), reward, args, train_dataset=rows, processing_class=tokenizer).train()
    assert asked[0] == [{"role": "user", "content": "why"}]
