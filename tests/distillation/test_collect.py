"""A teacher run once over a data set: the values, the bytes of an interrupted run, and each refusal."""

import json

import pytest
import torch
from conftest import tiny_model, write_rows
from datasets import load_dataset

from rlhf.cli.main import main
from rlhf.data import Collator, tokenize_sft
from rlhf.distillation import TeacherFile, open_teacher_file, teacher_file
from rlhf.distillation import collect as running
from rlhf.logprobs import model_top_k_divergence
from rlhf.models import choose_layout, load_model
from rlhf.trainers.run_lock import run_lock


class Killed(Exception):
    """Ends a command in the midst of its work; the command does not catch it."""


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def teach(tmp_path, model_folder, data_files, capsys):
    """Run the command; gives the folder, or what it said."""

    def run(*more, fails=False, name="kept", **options):
        options = dict(
            model_name_or_path=model_folder, dataset_name=data_files / "sft.jsonl", output_dir=tmp_path / name,
            k=5, tokens_per_batch=100,
        ) | options  # fmt: skip
        capsys.readouterr()
        code = main(["teacher", *(f"--{key}={value}" for key, value in options.items()), *more])
        err = capsys.readouterr().err
        assert code == (2 if fails else 0), err
        return err if fails else tmp_path / name

    return run


def tokenised(path, tokenizer):
    return tokenize_sft(load_dataset("json", data_files=str(path), split="train"), tokenizer, max_length=1024, vocab_size=330)  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_the_values_are_those_of_a_whole_softmax(teach, model_folder, data_files, tokenizer, temperature):
    folder = teach(temperature=temperature)
    rows = tokenised(data_files / "sft.jsonl", tokenizer)
    marked, file = open_teacher_file(folder, rows, tokenizer)
    model = load_model(str(model_folder)).eval()
    batch = Collator(extras={"teacher": file.of_examples})([marked[row] for row in (3, 0, 17)])
    teacher = batch.extras["teacher"]
    logps, ids, rest = [], [], []
    for row in (3, 0, 17):  # one at a time, by the plain formula in float64
        tokens, labels = (torch.tensor(rows[row][name]) for name in ("input_ids", "labels"))
        dense = (model(tokens[None]).logits[0].double() / temperature).softmax(-1).detach()
        for position in range(1, len(tokens)):
            if labels[position] != -100:
                best = dense[position - 1].sort(descending=True)
                logps.append(best.values[:5].log())
                ids.append(best.indices[:5])
                rest.append(best.values[5:].sum().log())
    want = torch.stack(logps)
    assert ((teacher.logps - want).abs() < want.abs() / 1000 + 1e-4).all()
    assert (teacher.ids == torch.stack(ids)).float().mean() > 0.99
    assert ((teacher.rest - torch.stack(rest)).abs() < torch.stack(rest).abs() / 1000 + 1e-4).all()
    assert file.key["about"]["model"] == str(model_folder)


@pytest.mark.parametrize("layout", ["rows", "segments"])
def test_a_student_that_is_the_teacher_learns_nothing_from_the_file(teach, model_folder, data_files, tokenizer, layout):
    rows, file = open_teacher_file(teach(k=20), tokenised(data_files / "sft.jsonl", tokenizer), tokenizer)
    model, other = load_model(str(model_folder)), tiny_model(seed=7)
    for one in (model, other):
        assert choose_layout(one, layout) == layout
    batch = Collator(layout=layout, extras={"teacher": file.of_examples})(list(rows))
    norms = []
    for one in (model, other):
        scores = model_top_k_divergence(one, batch.targets, batch.extras["teacher"], **batch.inputs())
        scores.loss.backward()
        norms.append(sum(float(p.grad.norm()) for p in one.parameters()))
        assert (scores.divergence.abs().max() < 1e-5) == (one is model)
    assert norms[0] < 2e-3 * norms[1]  # float16


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_pass_goes_on_to_the_same_bytes(teach, monkeypatch, tmp_path, after):
    whole = files(teach())
    forward, seen = running.model_top_k, []

    def breaks(*args, **kwargs):
        if len(seen) == after:
            raise Killed
        seen.append(len(args[1]))
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(running, "model_top_k", breaks)
        teach(name="again")
    assert 0 < len(TeacherFile(tmp_path / "again").missing()) < 48
    first = len(seen)
    monkeypatch.setattr(running, "model_top_k", lambda *a, **k: (seen.append(0), forward(*a, **k))[1])
    folder = teach(name="again")
    assert files(folder) == whole
    total = len(seen)
    assert total > first
    teach(name="again")
    assert len(seen) == total  # all is there


