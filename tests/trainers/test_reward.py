"""What the reward trainer promises: its first figures, TRL's figures, margins, checkpoints, learning."""

import copy
import math

import pytest
import torch
from conftest import close, sentences, tiny_model
from datasets import Dataset
from peft import LoraConfig, PeftModel
from sklearn.calibration import calibration_curve
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf import RewardConfig, RewardTrainer
from rlhf.models import RewardModel, add_scalar_head, load_reward_model


def reward_model(name="llama"):
    """With a head that is not zero."""
    model = add_scalar_head(tiny_model(name))
    torch.nn.init.normal_(model.score.weight, std=0.3)
    return model


def lora():
    return LoraConfig(task_type="SEQ_CLS", r=4)


@pytest.fixture
def reward(tmp_path, tokenizer, preference_rows):
    def make(model=None, peft_config=None, rows=preference_rows, eval_rows=None, tokenizer=tokenizer, **changes):
        options = dict(max_steps=3, logging_steps=1, learning_rate=1e-3, report_to="none", save_strategy="no") | changes
        return RewardTrainer(
            model=reward_model() if model is None else model,
            args=RewardConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, **options),
            train_dataset=rows,
            eval_dataset=rows.select(range(min(13, len(rows)))) if eval_rows is None else eval_rows,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def rewards_of(model, rows):
    """[rows, 2], a sequence at a time, by transformers' own parts."""
    model = model.eval()
    rewards = []
    with torch.no_grad():
        for row in rows:
            for key in ("chosen_ids", "rejected_ids"):
                hidden = model.base_model(torch.tensor([row["prompt_ids"] + row[key]]))[0]
                rewards.append(float(hidden[0, -1].double() @ model.score.weight[0].double()))
    return torch.tensor(rewards, dtype=torch.float64).view(-1, 2)


@pytest.mark.parametrize("peft", [False, True])
def test_a_new_head_starts_at_log_2(reward, peft, model_folder):
    for model in (tiny_model(), str(model_folder), load_reward_model(str(model_folder))):
        trainer = reward(model, peft_config=lora() if peft else None)
        trainer.train()
        assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
        assert logged(trainer, "accuracy")[0] == 0.5
        assert logged(trainer)[-1] != logged(trainer)[0]


def test_evaluation_in_full(reward):
    """Every figure, from the rewards of single sequences in double precision; over the data set, for any batch."""
    rewards = rewards_of(reward_model(), reward().eval_dataset)
    (c, r), m = rewards.T, rewards[:, 0] - rewards[:, 1]
    p = torch.cat([m, -m]).sigmoid().numpy()
    labels = torch.tensor([1, 0]).repeat_interleave(len(m)).numpy()
    share, confidence = calibration_curve(labels, p, n_bins=20)
    held = torch.histc(torch.tensor(p), 20, 0, 1)
    want = {
        "loss": float(torch.log1p(torch.exp(-m)).mean() + 0.3 * ((c + r) ** 2).mean()),
        "accuracy": float((m > 0).double().mean()),
        "margin": float(m.mean()),
        "mean_reward": float(rewards.mean()),
        "std_reward": float(rewards.std(correction=0)),
        "rewards/chosen": float(c.mean()),
        "rewards/rejected": float(r.mean()),
        "brier_score": float(((1 - m.sigmoid()) ** 2).mean()),
        "calibration_error": float((held[held > 0] / held.sum() * abs(torch.tensor(share - confidence))).sum()),
    }
    assert 0 < want["accuracy"] < 1 and want["calibration_error"] > 0.01
    for size in (1, 4, 13):
        for layout in ("rows", "segments"):
            trainer = reward(per_device_eval_batch_size=size, layout=layout, center_rewards_coefficient=0.3)
            metrics = trainer.evaluate()
            metrics.pop("epoch", None)
            assert {k for k in metrics if "per_second" not in k and "time" not in k} == {f"eval_{k}" for k in want}
            close([metrics[f"eval_{key}"] for key in want], list(want.values()))


