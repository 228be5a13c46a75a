"""A loss or gradient that is not finite: its step changes no weight, is told with its rows, and ends the run or not."""

import math
import re

import pytest
import torch
from conftest import sentences, tiny_model, write_rows
from datasets import Dataset

from rlhf import (
    DistillConfig,
    DistillTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf.cli.main import main
from rlhf.data.searching import ids_of_sequences

BAD = 5  # the row that has a loss of NaN
MARK = "~"  # a token that no other row has
OFFLINE = {
    "packed": (SFTTrainer, SFTConfig, {"packing": True, "max_length": 40}),
    "sft": (SFTTrainer, SFTConfig, {"layout": "rows"}),
    "dpo": (DPOTrainer, DPOConfig, {"precompute_ref_log_probs": False}),
    "kto": (KTOTrainer, KTOConfig, {"loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": False}),
    "reward": (RewardTrainer, RewardConfig, {}),
    "distill": (DistillTrainer, DistillConfig, {}),
}


def rows_with_a_bad_one(kind):
    texts = zip(sentences(1, 16), sentences(2, 16), sentences(3, 16), strict=True)
    rows = [{"prompt": prompt, "chosen": " " + one, "rejected": " " + other} for prompt, one, other in texts]
    rows[BAD]["prompt"] += MARK
    if kind in ("dpo", "reward"):
        return Dataset.from_list(rows)
    return Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in rows])


@pytest.fixture
def make(tmp_path, tokenizer, monkeypatch):
    def trainer_of(kind, bad=True, **options):
        trainer_class, config_class, own = OFFLINE[kind]
        base = dict(max_steps=4, save_strategy="steps", save_steps=1, report_to="none", use_cpu=True, logging_steps=1)
        base |= dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, disable_tqdm=True, seed=1)
        args = config_class(str(tmp_path / "run"), **(base | own | options))
        rows = rows_with_a_bad_one(kind)
        if kind in ("kto", "distill"):
            rows = rows.remove_columns([] if kind == "kto" else ["label"])
        more = {"teacher_model": tiny_model(seed=1)} if kind == "distill" else {}
        trainer = trainer_class(
            tiny_model(), args=args, train_dataset=rows, processing_class=tokenizer, **more
        )  # fmt: skip
        if bad:
            make_bad(trainer, tokenizer, monkeypatch)
        return trainer

    return trainer_of


def make_bad(trainer, tokenizer, monkeypatch, value=math.nan):
    """The loss of each sequence with the mark is not finite."""
    (mark,) = tokenizer(MARK, add_special_tokens=False)["input_ids"]
    measure = trainer.measure

    def measured(model, batch):
        measures = measure(model, batch)
        sequences = ids_of_sequences(batch)
        size = len(sequences) // len(measures.loss)
        is_bad = torch.tensor([mark in ids for ids in sequences[::size]])
        if not torch.is_grad_enabled() or not is_bad.any():
            return measures
        total = None if measures.total is None else measures.total * value
        return measures._replace(loss=measures.loss.where(~is_bad, measures.loss * value), total=total)

    monkeypatch.setattr(trainer, "measure", measured)


def weights(trainer):
    return {name: weight.clone() for name, weight in trainer.model.named_parameters()}


@pytest.mark.parametrize("kind", OFFLINE)
def test_the_row_is_named_and_nothing_is_changed_or_saved(kind, make, tmp_path):
    trainer = make(kind, max_steps=2)
    before = []
    step = trainer._get_grad_norm
    trainer._get_grad_norm = lambda *args, **kwargs: (before.append(weights(trainer)), step(*args, **kwargs))[1]
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    number = trainer.state.global_step + 1
    said = str(error.value)
    assert said.startswith(f"step {number}: the loss is nan for row {BAD + 1} of data set ('"), said
    assert MARK in said and said.endswith("; nothing was saved; look at these rows, lower --learning_rate, or pass "
                                          "--on_nonfinite skip")  # fmt: skip
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == number - 1
    after = weights(trainer)
    assert all(torch.equal(weight, after[name]) for name, weight in before[-1].items())


