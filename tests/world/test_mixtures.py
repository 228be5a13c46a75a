"""Several data sets in one run: each in its own columns, with shares that come from the seed."""

import logging

import pytest
from conftest import sentences, tiny_model, write_rows
from datasets import Dataset

from rlhf import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from rlhf.cli.arguments import DataArguments
from rlhf.cli.main import main
from rlhf.cli.parsing import parse
from rlhf.data import Mixture, load_datasets


def texts(count, prefix, length=4):
    return Dataset.from_list([{"text": f"{prefix} " + text} for text in sentences(7, count, length, length)])


def pairs(count):
    return Dataset.from_list([{"prompt": "why", "completion": " " + text} for text in sentences(8, count, 3, 9)])


def rows_of(mixture, tmp_path, tokenizer, seed=3, trainer=SFTTrainer, config=SFTConfig):
    args = config(output_dir=str(tmp_path), report_to="none", use_cpu=True, seed=seed)
    return trainer(tiny_model(), args=args, train_dataset=mixture, processing_class=tokenizer).train_dataset


def test_shares_are_of_rows_and_come_from_the_seed(tmp_path, tokenizer, caplog):
    caplog.set_level(logging.INFO, "rlhf")
    mixture = Mixture((texts(300, "cat", 9), pairs(300)), (3, 1))
    rows = rows_of(mixture, tmp_path, tokenizer)
    prompts = sum(row["labels"][0] == -100 for row in rows)  # a text has no prompt
    assert 0.15 < prompts / len(rows) < 0.35 and 300 < len(rows) < 500
    assert (
        f"data set: {len(rows) - prompts} of 300 rows: {100 * (1 - prompts / len(rows)):.1f} % of all rows"
        in caplog.text
    )
    once = {tuple(row["input_ids"]) for row in rows if row["labels"][0] != -100}
    assert len(once) == len(rows) - prompts
    assert rows_of(mixture, tmp_path, tokenizer).to_list() == rows.to_list()
    assert rows_of(mixture, tmp_path, tokenizer, seed=4).to_list() != rows.to_list()


def test_shares_of_tokens(tmp_path, tokenizer):
    short, long = texts(400, "cat", 3), texts(400, "dog", 12)
    tokens = {"cat": 0, "dog": 0}
    for row in rows_of(Mixture((short, long), (1, 1), by="tokens"), tmp_path, tokenizer):
        tokens[tokenizer.decode(row["input_ids"][:8]).split()[0]] += len(row["input_ids"])
    assert 0.4 < tokens["cat"] / (tokens["cat"] + tokens["dog"]) < 0.6


def test_without_weights_every_row_comes_once(tmp_path, tokenizer):
    rows = rows_of(Mixture((texts(5, "cat"), pairs(3))), tmp_path, tokenizer)
    alone = [rows_of(part, tmp_path, tokenizer).to_list() for part in (texts(5, "cat"), pairs(3))]
    assert rows.to_list() == alone[0] + alone[1]


def test_preferences_of_two_forms(tmp_path, tokenizer):
    plain = Dataset.from_list([{"prompt": "why", "chosen": " yes", "rejected": " no"}] * 3)
    user = {"role": "user", "content": "why"}
    tool = {"role": "tool", "content": "is it"}  # not scored
    answers = {
        key: [{"role": "assistant", "content": word}, tool, {"role": "assistant", "content": word}]
        for key, word in (("chosen", "a"), ("rejected", "b"))
    }
    chats = Dataset.from_list([{"prompt": [user], **answers}] * 3)
    rows = rows_of(Mixture((plain, chats)), tmp_path, tokenizer, trainer=DPOTrainer, config=DPOConfig)
    assert rows[0]["labels"] == [rows[0]["chosen_ids"], rows[0]["rejected_ids"]] and -100 in rows[3]["labels"][0]


SOURCES = {
    "some without": (["a.jsonl:0.5", "b.jsonl"], "b.jsonl has no weight, but others have"),
    "nothing there": (["a.jsonl:1", "c.jsonl:1"], "c.jsonl: no such file"),
    "a weight of 0": (["a.jsonl:0", "b.jsonl:1"], "give each data set a weight above 0"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_mistakes_are_named(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path / name, [{"text": "a"}])
    sources, said = SOURCES[case]
    with pytest.raises((ValueError, OSError), match=said):
        load_datasets(sources)


def test_a_weight_is_what_follows_the_last_colon(tmp_path):
    odd = write_rows(tmp_path / "C:1", [{"text": "a"}])  # as drive letters and such names have
    (tmp_path / "a:b.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(ValueError, match="cannot tell the format"):
        load_datasets(str(odd))
    mixture = load_datasets([f"{tmp_path}/a:b.jsonl:2", f"{tmp_path}/a:b.jsonl:1.5"])
    assert mixture.weights == (2.0, 1.5) and [part[0]["text"] for part in mixture.parts] == ["b", "b"]


def test_the_command_takes_them_and_so_does_yaml(tmp_path, model_folder, data_files, capsys, caplog):
    caplog.set_level(logging.INFO, "rlhf")
    text = write_rows(tmp_path / "text.jsonl", texts(30, "cat"))
    argv = ["--model_name_or_path", str(model_folder), "--report_to", "none", "--use_cpu", "--max_steps", "1"]
    both = [f"{text}:0.5", f"{data_files / 'sft.jsonl'}:0.5"]
    assert main(["sft", *argv, "--output_dir", str(tmp_path / "out"), "--dataset_name", *both]) == 0
    assert "of 30 rows: " in caplog.text and "of 48 rows: " in caplog.text
    config = tmp_path / "c.yaml"
    config.write_text("dataset_name: {a.jsonl: 0.7, b.parquet: 0.3}\nmixture: tokens\n")
    (data,) = parse("sft", (DataArguments,), ["--config", str(config)])
    assert data.dataset_name == ["a.jsonl:0.7", "b.parquet:0.3"] and data.mixture == "tokens"
    config.write_text("dataset_name: [a.jsonl:0.7, b.parquet:0.3]\n")
    assert parse("sft", (DataArguments,), ["--config", str(config)])[0].dataset_name == data.dataset_name
