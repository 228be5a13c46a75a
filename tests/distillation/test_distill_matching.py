"""Hidden states compared with a teacher's: row by row from what transformers gives, and what is refused."""

import copy

import pytest
import torch
from conftest import close, tiny_model
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf import DistillConfig, DistillTrainer
from rlhf.data import Collator
from rlhf.distillation import copy_layers

RATE = 0.1
SGD = dict(optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0)
HIDDEN = dict(hidden_state_weight=0.7)


def model(name="llama", seed=0, **changes):
    return tiny_model(name, seed=seed, **changes).double()


def narrow():
    return model("llama", hidden_size=16, num_attention_heads=2, num_key_value_heads=1)


def deep(seed=1):
    return model("qwen2", seed=seed, num_hidden_layers=3)


def pair(kind):
    """A student of two layers and a teacher of three."""
    if kind == "gpt2":
        return model("gpt2"), model("gpt2", seed=1, n_layer=3)
    return narrow() if kind == "narrow" else model(), deep()


def lora():
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.0)


@pytest.fixture
def distill(tmp_path, tokenizer, sft_rows):
    def make(student, teacher=None, name="run", collator=None, peft_config=None, optimizers=(None, None), **changes):
        options = dict(max_steps=3, logging_steps=1, learning_rate=1e-3, report_to="none", save_strategy="no") | changes
        return DistillTrainer(
            student,
            teacher,
            DistillConfig(str(tmp_path / name), use_cpu=True, disable_tqdm=True, **options),
            train_dataset=sft_rows,
            eval_dataset=sft_rows.select(range(13)),
            processing_class=tokenizer,
            data_collator=collator,
            peft_config=peft_config,
            optimizers=optimizers,
        )

    return make


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def places(row):
    """Where a token that counts is predicted."""
    return [place for place, label in enumerate(row["labels"][1:]) if label != -100]


def layer_outputs(model, ids):
    """[T, H] of each layer; the last of ``hidden_states`` has the final norm in it, so that is caught before."""
    last = []
    norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f
    handle = norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    states = model.eval()(ids, output_hidden_states=True).hidden_states
    handle.remove()
    return [state[0] for state in (*states[1:-1], *last)]


def naive_hidden(student, teacher, pairs, rows, distance="squared", maps=None):
    """The mean over tokens and layers, one token at a time."""
    values = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        ours, theirs = layer_outputs(student, ids), [state.detach() for state in layer_outputs(teacher, ids)]
        for place in places(row):
            for i, j in enumerate(pairs):
                s, t = ours[i][place], theirs[j][place]
                s = maps[i] @ s if maps else s
                far = (s - t).square().sum() / len(t) if distance == "squared" else 1 - s @ t / (s.norm() * t.norm())
                values.append(far)
    return torch.stack(values).mean()


def check_step(trainer, student, maps, name, value, of_eval):
    """One step of gradient descent from ``student`` and ``maps`` along 0.7 * ``value``, and what is logged of it."""
    # The norms of Llamas are computed in float32, whatever the model is in.
    dtype = torch.float64 if student.config.model_type == "gpt2" else torch.float32
    found = trainer.evaluate()
    close(found[f"eval_{name}"], of_eval)
    close(found["eval_loss"], 0.7 * of_eval)
    (0.7 * value).backward()
    trainer.train()
    close(logs(trainer)[0][name], value.detach(), dtype)
    close(logs(trainer)[0]["loss"], 0.7 * value.detach())
    after = weights(trainer)
    learned = dict(student.named_parameters())
    learned |= {f"projections.{i}": p for i, p in enumerate(maps)}
    assert learned.keys() == after.keys()
    for key, p in learned.items():
        moved = p.detach() if p.grad is None else p.detach() - RATE * p.grad
        close(after[key], moved, dtype)


ONE_STEP = dict(
    **SGD, distillation_weight=0.0, per_device_train_batch_size=16, gradient_accumulation_steps=3, max_steps=1,
    per_device_eval_batch_size=5,
)  # fmt: skip


@pytest.mark.parametrize("layout", ["segments", "rows"])
@pytest.mark.parametrize("distance", ["squared", "cosine"])
@pytest.mark.parametrize("kind", ["as wide", "narrow", "gpt2", "copied"])
def test_hidden_states_by_the_plain_formula(distill, layout, distance, kind):
    (student, teacher), pairs = pair(kind), [0, 2]
    if kind == "copied":  # its last layer is compared with one that is not the teacher's last
        student, pairs = copy_layers(deep(seed=2), [0, 1]), [0, 1]
    own, taught = copy.deepcopy(student), copy.deepcopy(teacher)
    trainer = distill(student, taught, layout=layout, hidden_state_distance=distance, **HIDDEN, **ONE_STEP)
    assert trainer.data_collator.layout == layout
    maps = [p.detach().clone().requires_grad_() for p in trainer.model.projections]
    assert len(maps) == (2 if kind == "narrow" else 0)
    with torch.no_grad():
        some = naive_hidden(own, teacher, pairs, trainer.eval_dataset, distance, maps)
    value = naive_hidden(own, teacher, pairs, trainer.train_dataset, distance, maps)
    check_step(trainer, own, maps, "hidden_state_loss", value, some)


