"""The reference's log-probs, computed once and kept: the same run, fewer forward passes, nothing stale."""

import datasets
import numpy as np
import pytest
import torch
from conftest import close, tiny_model
from peft import LoraConfig

from rlhf import DPOConfig, DPOTrainer
from rlhf.models import Policy
from rlhf.trainers.reference_logps import reference_fingerprint


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder that the files go to, empty."""
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "cache")
    return tmp_path / "cache" / "rlhf" / "ref_logps"


@pytest.fixture
def dpo(tmp_path, tokenizer, preference_rows):
    def make(model=None, rows=preference_rows, ref_model=None, peft_config=None, eval_dataset=None, **changes):
        options = dict(
            max_steps=4, per_device_train_batch_size=24, learning_rate=1e-3, logging_steps=1, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no", precompute_ref_log_probs=True,
        )  # fmt: skip
        return DPOTrainer(
            model=model or tiny_model(), ref_model=ref_model, train_dataset=rows,
            args=DPOConfig(str(tmp_path / "run"), **options | changes),
            eval_dataset=eval_dataset, processing_class=tokenizer, peft_config=peft_config,
        )  # fmt: skip

    return make


@pytest.fixture
def forwards(monkeypatch):
    """The number of sequences in each forward pass, as they happen."""
    seen, forward = [], Policy.forward

    def count(self, batch, *args, **kwargs):
        seen.append(batch.targets.num_sequences)
        return forward(self, batch, *args, **kwargs)

    monkeypatch.setattr(Policy, "forward", count)
    return seen


def lora():
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("planned", [None, 60])
def test_the_run_is_the_one_with_the_reference_in_memory(dpo, peft, planned):
    runs = []
    for cached in (False, True):
        torch.manual_seed(0)
        trainer = dpo(
            peft_config=lora() if peft else None, precompute_ref_log_probs=cached, tokens_per_batch=planned,
            gradient_accumulation_steps=3 if planned else 1,
        )  # fmt: skip
        trainer.train()
        weights = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
        runs.append(([e for e in trainer.state.log_history if "loss" in e], weights))
    (live, live_weights), (cached, cached_weights) = runs
    for entry, other in zip(live, cached, strict=True):
        for key in entry:
            close(other[key], entry[key])
    for weight, other in zip(live_weights, cached_weights, strict=True):
        close(other, weight)


def test_no_copy_of_the_weights_and_no_further_forward(dpo, forwards):
    trainer = dpo(precompute_ref_batch_size=10)
    assert trainer.ref_policy is None
    assert forwards == [20] * 4 + [16]
    del forwards[:]
    trainer.train()
    assert forwards == [48] * 4


def test_the_next_run_reads_the_file(dpo, forwards, cache):
    dpo()
    del forwards[:]
    dpo()
    dpo(peft_config=lora())  # its reference is the same model
    assert not forwards
    assert len(list(cache.iterdir())) == 1


def test_what_determines_them_is_in_the_key(dpo, forwards, cache, preference_rows):
    dpo()
    dpo(model=tiny_model(seed=1))
    dpo(rows=preference_rows.select(range(40)))
    dpo(rows=preference_rows.map(lambda row: {"chosen": row["rejected"], "rejected": row["chosen"]}))
    dpo(max_length=12)
    dpo(ref_model=tiny_model(seed=2))
    assert len(list(cache.iterdir())) == 6
    fingerprints = {
        reference_fingerprint(tiny_model(), "no"),
        reference_fingerprint(tiny_model(), "bf16"),
        reference_fingerprint(tiny_model().bfloat16(), "no"),
        reference_fingerprint(tiny_model(rms_norm_eps=1e-3), "no"),
    }
    assert len(fingerprints) == 4


def test_an_interrupted_pass_goes_on(dpo, monkeypatch, forwards):
    forward = Policy.forward

    def breaks(self, batch):
        if len(forwards) == 2:
            raise KeyboardInterrupt
        return forward(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Policy, "forward", breaks)
        dpo(precompute_ref_batch_size=8)
    assert forwards == [16, 16]
    trainer = dpo(precompute_ref_batch_size=8)
    assert forwards == [16] * 6
    want = dpo(precompute_ref_log_probs=False)
    batch = want.data_collator(list(want.train_dataset))
    close(
        trainer.data_collator(list(trainer.train_dataset)).per_sequence["ref_logps"], want.ref_sums(want.model, batch)
    )


def test_a_broken_file_is_computed_again_aloud(dpo, cache, caplog):
    dpo()
    (file,) = cache.iterdir()
    want = np.load(file)
    for broken in (file.read_bytes()[:100], b"", b"no numpy file at all"):
        file.write_bytes(broken)
        dpo()
        assert "computing it again" in caplog.text
        np.testing.assert_array_equal(np.load(file), want)
        caplog.clear()


@pytest.mark.parametrize("damage", [0.0, 5.0, -np.inf])
def test_what_is_no_log_prob_is_computed_again(dpo, cache, caplog, damage):
    dpo()
    (file,) = cache.iterdir()
    want = np.load(file)
    damaged = want.copy()
    damaged[3, 1] = damaged[10] = damage  # zeros are what an interrupted start of older versions left
    np.save(file, damaged)
    (cache / "of-a-killed-run.npy.new").touch()
    trainer = dpo()
    assert "2 rows hold what is no log-prob; computing them again" in caplog.text
    # Batched otherwise than at first, so that the last digits may differ.
    close(np.load(file), want)
    close(trainer.train_dataset["ref_rejected_logps"], want[:, 1])
    assert list(cache.iterdir()) == [file]


def test_evaluation_too(dpo, forwards, preference_rows):
    rows = preference_rows.select(range(10))
    both = [
        dpo(eval_dataset=rows, ref_model=tiny_model(seed=3), precompute_ref_log_probs=cached).evaluate()
        for cached in (False, True)
    ]
    for key in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        close(both[1][key], both[0][key])


def test_by_default_where_rows_are_read_again(dpo):
    default = dict(precompute_ref_log_probs=None)
    assert dpo(**default, max_steps=2).ref_policy is not None
    assert dpo(**default, max_steps=3).ref_policy is None
    assert dpo(**default, max_steps=-1, num_train_epochs=1).ref_policy is not None
    assert dpo(**default, max_steps=-1, num_train_epochs=2).ref_policy is None


def test_a_broken_reference_is_named(dpo, tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer(" green")["input_ids"][0]] = torch.nan
    with pytest.raises(ValueError, match=r"training rows, row .*NaN"):
        dpo(model=model)


def test_rows_without_them_are_refused(dpo):
    trainer = dpo()
    trainer.train_dataset = trainer.train_dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    with pytest.raises(ValueError, match="precompute_ref_log_probs false"):
        trainer.train()