@pytest.mark.parametrize("tokens_per_batch", [None, 200])
def test_a_margin_is_asked_of_its_pair(reward, preference_rows, tokens_per_batch):
    margins = [float(i) for i in torch.randint(0, 4, (48,), generator=torch.Generator().manual_seed(0))]
    rows = preference_rows.add_column("margin", margins)
    (c, r), m = rewards_of(reward_model(), reward(rows=rows).eval_dataset).T, torch.tensor(margins[:13]).double()
    want = torch.log1p(torch.exp(r - c + m)).mean()
    trainer = reward(rows=rows, tokens_per_batch=tokens_per_batch, per_device_train_batch_size=48, max_steps=1)
    close(trainer.evaluate()["eval_loss"], want)
    if tokens_per_batch:  # planned batches carry theirs too
        (c, r), m = rewards_of(reward_model(), trainer.train_dataset.rows).T, torch.tensor(margins).double()
        losses = torch.log1p(torch.exp(r - c + m))
        for bin, item in zip(trainer.train_dataset.bins, trainer.train_dataset, strict=True):
            batch = trainer.data_collator([item])
            close(trainer.measure(trainer.model.eval(), batch).loss.detach(), losses[bin])
    trainer.train()
    plain = reward(per_device_train_batch_size=48, max_steps=1)
    plain.train()
    assert logged(trainer)[0] > logged(plain)[0] + 0.1


def score(model, tokenizer, text):
    """As a user of transformers would."""
    with torch.no_grad():
        return model.eval()(**tokenizer(text, padding=True, return_tensors="pt", return_token_type_ids=False)).logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("peft", [False, True])
def test_transformers_gives_the_saved_model_the_same_score(reward, name, peft, tmp_path, tokenizer, model_folder):
    """Singly and padded, though the tokenizer came with EOS as its pad and every answer ends with EOS."""
    base = tmp_path / "base"
    reward_model(name).save_pretrained(base)
    tokenizer.save_pretrained(base)  # that pads on the left, as those of chat models do: absolute positions go wrong
    left = AutoTokenizer.from_pretrained(base, padding_side="left")
    trainer = reward(str(base), peft_config=lora() if peft else None, tokenizer=left)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    own = RewardModel(trainer.model.model)
    prompts, answers = ["the cat", "a", "why the tree"], [" is big", " no", " river hello green says how"]
    want = own.rewards(tokenizer, prompts, answers)
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.pad_token_id != saved.eos_token_id == tokenizer.pad_token_id
    ids = {"pad_token_id": saved.pad_token_id} if peft else {}  # the config is the base model's
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=1, **ids)
    texts = [p + a + saved.eos_token for p, a in zip(prompts, answers, strict=True)]
    close(score(model, saved, texts).squeeze(1), want)
    for text, reward_of in zip(texts, want, strict=True):
        close(score(model, saved, text), [[reward_of]])
    close(load_reward_model(str(tmp_path / "saved")).rewards(tokenizer, prompts, answers), want)
    if peft:
        assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
        loaded = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, **ids)
        close(score(PeftModel.from_pretrained(loaded, tmp_path / "saved"), saved, texts).squeeze(1), want)


def test_without_a_spare_token_transformers_scores_one_at_a_time(reward, tmp_path, tokenizer, caplog):
    """Special tokens that all end answers: then no pad is named, and a batch is refused rather than scored wrongly."""
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 0], "rejected_ids": [8, 9, 1]}] * 4
    trainer = reward(rows=Dataset.from_list(rows), max_steps=1, eval_rows=Dataset.from_list(rows))
    assert "no special token of the tokenizer is free to pad with" in caplog.text
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=1)
    (want, _), *_ = rewards_of(trainer.model.model, rows)
    close(model(torch.tensor([[5, 6, 7, 0]])).logits.detach(), [[want]])
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1"):
        model(torch.tensor([[5, 6, 7, 0]] * 2))


def test_the_callers_tokenizer_is_left_alone(reward, tokenizer):
    trainer = reward()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id != trainer.processing_class.pad_token_id
    assert trainer.processing_class.padding_side == "right"


def test_an_adapter_brings_the_head_along_whatever_its_task(reward):
    trainer = reward(peft_config=LoraConfig(task_type="CAUSAL_LM", r=4))
    start = reward_model().state_dict()
    trainer.train()
    trained = {name for name, p in trainer.model.model.named_parameters() if p.requires_grad}
    assert any("score.modules_to_save" in name for name in trained)
    assert all("lora_" in name or "score.modules_to_save" in name for name in trained)
    assert not torch.equal(trainer.model.without_adapter.score.weight, start["score.weight"])


