# ruff: noqa: E501  # a template is read in one piece
"""Kinds of tokenizers that people have, and chat templates in the manner of the families that people train.

A family comes with ``write``: plain Python that says what the template writes, piece by piece, and which pieces the
model is to write. It shares nothing with the code that it checks.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

Message = dict[str, Any]
Pieces = list[tuple[str, bool]]  # text, and whether the model writes it

BOS, EOS = "<s>", "</s>"
SPECIAL = """<|im_start|> <|im_end|> <|user|> <|assistant|> <|system|> <|end|> <|eot_id|> <|start_header_id|>
<|end_header_id|> <think> </think> <|User|> <|Assistant|> <|start|> <|message|> <|channel|> <|return|> <|call|>
<start_of_turn> <end_of_turn> <|TURN|> <|END|> <|CHATBOT|> <|USER|> <|SYSTEM|> <calls> </calls> <call> </call>""".split()  # noqa: SIM905
TEXT = [
    "the cat sat on the mat and the dog ran to the river . yes no maybe hello world how are you today",
    "user assistant system model tool ### Instruction: Response: Question: Answer: [INST] [/INST] 0 1 2 3 4 5",
] * 20


# Tokenizers


def _finished(core: Tokenizer, bos: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    """With special tokens; the tokenizer adds BOS or EOS by itself where asked to."""
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", BOS, EOS, *SPECIAL)])
    added = [(token, core.token_to_id(token)) for token in (BOS, EOS)]
    single = " ".join([BOS] * bos + ["$A"] + [EOS] * eos)
    own = processors.TemplateProcessing(single=single, special_tokens=added)
    core.post_processor = processors.Sequence([core.post_processor, own]) if core.post_processor else own
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, unk_token="<unk>")


def byte_level(trim_offsets: bool = False, add_prefix_space: bool = False, **adds: bool) -> PreTrainedTokenizerFast:
    """GPT-2, Llama 3, Qwen."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    )  # fmt: skip
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return _finished(core, **adds)


def metaspace(prepend_scheme: str) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE in its newer form, with bytes for what it does not know."""
    return _with_bytes(pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False), None)


def prepend() -> PreTrainedTokenizerFast:
    """Llama 2, Mistral, TinyLlama, Zephyr: a normaliser writes a space in front of text."""
    space = "▁"
    return _with_bytes(None, normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)]))


def _with_bytes(splitter: Any, normalizer: Any) -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    letters = sorted(set("".join(TEXT).replace(" ", "▁")))
    trained.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=150, initial_alphabet=letters, show_progress=False)
    )  # fmt: skip
    learned = json.loads(trained.to_str())["model"]
    order = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocab = {token: index for index, token in enumerate(order)}
    merges = [tuple(merge) for merge in learned["merges"]]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if splitter is not None:
        core.pre_tokenizer = splitter
    if normalizer is not None:
        core.normalizer = normalizer
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(core)


def unigram() -> PreTrainedTokenizerFast:
    """T5, XLM-R, Gemma's ancestors."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(
        [*TEXT, "\n<{>}\n\n"],
        trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
    )  # fmt: skip
    return _finished(core)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT: white space is dropped, letters are made small."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    )  # fmt: skip
    return _finished(core)


