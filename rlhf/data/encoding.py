"""One row of text to rows of token ids: read, encoded, checked and cut."""

from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Json
from transformers import PreTrainedTokenizerBase

from rlhf.data import chat, formats
from rlhf.data.batch import IGNORE
from rlhf.data.columns import RowFormat
from rlhf.data.formats import Dialogue
from rlhf.data.messages import ASSISTANT, kind
from rlhf.data.prompts import roles_of
from rlhf.data.typed import Written

Row = dict[str, Any]
TOO_LONG = "with too long a prompt"  # why a row is dropped
COUNTS = ("_answers", "_scored", "_notes")  # of each row: of its answers, and what was left out
TOKENISED = ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask", "completion_ids")


@dataclass(frozen=True)
class Reading:
    """How a trainer reads rows, besides their length.

    Args:
        form: names of columns and roles, options of the template.
        split_turns: each answer of a conversation is a row of its own, behind what comes before it.
        bad_rows: file that lists the rows that cannot be read, which are left out; None stops at the first.
    """

    form: RowFormat = field(default_factory=RowFormat)
    split_turns: bool = False
    bad_rows: str | None = None

    def for_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, text_field: str = "text", rows: Any = None
    ) -> "Reading":
        """With the template of a tokenizer, and what the columns of ``rows`` are."""
        given = tokenizer.chat_template
        template = given if isinstance(given, str) else " ".join((given or {}).values())
        features = getattr(rows, "features", None) or {}
        exact = frozenset(
            self.form.columns.get(name, name) for name, of in features.items() if isinstance(of, Written | Json)
        )
        return replace(self, form=replace(self.form, template=template, text_field=text_field, exact=exact))


def encode_sft(row: Row, tokenizer: PreTrainedTokenizerBase, column: str, reading: Reading) -> list[Row]:
    """The tokenised row, or one for each of its answers; with what is counted of it."""
    row = formats.canonical(row, reading.form)
    if column == "input_ids":
        return [{**_ready_sft(row), "_answers": 0, "_scored": 0, "_notes": []}]
    if column == reading.form.text_field and column != "completion":
        text = row[column]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{column!r} is {'empty' if isinstance(text, str) else kind(text)}, expected text")
        found = [chat.encode(tokenizer, Dialogue("", (text,)))]
    else:
        if formats.is_labelled_bad(row):
            return [dropped({"input_ids": [0], "labels": [IGNORE]}, "with label false")]
        dialogue = formats.sft_dialogue(row, column, reading.form)
        if (reason := _nothing_to_learn(dialogue)) is not None:
            return [dropped({"input_ids": [0], "labels": [IGNORE]}, reason)]
        dialogues = chat.split_turns(dialogue) if reading.split_turns else [dialogue]
        found = [chat.encode(tokenizer, one, split=reading.split_turns) for one in dialogues]
    rows = []
    for encoded in found:
        ((ids, scored),) = encoded.completions
        labels = [token if s else IGNORE for token, s in zip(ids, scored, strict=True)]
        whole: Row = {"input_ids": encoded.prompt_ids + ids, "labels": [IGNORE] * len(encoded.prompt_ids) + labels}
        rows.append(whole | _counts(encoded))
    return rows or [dropped({"input_ids": [0], "labels": [IGNORE]}, "without a scored token")]


def _nothing_to_learn(dialogue: Dialogue) -> str | None:
    """Why a conversation has no answer to learn; None where it has one."""
    (turns,) = dialogue.completions
    answers = [] if isinstance(turns, str) else [turn for turn in turns if turn["role"] == ASSISTANT]
    if isinstance(turns, str) or any(turn.get("weight", 1) for turn in answers):
        return None
    if answers:
        return "whose answers are all marked not to be learned"
    return f"without an assistant's turn (roles: {roles_of(turns)}; --roles theirs=assistant says which it is)"


def _counts(encoded: chat.Encoded) -> Row:
    return {"_answers": encoded.answers, "_scored": encoded.scored, "_notes": list(encoded.notes)}


def dropped(blank: Row, reason: str) -> Row:
    return {**blank, "_drop": reason, "_answers": 0, "_scored": 0, "_notes": []}


def _ready_sft(row: Row) -> Row:
    """A tokenised row: ``labels``, or masks of what is learned."""
    if "input_ids" not in row:
        prompt, completion = list(row["prompt_ids"]), list(row["completion_ids"])
        return {"input_ids": prompt + completion, "labels": [IGNORE] * len(prompt) + completion}
    ids = list(row["input_ids"])
    labels = list(row["labels"]) if row.get("labels") is not None else list(ids)
    masks = [row[key] for key in ("completion_mask", "assistant_masks", "attention_mask") if row.get(key) is not None]
    for name, own in (("labels", labels), *((key, row[key]) for key in TOKENISED[2:5] if row.get(key) is not None)):
        if len(own) != len(ids):
            raise ValueError(f"{name!r} has {len(own)} entries, 'input_ids' {len(ids)}")
    labels = [label if all(mask[i] for mask in masks) else IGNORE for i, label in enumerate(labels)]
    if (real := row.get("attention_mask")) is not None:  # padding is no text
        ids, labels = ([x for x, r in zip(side, real, strict=True) if r] for side in (ids, labels))
    return {"input_ids": ids, "labels": labels}