def test_another_teacher_data_k_and_so_on_are_refused_by_name(teach, tmp_path, tokenizer, data_files, sft_rows):
    folder = teach()
    before = files(folder)
    other = tmp_path / "other"
    tiny_model(seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    fewer = write_rows(tmp_path / "fewer.jsonl", list(sft_rows)[:20])
    template = tmp_path / "plain.jinja"
    template.write_text("{{ messages }}")
    for said, options in (
        ("the teacher is another (its weights", dict(model_name_or_path=other)),
        ("k is 5, not 8", dict(k=8)),
        ("k is 5, not 0", dict(k=0)),
        ("temperature is 1.0, not 2.0", dict(temperature=2.0)),
        ("the rows are others", dict(dataset_name=fewer)),
        ("the rows are others", dict(max_length=16)),
        ("the chat template is another", dict(chat_template_path=template)),
    ):
        err = teach(fails=True, **options)
        assert f"kept for something else: {said}" in err and "--overwrite" in err, err
        assert files(folder) == before
    teach("--overwrite", k=8)
    assert TeacherFile(folder).key["k"] == 8


def test_bad_input_is_one_line(teach, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "not empty and holds no teacher.json" in teach("--overwrite", fails=True, name="mine")
    assert "k must be at least 0" in teach(fails=True, k=-1)
    assert "--k 331 is more than the teacher's vocabulary of 330" in teach(fails=True, k=331)
    assert "temperature must be above 0" in teach(fails=True, temperature=0)
    folder = teach()
    (folder / "ids.npy").write_bytes((folder / "ids.npy").read_bytes()[:-7])
    assert "ids.npy: cut short" in teach(fails=True)


@pytest.fixture
def eager(monkeypatch):
    """A tiny model of random weights never ends: let some of its tokens do so."""
    monkeypatch.setattr("rlhf.rollouts.local.end_ids", lambda *_: list(range(0, 330, 9)))


@pytest.mark.parametrize("data", ["sft.jsonl", "preferences.jsonl"])
def test_answers_are_rows_that_sft_trains_on(teach, eager, data, data_files, model_folder, tmp_path, monkeypatch):
    options = dict(k=0, max_new_tokens=24, dataset_name=data_files / data)
    folder = teach(**options)
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in (data_files / data).read_text().splitlines()]
    assert 20 < len(lines) <= 48 and all(line["prompt"] == prompts[line["row"]] for line in lines)
    assert all(line["completion"].strip() for line in lines)
    argv = [f"--model_name_or_path={model_folder}", f"--dataset_name={folder / 'completions.jsonl'}", "--max_steps=1"]
    argv += [f"--output_dir={tmp_path / 'run'}", "--report_to=none", "--use_cpu=true", "--disable_tqdm=true"]
    assert main(["sft", *argv]) == 0
    whole = files(folder)
    generate, calls = running.LocalEngine.generate, []

    def breaks(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return generate(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(running.LocalEngine, "generate", breaks)
        teach(name="again", **options)
    part = tmp_path / "again" / "completions.jsonl"
    part.write_bytes(part.read_bytes()[:-9])  # in the midst of a line
    assert files(teach(name="again", **options)) == whole
    with pytest.raises(ValueError, match="holds completions, not log-probs"):
        TeacherFile(folder)


def test_a_conversation_is_answered_as_one(teach, eager, tmp_path):
    turns = [{"role": "user", "content": "why is the cat blue"}]
    rows = [{"prompt": turns, "chosen": "yes", "rejected": "no"}] * 3
    folder = teach(k=0, max_new_tokens=24, dataset_name=write_rows(tmp_path / "chat.jsonl", rows))
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert lines and all(line["prompt"] == turns for line in lines)
    assert all(line["completion"][0]["role"] == "assistant" for line in lines)


@pytest.mark.parametrize("k", [0, 5])
def test_two_in_one_folder_are_refused(teach, tmp_path, k):
    """With --k 0 both wrote each row."""
    with run_lock(tmp_path / "kept"):
        assert "kept: another run writes into it" in teach(fails=True, k=k)
    assert not (tmp_path / "kept").exists()


def test_answers_that_two_runs_wrote_are_refused(tmp_path):
    for rows, said in (([0, 0, 1], "line 2: row 0 is there twice"), (["x"], "line 1: not an answer of a teacher")):
        path = write_rows(tmp_path / "completions.jsonl", [{"row": row} for row in rows])
        with pytest.raises(ValueError, match=said):
            running._completed(path)


def test_a_folder_whose_making_was_interrupted_is_made_again(teach, tmp_path, monkeypatch, tokenizer, data_files):
    whole = files(teach())
    create, seen = teacher_file.create_array, []

    def breaks(path, *args):
        if seen:
            raise OSError("disk full")
        seen.append(path.name)
        create(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_file, "create_array", breaks)
        assert "disk full" in teach(fails=True, name="again")
    again = tmp_path / "again"
    assert sorted(path.name for path in again.iterdir()) == ["ids.npy", "teacher.json"]
    with pytest.raises(ValueError, match="not all there yet: run the same"):
        open_teacher_file(again, tokenised(data_files / "sft.jsonl", tokenizer), tokenizer)
    assert files(teach(name="again")) == whole
    # Killed before the header had its name, which is the first thing that is written.
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "teacher.json.new").write_text("{")
    assert files(teach(name="early")) == whole
