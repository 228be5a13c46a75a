"""No file of a checkpoint, a model, a teacher or a cache runs code: it is refused in one line, or not read at all."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from rlhf.data import load_data
from rlhf.distillation.teacher_file import TeacherFile, create_teacher_file
from rlhf.models import load_model, load_reward_model, load_tokenizer
from rlhf.trainers import SFTConfig, SFTTrainer
from rlhf.trainers.checkpoint_files import MARK, write_mark
from rlhf.trainers.reference_logps import _open

# All that transformers and this package write beside weights and JSON.
IN_A_CHECKPOINT = {
    "optimizer.pt": "_load_optimizer_and_scheduler",
    "scheduler.pt": "_load_optimizer_and_scheduler",
    "rng_state.pth": "_load_rng_state",
    "scaler.pt": "_load_scaler",
}


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return open, (str(self.proof), "w")


@pytest.fixture
def hostile(tmp_path):
    """Write a file that runs code where it is unpickled, as torch writes files and as Python does."""
    proof = tmp_path / "code has run"

    def write(path, way="torch"):
        content = {"state": Hostile(proof)}
        if way == "torch":
            torch.save(content, path)
        elif way == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            np.save(path, np.array([Hostile(proof)]), allow_pickle=True)

    yield write
    assert not proof.exists()


def test_such_a_file_does_run_code(tmp_path, hostile):
    hostile(tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)["state"].close()
    (tmp_path / "code has run").unlink()


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A trainer, and a checkpoint of it."""
    rows = Dataset.from_list([{"prompt": "the cat", "completion": " sat"}] * 4)
    folder = tmp_path_factory.mktemp("run")
    args = SFTConfig(str(folder), max_steps=2, save_steps=1, use_cpu=True, disable_tqdm=True, save_total_limit=2)
    trainer = SFTTrainer(tiny_model(), args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    return trainer, folder / "checkpoint-1"


@pytest.mark.parametrize("way", ["torch", "pickle"])
@pytest.mark.parametrize("name", IN_A_CHECKPOINT)
def test_a_file_of_a_checkpoint(name, way, run, hostile, tmp_path):
    trainer, checkpoint = run
    shutil.copytree(checkpoint, tmp_path / "copy")
    hostile(tmp_path / "copy" / name, way)
    with pytest.raises(ValueError, match=f"{name}.* is damaged, or holds objects that could run code"):
        getattr(trainer, IN_A_CHECKPOINT[name])(str(tmp_path / "copy"))


@pytest.mark.parametrize("suffix", [".json", ".safetensors", ".pt"])
def test_the_state_of_a_trainer(suffix, run, hostile, tmp_path):
    trainer, checkpoint = run
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    hostile(folder / f"trainer_state_0{suffix}")
    if suffix == ".pt":  # of an older version
        (folder / "trainer_state_0.json").unlink()
    with pytest.raises(ValueError, match=r"damaged, or no state of a trainer|in a format that can run code"):
        trainer._load_optimizer_and_scheduler(str(folder))


def test_what_a_checkpoint_should_not_hold_is_not_read(run, hostile, tmp_path):
    trainer, checkpoint = run
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    for name in ("training_args.bin", "pytorch_model.bin", "adapter_model.bin", "optimizer.bin", "value_head.bin"):
        hostile(folder / name)
    # With a mark that fits: whoever writes the files writes that too.
    (folder / MARK).unlink(missing_ok=True)
    write_mark(folder, step=1)
    assert trainer.train(resume_from_checkpoint=str(folder)).global_step == 2


# Models and tokenizers


def with_code(folder, hostile):
    (folder / "evil.py").write_text("open('code has run', 'w')\nclass Evil: pass\n")
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    ):
        content = json.loads((folder / name).read_text())
        unknown = {"model_type": "evil", "architectures": ["Evil"], "tokenizer_class": "Evil"}
        (folder / name).write_text(json.dumps(content | unknown | {"auto_map": classes}))


def with_pickled_weights(folder, hostile, way="torch"):
    (folder / "model.safetensors").unlink()
    hostile(folder / "pytorch_model.bin", way)


def with_pickled_adapter(folder, hostile):
    base = shutil.copytree(folder, folder.with_name("base"))
    get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)
    for name in ("model.safetensors", "adapter_model.safetensors", "config.json"):
        (folder / name).unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    hostile(folder / "adapter_model.bin")


MODELS = {
    "code": (with_code, "cannot be loaded as"),
    "torch": (with_pickled_weights, "objects that could run code; use safetensors"),
    "pickle": (lambda *given: with_pickled_weights(*given, "pickle"), "objects that could run code; use safetensors"),
    "adapter": (with_pickled_adapter, "objects that could run code; use safetensors"),
}


@pytest.mark.parametrize("load", [load_model, load_reward_model])
@pytest.mark.parametrize("case", MODELS)
def test_a_model_folder(case, load, model_folder, tmp_path, hostile, monkeypatch):
    damage, said = MODELS[case]
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(model_folder, tmp_path / "model")
    damage(folder, hostile)
    with pytest.raises(ValueError, match=f"^{tmp_path}.*{said}"):
        load(str(folder), trust_remote_code=False)


def test_a_tokenizer_with_code(model_folder, tmp_path, hostile, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(model_folder, tmp_path / "model")
    with_code(folder, hostile)
    for name in ("tokenizer.pkl", "vocab.pkl", "tokenizer.model"):
        hostile(folder / name, "pickle")
    with pytest.raises(ValueError, match=f"^{folder}"):
        load_tokenizer(str(folder), trust_remote_code=False)


# Arrays of a teacher and of the cache, and rows


@pytest.mark.parametrize("name", ["ids", "logps", "offsets", "done"])
@pytest.mark.parametrize("way", ["numpy", "pickle"])
def test_an_array_of_a_teacher(name, way, tmp_path, hostile):
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]})
    key = {"k": 2, "vocabulary": 9, "dtype": "float32", "temperature": 1.0}
    folder = tmp_path / "teacher"
    create_teacher_file(folder, rows, key)
    hostile(folder / f"{name}.npy", way)
    with pytest.raises(ValueError, match=f"{name}.npy: cut short"):
        TeacherFile(folder)


@pytest.mark.parametrize("way", ["numpy", "pickle"])
def test_an_array_of_the_cache_is_computed_again(way, tmp_path, hostile):
    folder = tmp_path / "ref_logps"
    folder.mkdir()
    hostile(folder / "sums.npy", way)
    assert np.isnan(_open(folder / "sums.npy", (3, 2))).all()


def test_a_folder_of_rows_with_code(tmp_path, hostile, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "a"}')
    (folder / "rows.py").write_text("open('code has run', 'w')")
    hostile(folder / "dataset.pkl")
    with pytest.raises(ValueError, match=f"{folder}: Dataset scripts are no longer supported"):
        load_data(str(folder))
