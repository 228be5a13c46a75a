"""What a run shows: its lines in their order, only while it trains, and nothing of transformers' own."""

import re

import pytest
from conftest import tiny_model
from transformers import TrainerCallback

from rlhf import SFTConfig, SFTTrainer
from rlhf.trainers.progress import REPLACED


@pytest.fixture
def make(tmp_path, tokenizer, sft_rows):
    def one(callbacks=(), **options):
        base = dict(
            output_dir=str(tmp_path / "run"), max_steps=4, logging_steps=2, per_device_train_batch_size=4, use_cpu=True,
            eval_strategy="steps", eval_steps=4, save_strategy="no", report_to="none", learning_rate=2e-5,
        )  # fmt: skip
        return SFTTrainer(
            tiny_model(), args=SFTConfig(**{**base, **options}), train_dataset=sft_rows, processing_class=tokenizer,
            eval_dataset=sft_rows.select(range(4)), callbacks=list(callbacks),
        )  # fmt: skip

    return one


NUMBER = r"\d+\.\d+|\d+"
LINES = [
    rf"step 2/4 · loss ({NUMBER}) · ppl ({NUMBER}) · lr 1\.5e-5 · [\d.]+k? tok/s · 0:0\d left",
    rf"step 4/4 · loss ({NUMBER}) · ppl ({NUMBER}) · lr 5e-6 · [\d.]+k? tok/s",
    rf"eval 4/4 · loss ({NUMBER}) · ppl ({NUMBER}) · took [\d.]+ s",
]


def test_the_lines_of_a_run(make, capsys):
    trainer = make()
    trainer.train()
    lines = capsys.readouterr().out.splitlines()[:3]
    assert [bool(re.fullmatch(*pair)) for pair in zip(LINES, lines, strict=True)] == [True] * 3, lines
    log = {line["step"]: line for line in trainer.state.log_history if "loss" in line}
    loss, perplexity = re.fullmatch(LINES[0], lines[0]).groups()
    assert float(loss) == pytest.approx(log[2]["loss"], rel=1e-3)
    assert float(perplexity) == pytest.approx(log[2]["perplexity"], rel=1e-2)
    assert not any(isinstance(callback, REPLACED) for callback in trainer.callback_handler.callbacks)


def test_log_all_shows_the_other_metrics_and_an_evaluation_by_itself_shows_nothing(make, capsys):
    trainer = make(log_all=True, eval_strategy="no")
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[4] for line in lines[1::2]] == ["grad_norm", "grad_norm"]
    trainer.evaluate()
    assert capsys.readouterr().out == ""


class Raise(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise RuntimeError("a bug")


def test_an_error_closes_the_bar(make, monkeypatch):
    moves = []

    class Bar:
        def move(self, pace, evaluated):
            moves.append(pace.step)

        def close(self):
            moves.append("closed")

    monkeypatch.setattr("rlhf.trainers.progress.make_screen", lambda plain: Bar())
    with pytest.raises(RuntimeError, match="a bug"):
        make([Raise()]).train()
    assert moves == [0, "closed"]