def losses(trainer):
    return {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}


def test_a_step_is_left_out(make, caplog):
    """Not in the weights, not in the log; the step after it goes on."""
    each = make("sft", on_nonfinite="skip")
    each.train()
    assert each.state.global_step == 4 and each.nonfinite_steps == 2  # once an epoch of two steps
    lines = losses(each)
    assert len(lines) == 2 and all(map(math.isfinite, lines.values()))
    assert [line["nonfinite_steps"] for line in each.state.log_history][-1] == 2
    assert f"row {BAD + 1} of data set" in caplog.text and "left out (2 of at most 10)" in caplog.text
    together = make("sft", on_nonfinite="skip", logging_steps=4, save_strategy="no")
    together.train()
    assert losses(together)[4] == pytest.approx(sum(lines.values()) / 2)
    assert all(weight.isfinite().all() for weight in weights(together).values())


def test_only_so_many_steps_are_left_out(make):
    with pytest.raises(FloatingPointError, match=r"; 1 steps were left out before \(--max_nonfinite_steps\)$"):
        make("sft", on_nonfinite="skip", max_nonfinite_steps=1, save_strategy="no").train()


def test_a_gradient_alone_names_the_rows_of_its_step(make):
    trainer = make("sft", bad=False, max_grad_norm=0.0, gradient_accumulation_steps=1)
    trainer.model.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        FloatingPointError, match=r"^step 1: the gradient is not finite .*, though the loss is; row \d+ "
    ):
        trainer.train()


def test_a_scaler_of_float16_leaves_steps_out_itself(make):
    """Its scale is too large at first; below 1 the gradient itself overflows."""

    class Scaler:
        scale = 65536.0

        def get_scale(self):
            return self.scale

    trainer = make("sft", bad=False)
    trainer.accelerator.scaler = Scaler()
    trainer._treat_nonfinite(trainer.model, math.inf, trainer.step_record)
    Scaler.scale = 0.5
    with pytest.raises(FloatingPointError, match="the gradient is not finite"):
        trainer._treat_nonfinite(trainer.model, math.inf, trainer.step_record)


def test_samples_are_named_by_their_prompts(tmp_path, tokenizer, monkeypatch, capsys):
    """Through the command: status 3, one line, no model."""
    prompts = [{"prompt": text} for text in ("the cat", "a dog ~", "big tree", "no")]
    rows = write_rows(tmp_path / "prompts.jsonl", prompts)
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder), tokenizer.save_pretrained(folder)
    measure = GRPOTrainer.measure
    (mark,) = tokenizer(MARK, add_special_tokens=False)["input_ids"]

    def measured(self, model, batch):
        measures = measure(self, model, batch)
        bad = torch.tensor(any(mark in ids for ids in ids_of_sequences(batch)))
        return measures._replace(total=measures.total.where(~bad, math.nan), loss=measures.loss.where(~bad, math.nan))

    monkeypatch.setattr(GRPOTrainer, "measure", measured)
    argv = f"grpo --model {folder} --data {rows} --output_dir {tmp_path / 'run'} --max_steps 4 --use_cpu "
    argv += (
        "--reward_funcs length_reward(target=3) --num_generations 2 --per_device_train_batch_size 2 --max_length 64 "
    )
    argv += "--max_completion_length 4 --save_strategy no --disable_tqdm true --beta 0"
    assert main(argv.split()) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf grpo: ")]
    assert re.match(r"rlhf grpo: step \d: the loss is nan for row 2 of .*prompts.jsonl \('a dog ~", line)
    assert not list((tmp_path / "run").glob("*model*"))


def test_a_loss_of_evaluation_warns(make, caplog):
    make("sft", bad=False).log({"eval_loss": math.nan, "eval_kl": 1.0})
    assert "step 0: not finite in evaluation: eval_loss" in caplog.text
