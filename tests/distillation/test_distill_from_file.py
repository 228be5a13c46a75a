"""Distillation from what a teacher said, kept on disk: the loss that the file implies, and what is refused."""

import math

import pytest
import torch
from conftest import close, tiny_model
from datasets import Dataset, load_dataset

from rlhf import DistillConfig, DistillTrainer
from rlhf.cli.main import main
from rlhf.distillation import TeacherFile
from rlhf.distillation.teachers import FileTeacher

K = 4


@pytest.fixture
def kept(tmp_path, data_files, tokenizer):
    """A teacher that is not the student, kept."""
    teacher = tmp_path / "teacher"
    tiny_model(seed=1).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)

    def run(**options):
        options = dict(model_name_or_path=teacher, dataset_name=data_files / "sft.jsonl", k=K) | options
        folder = tmp_path / f"kept-{len(list(tmp_path.iterdir()))}"
        argv = [f"--{key}={value}" for key, value in (options | {"output_dir": folder}).items()]
        assert main(["teacher", *argv]) == 0
        return folder

    return run


@pytest.fixture
def rows(data_files):
    return load_dataset("json", data_files=str(data_files / "sft.jsonl"), split="train")


@pytest.fixture
def distill(tmp_path, tokenizer, rows):
    def make(file, teacher=None, rows=rows, **changes):
        options = dict(
            max_steps=3, logging_steps=1, learning_rate=1e-3, report_to="none", save_strategy="no",
            per_device_train_batch_size=16, divergence="kl_divergence", train_sampling_strategy="sequential",
            teacher_file=None if file is None else str(file),
        ) | changes  # fmt: skip
        return DistillTrainer(
            tiny_model(),
            teacher,
            DistillConfig(str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, **options),
            train_dataset=rows,
            eval_dataset=rows.select(range(5)),
            processing_class=tokenizer,
        )

    return make


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def naive(folder, rows, beta):
    """Over k + 1 outcomes, one token at a time, from the arrays of the file and all the student's logits."""
    file, student = TeacherFile(folder), tiny_model().eval()
    total, count = 0.0, 0
    for row, example in enumerate(rows):
        z = student(torch.tensor([example["input_ids"]])).logits[0].double().log_softmax(-1)
        place = int(file.offsets[row])
        for position, label in enumerate(example["labels"]):
            if position == 0 or label == -100:
                continue
            log_p = torch.tensor(file.logps[place].astype("float64")).log_softmax(-1)
            ids = file.ids[place].astype("int64").tolist()
            log_q = [float(z[position - 1, i]) for i in ids]
            log_q.append(math.log(1 - sum(math.exp(x) for x in log_q)))
            for p, q in zip(log_p.tolist(), log_q, strict=True):
                total += math.exp(p) * (p - q) if beta == 0 else math.exp(q) * (q - p)
            place, count = place + 1, count + 1
    return total / count


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("options", [dict(), dict(packing=True, per_device_train_batch_size=64), dict(layout="rows")])
def test_the_loss_is_that_of_the_kept_outcomes(kept, distill, reverse, options):
    folder = kept()
    trainer = distill(folder, reverse=reverse, max_steps=1, **({"per_device_train_batch_size": 48} | options))
    data = trainer.train_dataset.rows if options.get("packing") else trainer.train_dataset
    trainer.train()
    want = naive(folder, data, float(reverse))
    close(logs(trainer)[0]["loss"], want)
    close(logs(trainer)[0]["divergence"], want)
    assert isinstance(trainer.teacher, FileTeacher)
    found = trainer.evaluate()
    close(found["eval_loss"], math.log(found["eval_perplexity"]))


def test_all_of_a_teacher_is_a_teacher(kept, distill, tmp_path):
    """k = V: what training with the teacher in memory gives, up to the float16 of the file."""
    file = distill(kept(k=330), learning_rate=1e-2)
    live = distill(None, teacher=str(tmp_path / "teacher"), learning_rate=1e-2)
    file.train()
    live.train()
    for one, other in zip(logs(file), logs(live), strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-3 * other["loss"]
    assert logs(file)[-1]["loss"] < logs(file)[0]["loss"]


def test_truncation_and_hard_labels(kept, distill):
    folder = kept(temperature=2.0)
    trainer = distill(folder, teacher_estimate="truncate", temperature=2.0, crossentropy_weight=0.5)
    trainer.train()
    first = logs(trainer)[0]
    close(first["loss"], first["divergence"] + 0.5 * math.log(first["perplexity"]))


def test_what_does_not_belong_is_refused(kept, distill, tmp_path, rows):
    folder = kept()
    with pytest.raises(ValueError, match=r"written at temperature 1.0, and training is at 2.0"):
        distill(folder, temperature=2.0)
    with pytest.raises(ValueError, match="teacher_estimate must be one of tail, truncate, got 'sample'"):
        distill(folder, teacher_estimate="sample")
    with pytest.raises(ValueError, match="total_variation has no estimate"):
        distill(folder, divergence="total_variation")
    with pytest.raises(ValueError, match="teacher_file stands for a teacher"):
        distill(folder, teacher_model_name_or_path="x")
    with pytest.raises(ValueError, match="the rows are others"):
        distill(folder, rows=Dataset.from_list(rows.to_list()[::-1]))
    with pytest.raises(FileNotFoundError, match="write it with `rlhf teacher`"):
        distill(tmp_path / "nothing")
