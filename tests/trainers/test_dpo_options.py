"""TRL's options of DPO: each acts as it does there, or is refused by name."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close, tiny_model
from datasets import Dataset
from peft import LoraConfig

from rlhf import DPOConfig, DPOTrainer

BETA = 0.3


@pytest.fixture
def dpo(tmp_path, tokenizer):
    def make(rows, ref_model=None, peft_config=None, eval_dataset=None, **changes):
        options = dict(
            max_steps=2, per_device_train_batch_size=len(rows), learning_rate=1e-2, logging_steps=1, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no", beta=BETA, precompute_ref_log_probs=False,
        )  # fmt: skip
        return DPOTrainer(
            tiny_model(seed=1), ref_model, DPOConfig(str(tmp_path / "run"), **options | changes), train_dataset=rows,
            eval_dataset=eval_dataset, processing_class=tokenizer, peft_config=peft_config,
        )  # fmt: skip

    return make


@pytest.fixture
def rows(preference_rows):
    return preference_rows.select(range(6))


def by_token(model, rows):
    """For each pair, chosen and rejected: log-probs of the answer's tokens, and of all tokens at its positions."""
    found = []
    for row in rows:
        pair = []
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            ids = torch.tensor([row["prompt_ids"] + answer])
            every = model(input_ids=ids).logits[0, :-1].log_softmax(-1)[len(row["prompt_ids"]) - 1 :]
            pair.append((every.gather(1, torch.tensor(answer)[:, None])[:, 0], every))
        found.append(pair)
    return found


@pytest.fixture
def first_loss(dpo, rows):
    """The loss of the first step, and both models' log-probs of the rows."""

    def run(**changes):
        trainer = dpo(rows, ref_model=tiny_model(), **changes)
        with torch.no_grad():
            policy, reference = (by_token(tiny_model(seed=s), trainer.train_dataset) for s in (1, 0))
        trainer.train()
        return trainer.state.log_history[0]["loss"], list(zip(policy, reference, strict=True))

    return run


def ratios(pairs):
    return [tuple(float((p[0] - r[0]).sum()) for p, r in zip(*pair, strict=True)) for pair in pairs]


