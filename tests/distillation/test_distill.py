"""Distillation: the loss by the plain formula, teachers of every kind, and what is refused."""

import json
import math

import pytest
import torch
from conftest import close, tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rlhf import DistillConfig, DistillTrainer

NAMES = ("loss", "kl", "agreement", "perplexity", "teacher_perplexity")


def lora(**changes):
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **changes)


@pytest.fixture
def distill(tmp_path, tokenizer, sft_rows):
    def make(model=None, teacher=None, peft_config=None, teacher_adapter=None, teacher_tokenizer=None, **changes):
        options = dict(max_steps=3, logging_steps=1, learning_rate=1e-3, report_to="none", save_strategy="no") | changes
        return DistillTrainer(
            tiny_model() if model is None else model,
            teacher,
            DistillConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, **options),
            train_dataset=sft_rows,
            eval_dataset=sft_rows.select(range(13)),
            processing_class=tokenizer,
            peft_config=peft_config,
            teacher_adapter=teacher_adapter,
            teacher_processing_class=teacher_tokenizer,
        )

    return make


@torch.no_grad()
def naive(student, teacher, rows, temperature, hard, known=None):
    """Every figure from all the logits of one row at a time; JSD at 1/2 from probabilities."""
    sums, count = dict.fromkeys(NAMES, 0.0), 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        z, y = (model.eval()(ids).logits[0, :-1, :known].double() for model in (student, teacher))
        for s, t, label in zip(z, y, labels.tolist(), strict=True):
            if label == -100:
                continue
            q, p = (s / temperature).softmax(-1), (t / temperature).softmax(-1)
            m = (p + q) / 2
            jsd = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
            log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
            sums["loss"] += float(jsd - hard * log_q[label])
            sums["kl"] += float((log_p.exp() * (log_p - log_q)).sum())
            sums["agreement"] += float(s.argmax() == t.argmax())
            sums["perplexity"] -= float(log_q[label])
            sums["teacher_perplexity"] -= float(log_p[label])
            count += 1
    means = {name: value / count for name, value in sums.items()}
    return {name: math.exp(value) if "perplexity" in name else value for name, value in means.items()}


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("layout", ["segments", "rows"])
@pytest.mark.parametrize(("temperature", "hard"), [(1.0, 0.0), (2.0, 0.5)])
def test_every_figure_is_the_plain_formulas(distill, layout, temperature, hard):
    teacher = tiny_model("qwen2", seed=1)
    trainer = distill(
        teacher=teacher, layout=layout, temperature=temperature, crossentropy_weight=hard,
        per_device_train_batch_size=16, gradient_accumulation_steps=3, per_device_eval_batch_size=5, max_steps=1,
    )  # fmt: skip
    want = naive(tiny_model(), teacher, trainer.eval_dataset, temperature, hard)
    found = trainer.evaluate()
    for name in NAMES:
        close(found[f"eval_{name}"], want[name])
    want = naive(tiny_model(), teacher, trainer.train_dataset, temperature, hard)
    trainer.train()
    for name in NAMES:
        close(logs(trainer)[0][name], want[name])


def test_a_student_comes_nearer(distill):
    trainer = distill(teacher=tiny_model(seed=1), divergence="kl_divergence", max_steps=40, learning_rate=1e-2)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_kl"] < before["eval_kl"] / 2 and after["eval_agreement"] > before["eval_agreement"]
    assert after["eval_teacher_perplexity"] == before["eval_teacher_perplexity"]


@pytest.mark.parametrize("peft", [None, lora()])
def test_the_teachers_time_is_told_apart(distill, peft, tmp_path):
    distill(teacher=None if peft else tiny_model(seed=1), peft_config=peft, profile=1).train()
    seconds = json.loads((tmp_path / "profile.json").read_text())["seconds"]
    assert min(seconds[phase] for phase in ("reference", "forward", "head", "backward")) > 0


