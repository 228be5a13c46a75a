"""Answers to the same prompts at each evaluation, which change nothing of a run."""

import pytest
import torch
from conftest import sentences, tiny_model
from datasets import Dataset

from rlhf import PPOConfig, PPOTrainer, SFTConfig, SFTTrainer
from rlhf.runs.files import read_lines
from rlhf.trainers.sample_answers import choose_prompts, shown
from rlhf.visible import visible

PROMPTS = [{"prompt": text} for text in sentences(1, 12)]


@pytest.fixture
def make(tmp_path, tokenizer, sft_rows):
    def one(kind, name, **options):
        base = dict(
            output_dir=str(tmp_path / name), max_steps=4, logging_steps=2, save_steps=2, per_device_train_batch_size=4,
            use_cpu=True, eval_strategy="steps", eval_steps=2, report_to="none", learning_rate=1e-3,
        )  # fmt: skip
        base |= {"max_length": 96, "max_completion_length": 6} if kind == "ppo" else {}
        trainer, config = {"sft": (SFTTrainer, SFTConfig), "ppo": (PPOTrainer, PPOConfig)}[kind]
        rewards = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
        rows = sft_rows if kind == "sft" else Dataset.from_list(PROMPTS)
        return trainer(
            # With dropout, random numbers that are drawn by the answers would change the weights.
            tiny_model("gpt2", resid_pdrop=0.2), args=config(**{**base, **options}), train_dataset=rows,
            eval_dataset=rows.select(range(3)), processing_class=tokenizer, **(rewards if kind == "ppo" else {}),
        )  # fmt: skip

    return one


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_answers_move_no_number_of_a_run(kind, make, tmp_path):
    times = ("runtime", "per_second", "tokens_per_second")
    runs = []
    for name, count in (("with", 2), ("without", 0)):
        trainer = make(kind, name, num_sample_answers=count, disable_dropout=False)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        trainer.train()
        log = [{k: v for k, v in line.items() if not any(t in k for t in times)} for line in trainer.state.log_history]
        weights = [weight.detach().clone() for weight in trainer.model.parameters()]
        modes = [module.training for module in trainer.model.modules()]
        runs.append((log, modes, weights, torch.get_rng_state()))
    assert runs[0][:2] == runs[1][:2]
    assert all(torch.equal(one, other) for one, other in zip(runs[0][2], runs[1][2], strict=True))
    assert torch.equal(runs[0][3], runs[1][3])
    lines = read_lines(tmp_path / "with" / "samples.jsonl")
    assert [(line["step"], line["index"]) for line in lines] == [(step, i) for step in (2, 4) for i in (0, 1)]
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_answers_are_those_of_the_model_and_a_resumed_run_has_each_step_once(make, tmp_path, tokenizer, capsys, caplog):
    make("sft", "run").train()
    before = read_lines(tmp_path / "run" / "samples.jsonl")
    resumed = make("sft", "run")
    resumed.train(str(tmp_path / "run" / "checkpoint-2"))
    assert "missing keys" not in caplog.text  # the head is the embedding
    resumed.evaluate()  # again at the last step, as a command does
    lines = read_lines(tmp_path / "run" / "samples.jsonl")
    assert lines == before and len(lines) == 4
    model = resumed.model.model.eval()
    ids = torch.tensor([resumed.sample_prompts[0].ids])
    greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
    assert lines[-2]["completion"] == tokenizer.decode(greedy[0, ids.size(1) :], skip_special_tokens=True)
    assert visible(shown(lines[-2]["prompt"], lines[-2]["completion"])) in capsys.readouterr().out


def test_a_model_that_cannot_answer_is_told_once_and_trains_on(make, monkeypatch, caplog, tmp_path):
    trainer = make("sft", "run", save_strategy="no")

    def fail(*args, **kwargs):
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr("rlhf.trainers.sample_answers.LocalEngine.generate", fail)
    trainer.train()
    assert trainer.state.global_step == 4 and not (tmp_path / "run" / "samples.jsonl").exists()
    told = [record.getMessage() for record in caplog.records if "sample answers" in record.getMessage()]
    assert told == ["no sample answers (RuntimeError: no room at all); --num_sample_answers 0 turns them off"]


def test_prompts_are_the_first_different_ones_with_room_for_an_answer(tokenizer):
    args = SFTConfig("unused", max_length=64, use_cpu=True)
    long_text = " ".join(["cat"] * 60)
    rows = Dataset.from_list(
        [{"prompt": text, "completion": "yes"} for text in (long_text, "the cat", "the cat", "a dog")]
    )
    assert [one.prompt for one in choose_prompts(rows, 2, tokenizer, args)] == ["the cat", "a dog"]
    assert [one.prompt for one in choose_prompts({"first": rows, "second": None}, 1, tokenizer, args)] == ["the cat"]
    # A text has no prompt: its first words are one.
    texts = Dataset.from_list([{"text": "too short"}, {"text": "a b c d e f  g h i"}])
    assert [one.prompt for one in choose_prompts(texts, 2, tokenizer, args)] == ["a b c d e f  g h"]
    assert choose_prompts(Dataset.from_list([{"input_ids": [1], "labels": [1]}]), 2, tokenizer, args) == []
    assert choose_prompts(None, 2, tokenizer, args) == choose_prompts(rows, 0, tokenizer, args) == []


def test_an_answer_is_shown_in_one_line():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "why\nnot"}]
    assert shown(messages, " because \n\n of it") == "    prompt  why not\n    answer  because of it"
    assert len(shown("x" * 500, "").splitlines()[0]) == len("    prompt  ") + 100


def test_sharded_weights_are_told(make, monkeypatch, caplog):
    trainer = make("sft", "run", save_strategy="no")
    monkeypatch.setattr("rlhf.trainers.sample_answers.is_sharded", lambda accelerator: True)
    trainer.train()
    assert [record.getMessage() for record in caplog.records if "sample answers" in record.getMessage()] == [
        "no sample answers (the weights are sharded); --num_sample_answers 0 turns them off"
    ]