@pytest.mark.parametrize("peft", [False, True])
def test_it_learns_which_word_is_wanted(reward, peft):
    """Chosen answers say "green", rejected ones do not; then on pairs that it has not seen."""

    def pairs(seed, count):
        prompts, words = sentences(seed, count), sentences(seed + 1, 2 * count, 2, 5)
        words = [text.replace("green", "blue").split() for text in words]
        for index, text in enumerate(words[:count]):
            text[index % len(text)] = "green"
        said = [" " + " ".join(text) for text in words]
        trios = zip(prompts, said[:count], said[count:], strict=True)
        return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in trios])

    trainer = reward(
        tiny_model(), rows=pairs(10, 400), eval_rows=pairs(20, 100), max_steps=100, learning_rate=5e-3,
        per_device_train_batch_size=16, peft_config=lora() if peft else None, center_rewards_coefficient=0.01,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_accuracy"] == 0.5 and before["eval_brier_score"] == 0.25
    assert after["eval_accuracy"] > 0.9 and after["eval_brier_score"] < 0.1
    assert after["eval_calibration_error"] < 0.1


def test_centring_draws_rewards_to_zero(reward):
    free, centred = (reward(center_rewards_coefficient=c, max_steps=30, learning_rate=5e-3) for c in (None, 1.0))
    for trainer in (free, centred):
        torch.nn.init.constant_(trainer.model.model.score.weight, 0.3)
        trainer.train()
    assert abs(centred.evaluate()["eval_mean_reward"]) < abs(free.evaluate()["eval_mean_reward"]) / 2


@pytest.mark.parametrize("extra", [{}, {"center_rewards_coefficient": 0.05}, {"margin": True}])
def test_it_follows_trls_run(reward, tmp_path, tokenizer, preference_rows, extra):
    trl = pytest.importorskip("trl")
    extra = dict(extra)
    rows = preference_rows
    if extra.pop("margin", False):
        rows = rows.add_column("margin", [float(i % 3) for i in range(len(rows))])
    args = trl.RewardConfig(
        str(tmp_path / "trl"), max_steps=3, logging_steps=1, learning_rate=1e-3, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, bf16=False, gradient_checkpointing=False, **extra,
    )  # fmt: skip
    spare = copy.deepcopy(tokenizer)  # with pad = EOS it would read the token before EOS
    spare.pad_token = "<|im_start|>"
    peer = trl.RewardTrainer(model=reward_model(), args=args, train_dataset=rows, processing_class=spare)
    peer.train()
    ours = reward(rows=rows, **extra)
    ours.train()
    for name in ("loss", "accuracy", "margin", "mean_reward"):
        close(logged(ours, name), logged(peer, name))


def test_an_adapter_resumes(reward, tmp_path):
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        trainer = reward(peft_config=lora(), save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(logged(trainer))
    close(runs[1], runs[0])


BAD = {
    "no number": ([1.0, None], r"row 2: 'margin' is missing, expected a finite number"),
    "infinite": ([1.0, math.inf], r"row 2: 'margin' is inf, expected a finite number"),
    "text": (["1", "2"], r"row 1: 'margin' is text, expected a finite number"),
    "a flag": ([True, False], r"row 1: 'margin' is true or false, expected a finite number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_margins_are_named(reward, preference_rows, case):
    margins, said = BAD[case]
    with pytest.raises(ValueError, match=said):
        reward(rows=preference_rows.select(range(2)).add_column("margin", margins))


def test_bad_input_is_named(reward, tmp_path):
    with pytest.raises(ValueError, match="no sequence-classification class for granite"):
        reward(tiny_model("granite"))
    with pytest.raises(ValueError, match=r"center_rewards_coefficient must be at least 0, got -1"):
        RewardConfig(str(tmp_path), center_rewards_coefficient=-1.0, use_cpu=True)
    with pytest.raises(ValueError, match="row 1: 'rejected_ids' is empty"):
        reward(rows=Dataset.from_list([{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": []}] * 13))
