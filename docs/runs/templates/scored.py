"""Writes what of conversations.jsonl is scored under each of five chat templates: README.md and scored.md."""

from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf.data import Reading, load_data
from rlhf.evaluation import Audit, audit

HERE = Path(__file__).parent
SPECIAL = {
    "chatml": ["<|im_end|>", "<|im_start|>"],
    "llama3": ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
    "qwen3": ["<|im_end|>", "<|im_start|>"],
    "mistral": ["</s>", "<s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
                "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
    "gpt_oss": ["<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"],
}  # fmt: skip  # the first ends an answer
BEGIN, END = "<!-- written by scored.py -->", "<!-- end -->"
BOS = {"llama3": "<|begin_of_text|>", "mistral": "<s>"}


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the file's own words, with the family's special tokens and its template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL[family], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator((HERE / "conversations.jsonl").read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[family][0], pad_token=SPECIAL[family][0], bos_token=BOS.get(family)
    )
    tokenizer.chat_template = (HERE / f"{family}.jinja").read_text(encoding="utf-8").rstrip("\n")
    return tokenizer


def table(found: dict[str, Audit], split: dict[str, Audit], rows: Any) -> str:
    """One row a conversation, one column a template: how many of its answers are scored; then what is told."""
    lines = ["| conversation | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for number, row in enumerate(rows, start=1):
        cells = [_cell(one, number, row["messages"]) for one in found.values()]
        lines.append(f"| {number}. {row['name']} | " + " | ".join(cells) + " |")
    thoughts = [m["reasoning_content"] for row in rows for m in row["messages"] if m.get("reasoning_content")]
    for name, audits in (("", found), (" with `--split_turns`", split)):
        scored = [_scored_text(one) for one in audits.values()]
        cells = [f"{sum(thought in text for thought in thoughts)} of {len(thoughts)}" for text in scored]
        lines.append(f"| thoughts scored{name} | " + " | ".join(cells) + " |")
    shares = [f"{one.scored_tokens / one.tokens:.0%}" for one in found.values()]
    lines.append("| share of tokens scored | " + " | ".join(shares) + " |")
    told = [f"* {family}, row {where[0]}: {note}" for family, one in found.items() for note, where in one.notes.items()]
    told += [f"* {family}, row {row}: {error}" for family, one in found.items() for row, error in one.errors]
    return "\n".join([*lines, "", "Messages:", "", *told]) + "\n"


def _scored_text(found: Audit) -> str:
    pieces = (piece for _, sequences in found.samples for shown in sequences for piece in shown)
    return "".join(piece.text for piece in pieces if piece.learned)


def _cell(found: Audit, number: int, messages: list[dict[str, Any]]) -> str:
    if number in dict(found.errors):
        return "refused"
    shown = next(sequences for row, sequences in found.samples if row == number)
    # Answers behind each other are one stretch of tokens: the tokens that end them tell them apart.
    answers = [run for learned, run in ((k, list(g)) for k, g in groupby(shown[0], lambda p: p.learned)) if learned]
    return f"{len(answers)} of {sum(m['role'] == 'assistant' for m in messages)}"


def texts(found: dict[str, Audit], number: int) -> str:
    """The row under each template, with brackets around what is scored."""
    parts = []
    for family, one in found.items():
        shown = next((sequences for row, sequences in one.samples if row == number), None)
        if shown is None:
            continue
        runs = groupby(shown[0], key=lambda piece: piece.learned)
        joined = [(learned, "".join(piece.text for piece in run)) for learned, run in runs]
        text = "".join(f"⟦{words}⟧" if learned else words for learned, words in joined)
        parts.append(f"{family}:\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def audits(rows: Any, split_turns: bool) -> dict[str, Audit]:
    """The audit of the rows under each template."""
    reading = Reading(split_turns=split_turns)
    return {
        family: audit(rows, "conversations.jsonl", "sft", tokenizer_of(family), reading, samples=len(rows))
        for family in SPECIAL
    }


def with_table(page: str, written: str) -> str:
    """The page with the table in place of the one between its marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + written + END + rest.split(END)[1]


def main() -> None:
    rows = load_data(str(HERE / "conversations.jsonl"))
    found = audits(rows, False)
    page = (HERE / "README.md").read_text(encoding="utf-8")
    (HERE / "README.md").write_text(with_table(page, table(found, audits(rows, True), rows)), encoding="utf-8")
    (HERE / "scored.md").write_text(
        "# Rows 3 and 4 under each template; scored tokens are between ⟦ and ⟧\n\n"
        + "\n".join(f"## Row {number}\n\n{texts(found, number)}" for number in (3, 4)),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
