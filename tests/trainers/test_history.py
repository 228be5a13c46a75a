"""`trainer.history()`: the log as a table."""

import math

from conftest import tiny_model

from rlhf import SFTConfig, SFTTrainer
from rlhf.trainers.history import as_frame


def test_lines_become_a_row_for_each_step():
    lines = [
        {"loss": 3.0, "epoch": 0.1, "step": 5},
        {"loss": 2.0, "epoch": 0.2, "step": 10},
        {"eval_loss": 2.5, "epoch": 0.2, "step": 10},
        {"train_runtime": 1.0, "train_loss": 2.5, "epoch": 0.2, "step": 10},
    ]
    frame = as_frame(lines)
    assert frame.index.name == "step" and list(frame.index) == [5, 10]
    assert list(frame.columns) == ["loss", "epoch", "eval_loss"]
    assert frame.loc[10].to_dict() == {"loss": 2.0, "epoch": 0.2, "eval_loss": 2.5}
    assert math.isnan(frame.loc[5, "eval_loss"])
    assert as_frame([]).empty and as_frame([]).index.name == "step"


def test_a_trainer_before_training_and_after_resuming(tmp_path, tokenizer, sft_rows):
    def trainer(steps):
        args = SFTConfig(
            str(tmp_path), max_steps=steps, logging_steps=1, save_steps=2, eval_steps=2, eval_strategy="steps",
            use_cpu=True, report_to="none", disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        return SFTTrainer(tiny_model(), args, train_dataset=sft_rows, eval_dataset=sft_rows, processing_class=tokenizer)

    first = trainer(2)
    assert first.history().empty
    first.train()
    second = trainer(4)
    second.train(resume_from_checkpoint=True)
    history = second.history()
    assert list(history.index) == [1, 2, 3, 4] and history["loss"].notna().all()
    assert list(history["eval_loss"].dropna().index) == [2, 4]
    assert history.loc[:2, "loss"].tolist() == first.history()["loss"].tolist()