@pytest.mark.parametrize("name", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_f_divergence_is_trls(first_loss, name):
    loss, pairs = first_loss(f_divergence_type=name, f_alpha_divergence_coef=0.7)
    scores = {
        "forward_kl": lambda s: 1 - math.exp(-s),
        "js_divergence": lambda s: math.log(2 * math.exp(s) / (1 + math.exp(s))),
        "alpha_divergence": lambda s: (math.exp((0.7 - 1) * s) - 1) / (0.7 - 1),
    }
    margins = torch.tensor([scores[name](w) - scores[name](v) for w, v in ratios(pairs)], dtype=torch.float64)
    close(loss, -F.logsigmoid(BETA * margins).mean())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_tdpo_has_the_gradient_of_its_formula(dpo, rows, accumulation):
    """KL(reference, policy) over all tokens of a sequence, from whole logits, and autograd."""
    size = dict(per_device_train_batch_size=6 // accumulation, gradient_accumulation_steps=accumulation)
    trainer = dpo(rows, ref_model=tiny_model(), loss_type="tdpo", max_steps=1, optim="sgd", learning_rate=1.0,
                  max_grad_norm=0.0, lr_scheduler_type="constant", loss_kwargs={"tdpo_alpha": 0.7}, **size)  # fmt: skip
    policy, reference = tiny_model(seed=1), tiny_model()
    losses = []
    for tokens, ref_tokens in zip(
        *(by_token(model, trainer.train_dataset) for model in (policy, reference)), strict=True
    ):
        (w, v), (k_w, k_v) = zip(*[
            ((logps - ref_logps.detach()).sum(), (every_ref.exp() * (every_ref - every)).sum().nan_to_num())
            for (logps, every), (ref_logps, every_ref) in zip(tokens, ref_tokens, strict=True)
        ], strict=True)  # fmt: skip
        losses.append(-F.logsigmoid(BETA * (w - v - 0.7 * (k_v - k_w.detach()))))
    loss = torch.stack(losses).mean()
    loss.backward()
    trainer.train()
    close(trainer.state.log_history[0]["loss"], loss.detach())
    for before, after in zip(policy.parameters(), trainer.model.parameters(), strict=True):
        want = before.detach() if before.grad is None else before.detach() - before.grad
        torch.testing.assert_close(after.detach(), want, rtol=1e-4, atol=2e-6)
    assert math.isfinite(trainer.evaluate(rows)["eval_loss"])


def test_tdpo_with_the_adapter_off_as_the_reference(dpo, rows):
    trainer = dpo(rows, loss_type="tdpo", peft_config=LoraConfig(task_type="CAUSAL_LM", r=4))
    trainer.train()
    first, second = (entry["loss"] for entry in trainer.state.log_history[:2])
    close(first, math.log(2))
    assert second < first


@pytest.mark.parametrize("precompute", [False, True])
def test_the_tail_of_the_longer_answer_counts_less(first_loss, precompute):
    loss, pairs = first_loss(ld_alpha=0.25, precompute_ref_log_probs=precompute)
    losses = []
    for policy, reference in pairs:
        shorter = min(len(policy[0][0]), len(policy[1][0]))
        gaps = [(p[0] - r[0]) for p, r in zip(policy, reference, strict=True)]
        w, v = (gap[:shorter].sum() + 0.25 * gap[shorter:].sum() for gap in gaps)
        losses.append(-F.logsigmoid(BETA * (w - v)))
    close(loss, torch.stack(losses).mean())


def test_pairs_weigh_as_much_as_they_are_likely(first_loss):
    loss, pairs = first_loss(use_weighting=True)
    losses = []
    for (w, v), (policy, _) in zip(ratios(pairs), pairs, strict=True):
        means = [(logps - every.exp().square().sum(-1).log()).mean() for logps, every in policy]
        losses.append(-F.logsigmoid(torch.tensor(BETA * (w - v))) * (means[0] + means[1]).exp())
    close(loss, torch.stack(losses).mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rpo_alpha=1.0), "rpo_alpha is not supported: pass loss_type sigmoid sft"),
        (dict(max_prompt_length=128), "max_prompt_length is not supported: max_length cuts answers"),
        (dict(reference_free=True), "reference_free is not supported: loss_type simpo"),
        (dict(f_divergence_type="tv"), "f_divergence_type must be one of reverse_kl"),
        (dict(f_divergence_type="forward_kl", loss_type="simpo"), "loss_type simpo has one of its own"),
        (dict(ld_alpha=2.0), r"ld_alpha must be in \[0, 1\], got 2.0"),
        (dict(use_weighting=True, loss_type="aot"), "loss_type aot sorts them"),
        (dict(precompute_ref_log_probs=True, loss_type="tdpo"), "loss_type tdpo reads predictions"),
        (dict(ld_alpha=0.5, loss_type="tdpo"), "loss_type tdpo takes neither ld_alpha"),
        (dict(sync_ref_model=True, precompute_ref_log_probs=True), "choose one"),
        (dict(truncation_mode="keep_end"), "truncation_mode 'keep_end'"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(str(tmp_path), **options)


def test_rows_are_evaluated_as_they_are(dpo, rows, preference_rows):
    """Without a copy of the reference too: under an adapter, and before the weights have moved."""
    others = preference_rows.select(range(6, 12))
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    for options in (dict(peft_config=adapter), {}):
        torch.manual_seed(0)
        want = dpo(rows, eval_dataset=others, **options).evaluate()
        torch.manual_seed(0)
        trainer = dpo(rows, precompute_ref_log_probs=True, **options)
        close(trainer.evaluate(others)["eval_loss"], want["eval_loss"])
        several = trainer.evaluate({"one": others, "two": others})
        close(several["eval_two_loss"], want["eval_loss"])
    trainer.train()
    with pytest.raises(ValueError, match="the reference is not in memory any more"):
        trainer.evaluate(others)
    # A reference that was given is asked again.
    given = dict(ref_model=tiny_model(), precompute_ref_log_probs=True)
    one, two = (dpo(rows, eval_dataset=extra, **given) for extra in (others, None))
    close(two.evaluate(others)["eval_loss"], one.evaluate()["eval_loss"])
    assert two.ref_model is not None


def test_references_that_cannot_be(dpo, rows, tmp_path, tokenizer):
    model, stream = tiny_model(), rows.to_iterable_dataset()
    args = DPOConfig(str(tmp_path), use_cpu=True, report_to="none", precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="ref_model is the model that is trained"):
        DPOTrainer(model, model, args, train_dataset=rows, processing_class=tokenizer)
    for datasets in (dict(train_dataset=stream), dict(train_dataset=rows, eval_dataset={"a": stream})):
        with pytest.raises(ValueError, match="precompute_ref_log_probs is not supported with IterableDataset"):
            DPOTrainer(model, args=args, processing_class=tokenizer, **datasets)


def test_a_transform_is_named(dpo):
    texts = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)
    with pytest.raises(ValueError, match=r"with_transform\(\), which acts when they are read"):
        dpo(texts.with_transform(lambda block: block))


def test_a_moving_reference_survives_an_interruption(dpo, rows, tmp_path):
    options = dict(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5)
    whole = dpo(rows, max_steps=3, **options)
    whole.train()
    dpo(rows, max_steps=3, save_strategy="steps", save_steps=2, **options).train()
    again = dpo(rows, max_steps=3, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    close(again.state.log_history[-2]["loss"], whole.state.log_history[-2]["loss"])
    for one, other in zip(whole.ref_model.parameters(), again.ref_model.parameters(), strict=True):
        close(other, one)