def encode_pair(row: Row, tokenizer: PreTrainedTokenizerBase, ready: bool, margin: bool, form: RowFormat) -> list[Row]:
    row = formats.canonical(row, form)
    own = {"margin": formats.margin(row)} if margin else {}
    if ready:
        encoded = {key: list(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for key in ("chosen_ids", "rejected_ids"):
            if not encoded[key]:
                raise ValueError(f"{key!r} is empty")
        labels = [encoded["chosen_ids"], encoded["rejected_ids"]]
        return [{**encoded, "labels": labels, **own, "_answers": 0, "_scored": 0, "_notes": []}]
    found = chat.encode(tokenizer, formats.pair_dialogue(row, form))
    (chosen, _), (rejected, _) = found.completions
    ids = {"prompt_ids": found.prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected}
    return [{**ids, "labels": _labels(found), **own, **_counts(found)}]


def encode_unpaired(row: Row, tokenizer: PreTrainedTokenizerBase, pairs: bool, form: RowFormat) -> list[Row]:
    row = formats.canonical(row, form)
    if pairs:
        (pair,) = encode_pair(row, tokenizer, "chosen_ids" in row, False, form)
        counts = {key: pair[key] for key in COUNTS}
        both = zip((pair["chosen_ids"], pair["rejected_ids"]), pair["labels"], (True, False), strict=True)
        return [
            {"prompt_ids": pair["prompt_ids"], "completions": [ids], "labels": [labels], "desirable": good, **counts}
            for ids, labels, good in both
        ]
    good = formats.label(row)
    if "completion_ids" in row:
        ids = list(row["completion_ids"])
        ready = {"prompt_ids": list(row["prompt_ids"]), "completions": [ids], "labels": [ids], "desirable": good}
        return [{**ready, "_answers": 0, "_scored": 0, "_notes": []}]
    found = chat.encode(tokenizer, formats.unpaired_dialogue(row, form))
    completions = [ids for ids, _ in found.completions]
    own = {"prompt_ids": found.prompt_ids, "completions": completions, "labels": _labels(found), "desirable": good}
    return [{**own, **_counts(found)}]


def _labels(found: chat.Encoded) -> list[list[int]]:
    return [[i if s else IGNORE for i, s in zip(ids, scored, strict=True)] for ids, scored in found.completions]


# Length


def cut(encoded: Row, max_length: int, vocab_size: int, drop: bool) -> Row:
    """A row of ids, checked, without its end beyond ``max_length``; ``_cut`` says how many ids that took, ``_drop`` why
    the row is to be left out, if it is."""
    own = {key: value for key, value in encoded.items() if not _is_ids(value) or key.startswith("_")}
    encoded = {key: value for key, value in encoded.items() if key not in own}
    if own.get("_drop"):
        return encoded | own | {"_cut": 0}
    check_vocabulary(encoded, vocab_size)
    prompt = _prompt_length(encoded)
    too_long = prompt >= max_length
    if too_long and not drop:
        raise ValueError(
            f"the prompt has {prompt} tokens and max_length is {max_length}: raise --max_length, or pass "
            "--drop_long_prompts to leave such rows out"
        )
    before = _size(encoded)
    # A prompt belongs to both answers: it is kept whole, and the answers share what is left of max_length.
    room = max(max_length - prompt if "prompt_ids" in encoded else max_length, 0)
    encoded = {key: ids if key == "prompt_ids" else _shorter(ids, room) for key, ids in encoded.items()}
    return encoded | own | {"_cut": before - _size(encoded), "_drop": _reason_to_drop(encoded, too_long)}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list)


def _nested(value: list[Any]) -> bool:
    return bool(value) and isinstance(value[0], list)


def _shorter(ids: list[Any], room: int) -> list[Any]:
    return [own[:room] for own in ids] if _nested(ids) else ids[:room]


def _flat(value: list[Any]) -> list[int]:
    return [i for own in value for i in own] if _nested(value) else value


def _size(encoded: Row) -> int:
    return sum(len(_flat(ids)) for key, ids in encoded.items() if key != "labels")


def _prompt_length(encoded: Row) -> int:
    if "prompt_ids" in encoded:
        return len(encoded["prompt_ids"])
    return next((i for i, label in enumerate(encoded["labels"]) if label != IGNORE), 0)


def check_vocabulary(encoded: Row, vocab_size: int) -> None:
    for key, ids in encoded.items():
        wrong = next((i for i in _flat(ids) if not 0 <= i < vocab_size and not (key == "labels" and i == IGNORE)), None)
        if wrong is not None:
            raise ValueError(
                f"token {wrong} in {key!r} is outside the model's vocabulary of {vocab_size}: "
                "is this the model's own tokenizer? (--add_tokens enlarges the model for new tokens)"
            )


def _reason_to_drop(encoded: Row, too_long: bool) -> str:
    if too_long:
        return TOO_LONG
    if "input_ids" in encoded:
        return "" if any(label != IGNORE for label in encoded["labels"][1:]) else "without a scored token"
    if any(all(label == IGNORE for label in labels) for labels in encoded["labels"]):
        return "without a scored token"
    if "chosen_ids" in encoded and encoded["chosen_ids"] == encoded["rejected_ids"]:
        return "whose answers are the same once cut"
    return ""
