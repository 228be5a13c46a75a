"""KTO: the numbers of TRL, rows and pairs, weights, and what is refused."""

import logging

import pytest
import torch
import torch.nn.functional as F
from conftest import close, sentences, tiny_model
from datasets import Dataset

from rlhf import KTOConfig, KTOTrainer
from rlhf.data import add_mismatched, tokenize_unpaired


@pytest.fixture
def kto(tmp_path, tokenizer):
    def make(rows, model=None, **changes):
        options = dict(
            max_steps=2, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no", optim="sgd", train_sampling_strategy="sequential",
        )  # fmt: skip
        ref_model = changes.pop("ref_model", None)
        eval_dataset = changes.pop("eval_dataset", None)
        return KTOTrainer(
            model or tiny_model(), ref_model, KTOConfig(str(tmp_path / "run"), **options | changes), train_dataset=rows,
            eval_dataset=eval_dataset, processing_class=tokenizer,
        )  # fmt: skip

    return make


def logs(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def trls_loss(policy, reference, rows, beta, desirable, undesirable):
    """What TRL's KTOTrainer computes for one batch, written from its formulas on padded rows of whole logits."""

    def sums(model, pairs):
        found = []
        for prompt, completion in pairs:
            ids = torch.tensor([prompt + completion])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            found.append(logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum())
        return torch.stack(found)

    prompts, completions = rows["prompt_ids"][:], [one for (one,) in rows["completions"][:]]
    rotated = [completions[-1], *completions[:-1]]
    label = torch.tensor(rows["desirable"][:])
    with torch.no_grad():
        kl = sums(policy, zip(prompts, rotated, strict=True)) - sums(reference, zip(prompts, rotated, strict=True))
        kl = kl.mean().clamp(min=0)
        ref = sums(reference, zip(prompts, completions, strict=True))
        ratio = sums(policy, zip(prompts, completions, strict=True)) - ref
    good, bad = 1 - F.sigmoid(beta * (ratio - kl)), 1 - F.sigmoid(beta * (kl - ratio))
    return torch.where(label, desirable * good, undesirable * bad).mean(), kl


@pytest.mark.parametrize("precompute", [False, True])
def test_one_batch_is_trls(kto, tokenizer, unpaired_rows, precompute):
    rows = unpaired_rows.select(range(8))
    options = dict(precompute_ref_log_probs=precompute, beta=0.3, desirable_weight=0.7, undesirable_weight=1.3)
    (entry, _) = logs(kto(rows, tiny_model(seed=1), ref_model=tiny_model(), **options))
    tokenized = tokenize_unpaired(rows, tokenizer, max_length=1024, vocab_size=330)
    want, kl = trls_loss(tiny_model(seed=1), tiny_model(), tokenized, 0.3, 0.7, 1.3)
    assert kl > 0.1
    close(entry["loss"], want)
    close(entry["kl"], kl)


def test_apo_zero_needs_no_kl(kto, unpaired_rows):
    trainer = kto(unpaired_rows, loss_type="apo_zero_unpaired")
    assert "mismatched" not in trainer.train_dataset.column_names
    entry, _ = logs(trainer)
    close(entry["loss"], 0.5)
    assert entry["kl"] == 0.0


def test_good_answers_rise_and_bad_ones_fall(kto, unpaired_rows):
    entry = logs(kto(unpaired_rows, max_steps=20, learning_rate=0.3, per_device_train_batch_size=24))[-1]
    assert entry["rewards/chosen"] > 0 > entry["rewards/rejected"]
    close(entry["rewards/margins"], entry["rewards/chosen"] - entry["rewards/rejected"])


def test_evaluation_does_not_depend_on_its_batches(kto, unpaired_rows):
    results = []
    for size in (5, 48):
        trainer = kto(
            unpaired_rows, tiny_model(seed=1), ref_model=tiny_model(), eval_dataset=unpaired_rows,
            per_device_eval_batch_size=size, precompute_ref_log_probs=False,
        )  # fmt: skip
        results.append({k: v for k, v in trainer.evaluate().items() if "runtime" not in k and "second" not in k})
    assert results[0]["eval_kl"] > 0
    for key, value in results[0].items():
        close(results[1][key], value)


def test_pairs_are_taken_apart(kto, preference_rows):
    trainer = kto(preference_rows, precompute_ref_log_probs=False)
    rows = trainer.train_dataset
    assert rows["desirable"][:] == [True, False] * len(preference_rows)
    assert rows["prompt_ids"][6] == rows["prompt_ids"][7]
    # An answer to the same prompt would not be mismatched.
    for row in (0, 1, 6, 7):
        other = (row - row % 2 - 1) % len(rows)
        assert rows["mismatched"][row] == rows["completions"][other]
        assert rows["prompt_ids"][row] != rows["prompt_ids"][other]
    assert len(logs(trainer)) == 2


def test_a_mismatched_answer_is_cut_like_the_own_one():
    rows = Dataset.from_dict({
        "prompt_ids": [[1] * 5, [2, 3]], "completions": [[[4]], [[5, 6, 7, 8]]], "labels": [[[4]], [[-100, 6, 7, 8]]],
    })  # fmt: skip
    found = add_mismatched(rows, max_length=7)
    assert found["mismatched"][:] == [[[5, 6]], [[4]]]
    assert found["mismatched_labels"][:] == [[[-100, 6]], [[4]]]


def test_a_stream_gets_the_mismatched_answers_that_rows_get(tokenizer, unpaired_rows):
    rows = tokenize_unpaired(unpaired_rows, tokenizer, max_length=64, vocab_size=330)
    stream = add_mismatched(rows.to_iterable_dataset(), 64)
    assert list(stream) == add_mismatched(rows, 64).to_list()


def test_weights_are_advised_for_unequal_labels(kto, caplog):
    texts = sentences(1, 10)
    rows = Dataset.from_list([{"prompt": t, "completion": " yes", "label": i < 8} for i, t in enumerate(texts)])
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        kto(rows)
    assert "8 good and 2 bad answers: pass --desirable_weight 0.25 (up to 0.33)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        kto(rows, desirable_weight=0.25)
    assert "good and" not in caplog.text


def test_the_reference_follows_the_policy(kto, unpaired_rows):
    trainer = kto(unpaired_rows, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25)
    start = [p.detach().clone() for p in trainer.ref_policy.parameters()]
    trainer.train()
    for ref, before, now in zip(trainer.ref_policy.parameters(), start, trainer.model.parameters(), strict=True):
        close(ref, 0.75 * before + 0.25 * now.detach())
