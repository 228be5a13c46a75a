"""What a teacher said, on disk: what was written is read, and nothing is taken for something else."""

import json
import pickle

import numpy as np
import pytest
import torch
from conftest import close
from datasets import Dataset, concatenate_datasets

from rlhf.data import Collator, tokenize_sft
from rlhf.distillation import TeacherFile, create_teacher_file, open_teacher_file
from rlhf.distillation.teacher_file import data_key, scored_tokens, tokenizer_key
from rlhf.logprobs import TopK

K, V = 4, 330


@pytest.fixture
def rows(sft_rows, tokenizer):
    return tokenize_sft(sft_rows, tokenizer, max_length=64, vocab_size=V)


@pytest.fixture
def key(tokenizer):
    return {"teacher": "t", **tokenizer_key(tokenizer), "k": K, "temperature": 1.0, "vocabulary": V}


def said(rows, seed=0, vocabulary=V):
    """Of each row, something that a teacher might have said."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for n in scored_tokens(rows).tolist():
        dense = torch.randn(n, vocabulary, generator=g).mul(3).log_softmax(-1)
        top = dense.topk(K)
        rest = dense.scatter(1, top.indices, -torch.inf).logsumexp(-1)
        found.append(TopK(top.indices, top.values, rest))
    return found


@pytest.fixture
def written(tmp_path, rows, key):
    file = create_teacher_file(tmp_path / "t", rows, key)
    for row, kept in enumerate(said(rows)):
        file.write([row], kept)
    return tmp_path / "t"


def test_scored_tokens_are_those_of_the_targets():
    rows = Dataset.from_dict({
        "input_ids": [[1, 2, 3], [4], [5, 6], [7, 8, 9, 1]],
        "labels": [[1, -100, 3], [4], [-100, -100], [-100, 8, 9, 1]],
    })  # fmt: skip
    assert scored_tokens(rows).tolist() == [1, 0, 0, 3]
    assert scored_tokens(rows.select([3, 0])).tolist() == [3, 1]
    for layout in ("rows", "segments"):
        counts = Collator(layout=layout)(list(rows)).targets.counts()
        assert counts.tolist() == scored_tokens(rows).tolist()


@pytest.mark.parametrize("layout", ["rows", "segments"])
def test_a_batch_holds_what_was_said_of_its_targets(layout, written, rows, tokenizer):
    marked, file = open_teacher_file(written, rows, tokenizer)
    want = said(rows)
    collate = Collator(layout=layout, extras={"teacher": file.of_examples})
    for chosen in ([0], [5, 2, 40], list(range(48))):
        batch = collate([marked[row] for row in chosen]).to("cpu")
        teacher = batch.extras["teacher"]
        assert len(teacher.ids) == len(batch.targets)
        assert torch.equal(teacher.ids, torch.cat([want[row].ids for row in chosen]))
        for got, name in ((teacher.logps, "logps"), (teacher.rest, "rest")):
            exact = torch.cat([getattr(want[row], name) for row in chosen])
            assert ((got - exact).abs() <= exact.abs() / 1000 + 1e-4).all()
        close(teacher.logps.exp().sum(1) + teacher.rest.exp(), torch.ones(len(batch.targets)))
    packed = collate([{"examples": [marked[3], marked[1]]}])
    assert torch.equal(packed.extras["teacher"].ids, torch.cat([want[3].ids, want[1].ids]))
    assert "teacher" not in collate([rows[0]]).extras  # rows of another data set, in evaluation


def test_small_where_the_vocabulary_is(written, tmp_path, rows, key):
    tokens = int(scored_tokens(rows).sum())
    sizes = {path.name: path.stat().st_size - 128 for path in written.iterdir()}
    assert sizes["ids.npy"] == tokens * K * 2 and sizes["logps.npy"] == tokens * (K + 1) * 2
    wide = create_teacher_file(tmp_path / "wide", rows, {**key, "vocabulary": 70_000})
    assert wide.ids.dtype == np.uint32
    for row, kept in enumerate(said(rows, vocabulary=70_000)):
        wide.write([row], kept)
    assert torch.equal(wide.take([7, 1]).ids, torch.cat([said(rows, vocabulary=70_000)[row].ids for row in (7, 1)]))


def test_samples_of_an_older_folder_are_not_read(written, rows, tokenizer, caplog):
    header = json.loads((written / "teacher.json").read_text())
    (written / "teacher.json").write_text(json.dumps({**header, "samples": 8, "seed": 0}))
    open_teacher_file(written, rows, tokenizer)
    assert "samples.npy is no longer read: delete it" in caplog.text


def test_a_worker_opens_it_again(written):
    file = TeacherFile(written)
    again = pickle.loads(pickle.dumps(file))
    assert len(pickle.dumps(file)) < 500 and torch.equal(again.take([3]).ids, file.take([3]).ids)


def test_the_same_tokens_however_they_lie_in_memory(rows):
    parts = concatenate_datasets([rows.select(range(10)), rows.select(range(10, 48))])
    shuffled = rows.shuffle(seed=0)
    assert data_key(parts) == data_key(rows) != data_key(shuffled)


def changed(tokenizer, **attributes):
    other = pickle.loads(pickle.dumps(tokenizer))
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


def test_what_it_is_not_of_is_refused_by_name(written, rows, tokenizer):
    other_rows = rows.select(range(40))
    cut = rows.map(lambda row: {name: row[name][:6] for name in ("input_ids", "labels")})
    for message, data, speaker in (
        ("the rows are others, or were tokenised otherwise .*; rows is 48, not 40; tokens is", other_rows, tokenizer),
        ("the rows are others", cut, tokenizer),
        ("something else: the chat template is another; run", rows, changed(tokenizer, chat_template="{{ messages }}")),
        ("something else: the tokenizer is another; run", rows, changed(tokenizer, eos_token="<|im_start|>")),
    ):
        with pytest.raises(ValueError, match=message):
            open_teacher_file(written, data, speaker)
    with pytest.raises(FileNotFoundError, match=r"holds no teacher\.json; write it with `rlhf teacher`"):
        open_teacher_file(written / "nowhere", rows, tokenizer)
    used = changed(tokenizer)
    used("a call that pads and cuts", padding="max_length", max_length=3, truncation=True)
    open_teacher_file(written, rows, used)  # its settings of the last call are no part of the key


def test_what_is_not_whole_is_refused(tmp_path, rows, key, tokenizer, written):
    file = create_teacher_file(tmp_path / "part", rows, key)
    file.write([1, 0], TopK(*(torch.cat(pair) for pair in zip(said(rows)[1], said(rows)[0], strict=True))))
    assert file.missing().tolist() == list(range(2, 48))
    with pytest.raises(ValueError, match="not finished, 46 of 48 rows are missing: run the same `rlhf teacher` again"):
        open_teacher_file(tmp_path / "part", rows, tokenizer)
    whole = (written / "logps.npy").read_bytes()
    for broken in (whole[:-100], whole[:50], b""):
        (written / "logps.npy").write_bytes(broken)
        with pytest.raises(ValueError, match=rf"logps.npy: cut short, {len(broken)} bytes of more than \d+"):
            open_teacher_file(written, rows, tokenizer)
    (written / "logps.npy").unlink()
    with pytest.raises(ValueError, match=r"logps.npy: missing; write the folder again"):
        open_teacher_file(written, rows, tokenizer)
    np.save(written / "logps.npy", np.zeros((5, K + 1), np.float16))
    with pytest.raises(ValueError, match="it is of another folder"):
        open_teacher_file(written, rows, tokenizer)
    header = json.loads((written / "teacher.json").read_text())
    (written / "teacher.json").write_text(json.dumps({**header, "format": 0}))
    with pytest.raises(ValueError, match="format 0, this version reads 1"):
        open_teacher_file(written, rows, tokenizer)
    for text in ("{", "[" * 3000):
        (written / "teacher.json").write_text(text)
        with pytest.raises(ValueError, match="not valid JSON"):
            open_teacher_file(written, rows, tokenizer)


@pytest.mark.parametrize("logp", [float("nan"), 5.0, float("-inf")])
def test_numbers_that_are_no_log_probs_are_named(logp, written, rows, tokenizer):
    file = TeacherFile(written, writable=True)
    want = rf"row 3, scored token 1: a log-prob is {logp}, expected at most 0; "
    spoilt = said(rows)[3]
    spoilt.logps[1, 2] = logp
    with pytest.raises(ValueError, match=want + "check the teacher's weights"):
        file.write([3], spoilt)
    assert (file.logps[file.offsets[3] : file.offsets[4]] <= 0).all()  # nothing of it is stored
    file.logps[file.offsets[3] + 1, 2] = logp  # of another program, or a damaged disk
    with pytest.raises(ValueError, match=want + r"write the folder again \(rlhf teacher --overwrite\)"):
        file.take([5, 3])
    file.take([2, 4])


@pytest.mark.parametrize(
    ("name", "value"), [("vocabulary", [1]), ("rows", -1), ("rows", "x" * 5000), ("tokens", None), ("dtype", "V9")]
)
def test_a_header_of_odd_values_is_refused(name, value, written):
    header = json.loads((written / "teacher.json").read_text())
    (written / "teacher.json").write_text(json.dumps({**header, name: value}))
    with pytest.raises(ValueError, match=f"teacher.json: {name} is ") as error:
        TeacherFile(written)
    assert len(str(error.value)) < 300
    (written / "teacher.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got a list"):
        TeacherFile(written)


def test_damaged_arrays_are_named(written):
    offsets = np.load(written / "offsets.npy")
    np.save(written / "offsets.npy", np.where(np.arange(len(offsets)) == 3, 2**40, offsets))
    with pytest.raises(ValueError, match=r"offsets.npy: damaged"):
        TeacherFile(written)
    np.save(written / "offsets.npy", offsets)
    ids = np.load(written / "ids.npy")
    np.save(written / "ids.npy", np.full_like(ids, V))
    with pytest.raises(ValueError, match=f"token {V} is outside the teacher's vocabulary of {V}: damaged"):
        TeacherFile(written).take([0])
