"""One rendering, one encoding: for every kind of tokenizer and family of templates, ids are those of the rendering."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import EOS, FAMILIES, KINDS, as_written, ids_of

from rlhf.data import Dialogue, encode, encode_prompt, encode_reply

TURN = st.sampled_from(
    [
        "yes", "the cat", " hello ", "\nhello\n\n", "user", "assistant\n", "yes yes yes", "ünï 漢字 🙂", "<", "a\n\nb",
        "[INST]", "<|im", "{x}", "the cat sat\n", "Answer: yes", "1 2 3", "<|im_end|> no",
    ]
)  # fmt: skip


@cache
def kind(name):
    return KINDS[name]()


CALL = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    st.sampled_from(["look", "user"]),
    st.one_of(st.just({"n": 3}), st.just({}), st.builds(lambda text: {"q": text, "b": [1, text]}, TURN)),
)


@st.composite
def conversations(draw):
    name = draw(st.sampled_from(sorted(FAMILIES)))
    family = FAMILIES[name]

    def answer(**more):
        thought = draw(TURN) if family.thoughts and draw(st.booleans()) else ""
        return {
            "role": "assistant",
            "content": draw(TURN),
            **({"reasoning_content": thought} if thought else {}),
            **more,
        }

    turns = [{"role": "system", "content": draw(TURN)}] if family.system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(TURN)})
        for _ in range(draw(st.integers(0, 2)) if family.tools else 0):
            calls = draw(st.lists(CALL, min_size=1, max_size=2))
            said = {"content": ""} if draw(st.booleans()) else {}
            turns += [answer(tool_calls=calls) | said, {"role": "tool", "content": draw(TURN)}]
        turns.append(answer())
    return name, turns


@pytest.mark.parametrize("name", KINDS)
def test_ids_of_a_row_are_those_of_its_rendering(name):
    """huggingface/transformers#26273, allenai/catwalk#156, huggingface/trl#4922, axolotl-ai-cloud/axolotl#3088."""
    tokenizer = kind(name)

    @settings(max_examples=80, deadline=None)
    @given(conversations())
    def check(conversation):
        family, turns = conversation
        tokenizer.chat_template = FAMILIES[family].template
        pieces = FAMILIES[family].write(turns)
        assert "".join(piece for piece, _ in pieces) == tokenizer.apply_chat_template(turns, tokenize=False)
        ids, scored = as_written(tokenizer, pieces)
        found = encode(tokenizer, Dialogue([], (turns,)))
        ((own, mask),) = found.completions
        assert found.prompt_ids + own == ids
        assert [False] * len(found.prompt_ids) + mask == scored
        assert found.answers == found.scored == sum(turn["role"] == "assistant" for turn in turns)
        # A policy is given what comes before the answer, in pairs as alone.
        pair = encode(tokenizer, Dialogue(turns[:-1], (turns[-1:], [{"role": "assistant", "content": "9 !"}])))
        assert pair.prompt_ids + pair.completions[0][0] == ids
        assert all(mask for _, masks in pair.completions for mask in masks)
        asked = encode_prompt(tokenizer, turns[:-1])
        assert pair.prompt_ids[: len(asked) - 1] == asked[: len(pair.prompt_ids)][: len(asked) - 1]

    check()


@pytest.mark.parametrize("name", KINDS)
def test_text_is_tokenised_as_a_whole(name):
    """allenai/catwalk#156, OpenRLHF/OpenRLHF#393: one space at the border, one BOS, one EOS."""
    tokenizer = kind(name)
    bos = [] if name in ("slow", "byte-level, adds EOS") else [tokenizer.bos_token_id]
    for prompt, answers in [
        ("Question: hello Answer:", [" yes", " no"]),
        ("Answer: ", ["yes", "no"]),
        ("Q.\n", ["\nyes", "no"]),
        ("ünï", ["漢字", " 🙂"]),
        ("", ["yes", "no"]),
        ("<s>Answer:", [" yes</s>", " no"]),
    ]:
        found = encode(tokenizer, Dialogue(prompt, tuple(answers)))
        for answer, (own, mask) in zip(answers, found.completions, strict=True):
            text = prompt + answer.removesuffix(EOS)
            want = [*ids_of(tokenizer, text), tokenizer.eos_token_id]
            assert found.prompt_ids + own == (want if text.startswith("<s>") else bos + want)
            assert all(mask)
        asked = encode_prompt(tokenizer, prompt)
        assert asked == (bos if not prompt.startswith("<s>") else []) + ids_of(tokenizer, prompt)
        assert found.prompt_ids == asked[: len(found.prompt_ids)]


@pytest.mark.parametrize("name", KINDS)
def test_what_an_environment_says_follows_the_answer(name):
    """The ids of an episode are those of its conversation, whether its answer ended itself or not."""
    tokenizer = kind(name)
    for family in ("ChatML", "Llama 2", "Mistral", "Llama 3", "Zephyr", "Phi-3", "Gemma", "Vicuna", "Cohere"):
        tokenizer.chat_template = FAMILIES[family].template
        asked, said, reply = (
            {"role": r, "content": c} for r, c in (("user", "how"), ("assistant", "yes"), ("user", "no"))
        )
        found = encode(tokenizer, Dialogue([asked], ([said],)))
        ids = found.prompt_ids + found.completions[0][0]
        text = tokenizer.apply_chat_template([asked, said, reply], tokenize=False, add_generation_prompt=True)
        for done in (ids, ids[:-1]):
            seen = encode_reply(tokenizer, Dialogue([asked]), reply, done[-1])
            assert done + seen == ids_of(tokenizer, text), family


def test_the_template_of_a_reply_has_the_options_of_its_row():
    tokenizer = kind("byte-level")
    tokenizer.chat_template = FAMILIES["Qwen3"].template
    asked = Dialogue([{"role": "user", "content": "how"}], template_kwargs={"enable_thinking": False})
    seen = encode_reply(
        tokenizer, asked, {"role": "tool", "content": "42"}, tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
    assert tokenizer.decode(seen) == (
        "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