def agree(one, other):
    dtype = next(one.model.parameters()).dtype
    for entry, other_entry in zip(logs(one), logs(other), strict=True):
        names = [name for name in entry if name.endswith("_loss")]
        assert names == [name for name in other_entry if name.endswith("_loss")] != []
        for name in names:
            close(entry[name], other_entry[name], dtype)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        close(p, theirs[name], dtype)


def both(distill, **changes):
    trainer = distill(narrow(), deep(), **{**SGD, **HIDDEN, **changes})
    trainer.train()
    return trainer


def test_no_split_or_layout_changes_a_number(distill):
    whole = both(distill, per_device_train_batch_size=8)
    assert logs(whole)[-1]["hidden_state_loss"] < logs(whole)[0]["hidden_state_loss"]
    agree(whole, both(distill, per_device_train_batch_size=1, gradient_accumulation_steps=8))
    agree(whole, both(distill, collator=Collator(0, padding_side="left")))
    agree(whole, both(distill, layout="rows"))
    everything = both(distill, per_device_train_batch_size=48)
    agree(everything, both(distill, tokens_per_batch=100, gradient_accumulation_steps=48))


def test_activation_checkpointing(distill):
    agree(both(distill), both(distill, activation_checkpointing=True))
    # the older way: the layers' outputs are outside of what is computed again
    again = dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
    agree(both(distill), both(distill, **again))


def test_a_student_that_is_the_teacher_has_nothing_to_learn(distill):
    teacher = deep()
    trainer = distill(copy_layers(teacher, [0, 1, 2]), teacher, max_steps=1, **HIDDEN)
    before = weights(trainer)
    trainer.train()
    first = logs(trainer)[0]
    assert first["loss"] == first["hidden_state_loss"] == first["grad_norm"] == 0
    assert all(torch.equal(p, before[name]) for name, p in weights(trainer).items())


def test_the_trunk_is_the_teacher_that_a_copy_is(distill):
    own, copied = (
        distill(model(), teacher, peft_config=lora(), crossentropy_weight=1.0, **SGD, **HIDDEN)
        for teacher in (None, model())
    )
    own.train(), copied.train()
    assert logs(own)[0]["hidden_state_loss"] == 0 and logs(own)[-1]["hidden_state_loss"] > 1e-6
    agree(own, copied)


def test_projections_are_drawn_from_the_seed_alone(distill):
    def drawn(other, **changes):
        student, teacher = narrow(), deep()
        torch.manual_seed(other)
        return list(distill(student, teacher, **HIDDEN, **changes).model.projections)

    first, again, other = drawn(1), drawn(2), drawn(1, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])
    assert first[0].shape == (32, 16) and 0.2 < float(first[0].detach().abs().max()) <= 0.25  # 1 / sqrt(16)


def test_a_resumed_run_is_the_uninterrupted_one(distill, tmp_path):
    options = dict(**HIDDEN, max_steps=4, save_strategy="steps", save_steps=2)
    whole = distill(narrow(), deep(), **options)
    start = weights(whole)
    whole.train()
    resumed = distill(narrow(), deep(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    want, got = weights(whole), weights(resumed)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    moved = {name for name in want if not torch.equal(want[name], start[name])}
    assert {"projections.0", "projections.1"} < moved
    assert [e["hidden_state_loss"] for e in logs(resumed)] == [e["hidden_state_loss"] for e in logs(whole)]


def test_the_saved_model_has_no_projections(distill, tmp_path):
    trainer = distill(narrow(), deep(), **HIDDEN)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not [name for name in load_file(tmp_path / "saved" / "model.safetensors") if "projection" in name]
    kept = load_file(tmp_path / "saved" / "projections.safetensors")
    assert kept.keys() == {"projections.0", "projections.1"}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, p in loaded.named_parameters():
        assert torch.equal(p, trainer.model.model.get_parameter(name))
    plain = distill(narrow(), deep(), name="plain")
    plain.save_model(str(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "projections.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(hidden_state_weight=-1.0), "hidden_state_weight must be at least 0, got -1.0"),
        (dict(hidden_state_weight=float("nan")), "hidden_state_weight must be at least 0, got nan"),
        (dict(hidden_state_distance="l1"), "hidden_state_distance must be one of squared, cosine, got 'l1'"),
        (dict(hidden_state_weight=1.0, teacher_file="x"), "hold no hidden states"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(str(tmp_path), use_cpu=True, **options)


def test_what_cannot_be(distill):
    with pytest.raises(ValueError, match="layers must be between 1 and 2, as many as the teacher has; got 3"):
        distill(deep(), model(), **HIDDEN)
    student = narrow()
    given = torch.optim.SGD(student.parameters())
    with pytest.raises(ValueError, match="does not hold the projections between them: leave optimizers out"):
        distill(student, deep(), optimizers=(given, None), **HIDDEN)