def test_a_separate_teacher_is_frozen_and_has_no_dropout(distill):
    teacher, start = tiny_model("gpt2", seed=1), tiny_model("gpt2", seed=1).state_dict()
    for module in teacher.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    trainer = distill(teacher=teacher)
    trainer.train()
    assert all(torch.equal(value, start[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.p for m in teacher.modules() if isinstance(m, torch.nn.Dropout))


def test_the_trunk_without_a_new_adapter_teaches_nothing(distill):
    trainer = distill(peft_config=lora(lora_dropout=0.0), max_steps=1)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    first = logs(trainer)[0]
    assert first["loss"] == first["kl"] == first["grad_norm"] == 0 and first["agreement"] == 1
    assert first["perplexity"] == first["teacher_perplexity"]
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_the_trunk_is_the_teacher_that_a_copy_is(distill):
    """And it is held once; it has no dropout where the student has."""
    options = dict(peft_config=lora(lora_dropout=0.0), crossentropy_weight=1.0, temperature=2.0, learning_rate=1e-2)
    own, copied = distill(**options), distill(teacher=tiny_model(), **options)
    own.train(), copied.train()
    assert logs(own)[-1]["kl"] > 1e-3
    for one, other in zip(logs(own), logs(copied), strict=True):
        for name in (*NAMES, "grad_norm"):
            close(one[name], other[name])
    noisy = distill(peft_config=lora(lora_dropout=0.5), crossentropy_weight=1.0, disable_dropout=False)
    noisy.train()
    close(logs(noisy)[0]["teacher_perplexity"], logs(own)[0]["teacher_perplexity"])
    assert noisy.model.model.training


def two_adapters():
    """A trunk with an adapter that learns and one that teaches, "tutor"; and the tutor as a model of its own."""

    def tutored():
        model = get_peft_model(tiny_model(), lora(), adapter_name="tutor")
        g = torch.Generator().manual_seed(3)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data = torch.randn(p.shape, generator=g) * 0.1
        return model

    both = tutored()
    both.add_adapter("pupil", lora())
    both.set_adapter("pupil")
    return both, tutored().merge_and_unload()


def test_another_adapter_on_the_trunk_teaches(distill):
    model, merged = two_adapters()
    start = {name: p.clone() for name, p in model.named_parameters()}
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns and all("pupil" in name for name in learns)
    trainer = distill(model, teacher_adapter="tutor", crossentropy_weight=0.1)
    want = naive(tiny_model(), merged, trainer.eval_dataset, 1.0, 0.1)
    found = trainer.evaluate()
    for name in NAMES:
        close(found[f"eval_{name}"], want[name])
    trainer.train()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learns
    assert {name for name, p in model.named_parameters() if not torch.equal(p, start[name])} <= learns
    assert any(not torch.equal(p, start[name]) for name, p in model.named_parameters())
    assert model.active_adapter == "pupil"


def test_a_teacher_that_runs_its_own_head(distill):
    """An adapter on the teacher's head is not passed over."""
    g = torch.Generator().manual_seed(0)
    teacher = get_peft_model(tiny_model(seed=1), LoraConfig(target_modules=["lm_head"]))
    for name, p in teacher.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=g)
    trainer = distill(teacher=teacher)
    want = naive(tiny_model(), teacher, trainer.eval_dataset, 1.0, 0.0)
    found = trainer.evaluate()
    for name in NAMES:
        close(found[f"eval_{name}"], want[name])
    trainer.train()
    assert logs(trainer)[-1]["loss"] < logs(trainer)[0]["loss"]


def test_a_teacher_that_cannot_take_segments_takes_the_student_to_rows(distill):
    trainer = distill(teacher=tiny_model("stablelm", seed=1))
    assert trainer.data_collator.layout == "rows"
    trainer.train()


def test_vocabularies_that_differ_by_padding(distill, tokenizer):
    known = len(tokenizer)
    student, teacher = tiny_model(vocab_size=known + 3), tiny_model(vocab_size=known + 8, seed=1)
    with pytest.raises(ValueError, match=f"has {known + 3} tokens, the teacher {known + 8}: pass teacher_pro"):
        distill(student, teacher)
    trainer = distill(student, teacher, teacher_tokenizer=tokenizer)
    want = naive(tiny_model(vocab_size=known + 3), teacher, trainer.eval_dataset, 1.0, 0.0, known)
    found = trainer.evaluate()
    for name in NAMES:
        close(found[f"eval_{name}"], want[name])


def changed(tokenizer, change):
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    change(text["model"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(text)), eos_token="<|im_end|>")


def swap(model):
    vocabulary = model["vocab"]
    one, other = (next(token for token, i in vocabulary.items() if i == index) for index in (40, 41))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def test_other_tokenizers_are_refused(distill, tokenizer, tmp_path):
    forty, next_one = tokenizer.convert_ids_to_tokens([40, 41])
    message = f"another tokenizer: token 40 is {forty!r} for the student, {next_one!r} for the teacher"
    swapped = changed(tokenizer, swap)
    with pytest.raises(ValueError) as error:
        distill(teacher=tiny_model(seed=1), teacher_tokenizer=swapped)
    assert message in str(error.value)
    tiny_model(seed=1).save_pretrained(tmp_path / "teacher")
    swapped.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError) as error:  # read from the teacher's folder
        distill(teacher=str(tmp_path / "teacher"))
    assert message in str(error.value)
    last = len(tokenizer) - 1
    shorter = changed(tokenizer, lambda m: (m["vocab"].pop(tokenizer.convert_ids_to_tokens(last)), m["merges"].pop()))
    with pytest.raises(ValueError, match=f"token {last} is '.*' for the student, missing for the teacher"):
        distill(teacher=tiny_model(seed=1), teacher_tokenizer=shorter)
    with pytest.raises(ValueError, match="text is split differently: merge"):
        distill(teacher=tiny_model(seed=1), teacher_tokenizer=changed(tokenizer, lambda m: m["merges"].pop()))


def test_what_cannot_be(distill, caplog):
    model = tiny_model()
    with pytest.raises(ValueError, match="no teacher: pass --teacher_model_name_or_path"):
        distill(model)
    with pytest.raises(ValueError, match="the student is its own teacher"):
        distill(model, model)
    with pytest.raises(ValueError, match=r"teacher_adapter 'x' must be an .* adapters: tutor, pupil"):
        distill(two_adapters()[0], teacher_adapter="x")
    with pytest.raises(ValueError, match="teacher_adapter 'pupil' is the adapter that is trained"):
        distill(two_adapters()[0], teacher_adapter="pupil")
    with pytest.raises(ValueError, match="stand for a teacher: leave the model and teacher_adapter out"):
        distill(model, tiny_model(seed=1), teacher_file="kept")
    distill(model, tiny_model(seed=1))
    assert "so the student's is assumed" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(divergence="kl"), "divergence 'kl' is unknown: one of kl_divergence, "),
        (dict(divergence="kl_divergence", beta=0.5), "kl_divergence takes no beta"),
        (dict(alpha=0.5), "generalized_jsd takes no alpha"),
        (dict(reverse=True), "generalized_jsd takes no reverse"),
        (dict(divergence="total_variation", alpha=0.5), "total_variation takes no alpha"),
        (dict(beta=2.0), "beta must be in"),
        (dict(temperature=-1.0), "temperature must be above 0"),
        (dict(distillation_weight=-1.0), "distillation_weight must be at least 0"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(str(tmp_path), use_cpu=True, **options)