def slow() -> PreTrainedTokenizerBase:
    """ByT5: no Rust, no offsets; ends text with EOS by itself."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.add_special_tokens({"bos_token": BOS, "additional_special_tokens": SPECIAL})
    return tokenizer


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": byte_level,
    "byte-level, trimmed offsets": lambda: byte_level(trim_offsets=True),
    "byte-level, prefix space": lambda: byte_level(trim_offsets=True, add_prefix_space=True),
    "byte-level, adds EOS": lambda: byte_level(bos=False, eos=True),
    "Metaspace, always": lambda: metaspace("always"),
    "Metaspace, first": lambda: metaspace("first"),
    "Metaspace, never": lambda: metaspace("never"),
    "Prepend": prepend,
    "Unigram": unigram,
    "WordPiece": word_piece,
    "slow": slow,
}


# Templates


class Family(NamedTuple):
    template: str
    write: Callable[[list[Message]], Pieces]
    system: bool = True  # knows the role
    thoughts: bool = False  # knows `reasoning_content`
    tools: bool = False  # and calls


def _last_user(messages: list[Message]) -> int:
    return max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)


def _chatml(
    messages: list[Message], header: str = "<|im_start|>{}\n", end: str = "<|im_end|>", gap: str = "\n"
) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        said = m["content"] + end
        pieces += [(header.format(m["role"]), False), (said, m["role"] == "assistant"), (gap, False)]
    return pieces


def _of_chatml(**changes: str) -> Callable[[list[Message]], Pieces]:
    return lambda messages: _chatml(messages, **changes)


def _llama2(messages: list[Message]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        pieces += (
            [(f" {m['content']} {EOS}", True)]
            if m["role"] == "assistant"
            else [(f"{BOS}[INST] {m['content']} [/INST]", False)]
        )
    return pieces


def _mistral(messages: list[Message]) -> Pieces:
    system = [m["content"] for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    pieces: Pieces = [(BOS, False)]
    for i, m in enumerate(turns):
        if m["role"] == "assistant":
            pieces.append((" " + m["content"] + EOS, True))
        else:
            before = f"{system[0]}\n\n" if system and i == _last_user(turns) else ""
            pieces.append((f"[INST] {before}{m['content']} [/INST]", False))
    return pieces


def _llama3(messages: list[Message]) -> Pieces:
    pieces: Pieces = [(BOS, False)]
    for m in messages:
        head = f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n"
        pieces += [(head, False), (m["content"].strip() + "<|eot_id|>", m["role"] == "assistant")]
    return pieces


def _phi3(messages: list[Message]) -> Pieces:
    return [*_chatml(messages, "<|{}|>\n", "<|end|>"), (EOS, False)]


def _qwen3(messages: list[Message]) -> Pieces:
    """Thoughts of the turns since the last question are written, an empty one where there is none."""
    pieces: Pieces = []
    for i, m in enumerate(messages):
        pieces.append((f"<|im_start|>{m['role']}\n", False))
        if m["role"] == "assistant":
            thought = m.get("reasoning_content", "")
            if i > _last_user(messages):
                if thought:
                    pieces.append((f"<think>\n{thought.strip()}\n</think>\n\n", True))
                else:
                    pieces.append(("<think>\n\n</think>\n\n", False))
            calls = "".join(
                f'\n<call>\n{{"name": "{c["function"]["name"]}", "arguments": {json.dumps(c["function"]["arguments"], ensure_ascii=False)}}}\n</call>'
                for c in m.get("tool_calls", [])
            )
            pieces += [(m.get("content", "") + calls + "<|im_end|>", True), ("\n", False)]
        else:
            pieces.append((m["content"] + "<|im_end|>\n", False))
    return pieces


def _r1(messages: list[Message]) -> Pieces:
    pieces: Pieces = [(BOS, False)]
    for m in messages:
        if m["role"] == "assistant":
            pieces += [("<|Assistant|>", False), (m["content"].split("</think>")[-1] + EOS, True)]
        else:
            pieces.append(("<|User|>" + m["content"], False))
    return pieces


def _harmony(messages: list[Message]) -> Pieces:
    pieces: Pieces = []
    for i, m in enumerate(messages):
        pieces.append((f"<|start|>{m['role']}", False))
        if m["role"] != "assistant":
            pieces.append((f"<|message|>{m['content']}<|end|>", False))
            continue
        last = i == len(messages) - 1
        if last and m.get("reasoning_content"):
            pieces.append((f"<|channel|>analysis<|message|>{m['reasoning_content']}<|end|><|start|>assistant", True))
        pieces.append((f"<|channel|>final<|message|>{m['content']}" + ("<|return|>" if last else "<|end|>"), True))
    return pieces


def _gemma(messages: list[Message]) -> Pieces:
    pieces: Pieces = [(BOS, False)]
    for m in messages:
        role = "model" if m["role"] == "assistant" else m["role"]
        said = m["content"].strip() + "<end_of_turn>"
        pieces += [(f"<start_of_turn>{role}\n", False), (said, m["role"] == "assistant"), ("\n", False)]
    return pieces


def _smol(messages: list[Message]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        if m["role"] == "assistant":
            pieces += [
                ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
                (m["content"] + "<|im_end|>", True),
                ("\n", False),
            ]
        else:
            pieces.append((f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n", False))
    return pieces


def _vicuna(messages: list[Message]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        pieces += (
            [("ASSISTANT:", False), (f" {m['content']}{EOS}", True)]
            if m["role"] == "assistant"
            else [(f"USER: {m['content']} ", False)]
        )
    return pieces


def _cohere(messages: list[Message]) -> Pieces:
    roles = {"assistant": "<|CHATBOT|>", "user": "<|USER|>", "system": "<|SYSTEM|>"}
    pieces: Pieces = [(BOS, False)]
    for m in messages:
        pieces += [("<|TURN|>" + roles[m["role"]], False), (m["content"] + "<|END|>", m["role"] == "assistant")]
    return pieces


_GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
_ALTERNATE = "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"

FAMILIES = {
    "ChatML": Family("{% for m in messages %}" + _TURN + "{% endfor %}" + _GENERATE, _chatml),
    "ChatML without a generation prompt": Family("{% for m in messages %}" + _TURN + "{% endfor %}", _chatml),
    "Llama 2": Family(
        "{% for m in messages %}" + _ALTERNATE + "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        _llama2,
        system=False,
    ),
    "Mistral": Family(
        "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
        "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}"
        "{% set ns = namespace(last=-1) %}{% for m in turns %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in turns %}{% if m['role'] == 'user' %}"
        "{% if loop.index0 == ns.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        _mistral,
    ),
    "Llama 3": Family(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        _llama3,
    ),
    "Zephyr": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        _of_chatml(header="<|{}|>\n", end=EOS),
    ),
    "Phi-3": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        _phi3,
    ),
    "Qwen3": Family(
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set content = m.content if m.content is string else '' %}"
        "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
        "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought.strip() + '\n</think>\n\n' }}{% endif %}{{ content }}"
        "{% for c in m.tool_calls or [] %}{{ '\n<call>\n{\"name\": \"' + c.function.name + '\", \"arguments\": ' }}"
        "{{ c.function.arguments | tojson }}{{ '}\n</call>' }}{% endfor %}{% else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
        _qwen3,
        thoughts=True,
        tools=True,
    ),
    "DeepSeek-R1": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% else %}{{ '<|User|>' + m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        _r1,
    ),
    "gpt-oss": Family(
        "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role != 'assistant' %}{{ '<|message|>' + m.content + '<|end|>' }}"
        "{% else %}{% if loop.last and m.reasoning_content %}"
        "{{ '<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|><|start|>assistant' }}{% endif %}"
        "{{ '<|channel|>final<|message|>' + m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        _harmony,
        thoughts=True,
    ),
    "Gemma": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}" + _ALTERNATE + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
        " + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        _gemma,
        system=False,
    ),
    "SmolLM3, with marks": Family(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ '<think>\n\n</think>\n\n' + m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}" + _TURN + "{% endif %}{% endfor %}" + _GENERATE,
        _smol,
    ),
    "Vicuna": Family(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        _vicuna,
        system=False,
    ),
    "Cohere": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|TURN|>' + {'assistant': '<|CHATBOT|>', 'user': '<|USER|>', 'system': '<|SYSTEM|>'}[m['role']]"
        " + m['content'] + '<|END|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|TURN|><|CHATBOT|>' }}{% endif %}",
        _cohere,
    ),
}  # fmt: skip


# What a rendering is as ids


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tokens_before(tokenizer, text, ids, end):
    """How many of ``ids`` are those of the text up to ``end``, and whether the next one reaches over it."""
    before = ids_of(tokenizer, text[:end])
    same = next((i for i, (one, other) in enumerate(zip(before, ids, strict=False)) if one != other), len(before))
    return same, same < len(before)


def as_written(tokenizer, pieces):
    """Ids up to the end of the last answer, and which of them the model is to write."""
    last = max(i for i, (_, written) in enumerate(pieces) if written)
    text = "".join(piece for piece, _ in pieces[: last + 1])
    ids = ids_of(tokenizer, text)
    scored, place = [False] * len(ids), 0
    for piece, written in pieces[: last + 1]:
        first, _ = tokens_before(tokenizer, text, ids, place)
        place += len(piece)
        stop, over = tokens_before(tokenizer, text, ids, place)
        if written:
            scored[first : stop + over] = [True] * (stop + over - first)
    return ids, scored
