"""Rows that are read while training goes on: the same numbers as from rows that are held, and again after a stop."""

import json

import pytest
from conftest import close, sentences, tiny_model, write_rows
from datasets import IterableDataset

from rlhf import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf.cli.main import main
from rlhf.data import Mixture, load_data

KINDS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "kto": (KTOTrainer, KTOConfig),
}


def rows_of(kind, count=40):
    words = [sentences(seed, count, 3, 9) for seed in (21, 22, 23)]
    if kind == "sft":
        return [{"prompt": p, "completion": " " + c} for p, c, _ in zip(*words, strict=True)]
    if kind == "kto":
        return [{"prompt": p, "completion": " " + c, "label": i % 2 == 0} for i, (p, c, _) in enumerate(zip(*words, strict=True))]  # fmt: skip  # noqa: E501
    return [{"prompt": p, "chosen": " " + c, "rejected": " " + r} for p, c, r in zip(*words, strict=True)]


@pytest.fixture
def run(tmp_path, tokenizer):
    def run(kind, rows, folder="run", resume=None, **options):
        trainer, config = KINDS[kind]
        args = dict(
            output_dir=str(tmp_path / folder), report_to="none", use_cpu=True, max_steps=6, learning_rate=1e-2,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1, save_steps=3,
            train_sampling_strategy="sequential", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        made = trainer(tiny_model(), args=config(**args | options), train_dataset=rows, processing_class=tokenizer)
        made.train(resume_from_checkpoint=resume)
        return made

    return run


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_trains_as_rows_in_the_same_order_do(kind, run, tmp_path):
    file = str(write_rows(tmp_path / "rows.jsonl", rows_of(kind)))
    held, stream = run(kind, load_data(file)), run(kind, load_data(file, streaming=True))
    close(losses(stream), losses(held))
    assert len(losses(stream)) == 6
    for name, value in weights(held).items():
        close(weights(stream)[name], value)
    again = stream.evaluate(load_data(file, "train[:7]", streaming=True))
    close(again["eval_loss"], held.evaluate(load_data(file, "train[:7]"))["eval_loss"])


@pytest.mark.parametrize("buffer", [0, 8])
def test_a_stopped_run_goes_on_bit_by_bit(run, tmp_path, buffer):
    file = str(write_rows(tmp_path / "rows.jsonl", rows_of("sft", 10)))  # a run reads them more than once

    def stream():
        rows = load_data(file, streaming=True)
        return rows.shuffle(seed=1, buffer_size=buffer) if buffer else rows

    whole = run("sft", stream(), "whole", save_strategy="steps")
    resumed = run("sft", stream(), "again", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed)[3:] == losses(whole)[3:]
    assert all((weights(resumed)[name] == value).all() for name, value in weights(whole).items())


def test_rows_of_a_generator_that_differ_in_their_keys(run):
    def generate():
        yield {"prompt": "the cat", "completion": " is"}
        for text in sentences(5, 30):
            yield {"prompt": "the dog", "completion": " " + text, "source": {"page": 3}}

    assert len(losses(run("sft", IterableDataset.from_generator(generate)))) == 6


def test_what_is_dropped_is_told(run, tmp_path, caplog):
    rows = rows_of("sft", 12)
    rows[1]["prompt"] = rows[4]["prompt"] = "the " * 60
    stream = load_data(str(write_rows(tmp_path / "rows.jsonl", rows)), streaming=True)
    run("sft", stream, max_length=32, drop_long_prompts=True)
    assert "rows.jsonl, row 2: dropped rows with too long a prompt (1 so far)" in caplog.text
    rows[7]["completion"] = ""
    stream = load_data(str(write_rows(tmp_path / "bad.jsonl", rows)), streaming=True)
    with pytest.raises(ValueError, match=r"bad.jsonl, row 8: 'completion' is empty"):
        run("sft", stream, max_length=32, drop_long_prompts=True)


def test_streams_mix(run, tmp_path):
    files = [str(write_rows(tmp_path / f"{kind}.jsonl", rows_of(kind))) for kind in ("sft", "dpo")]
    mixture = Mixture(tuple(load_data(file, streaming=True) for file in files), (0.5, 0.5))
    assert losses(run("sft", mixture)) == losses(run("sft", mixture))


REFUSED = {
    "no end": ("sft", dict(max_steps=-1), "pass --max_steps"),
    "packing": ("sft", dict(packing=True), "need rows, not a stream"),
    "a plan": ("dpo", dict(tokens_per_batch=64), "need rows, not a stream"),
    "a reference before": ("dpo", dict(precompute_ref_log_probs=True), "a stream has no place to keep"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_all_rows_is_refused_by_name(case, run, tmp_path):
    kind, options, said = REFUSED[case]
    stream = load_data(str(write_rows(tmp_path / "rows.jsonl", rows_of(kind))), streaming=True)
    with pytest.raises(ValueError, match=said):
        run(kind, stream, **options)


def test_the_command_streams(tmp_path, model_folder, capsys):
    file = write_rows(tmp_path / "rows.jsonl", rows_of("sft"))
    argv = ["--model_name_or_path", str(model_folder), "--report_to", "none", "--use_cpu", "--dataset_name", str(file)]
    argv += ["--streaming", "--logging_steps", "1", "--output_dir"]
    assert main(["sft", *argv, str(tmp_path / "a"), "--max_steps", "2"]) == 0
    state = json.loads((tmp_path / "a" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert main(["sft", *argv, str(tmp_path / "b")]) == 2
    assert "a stream does not say how many rows it has: pass --max_steps" in capsys.readouterr().err
