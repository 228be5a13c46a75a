"""What a trainer promises: its first figures, its reference, its checkpoint, TRL's figures, the usual calls."""

import math

import pytest
import torch
from conftest import close, tiny_model
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from rlhf import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


def lora(**changes):
    return LoraConfig(task_type="CAUSAL_LM", r=4, **changes)


@pytest.fixture
def dpo(tmp_path, tokenizer, preference_rows):
    def make(model=None, ref_model=None, peft_config=None, **changes):
        options = dict(max_steps=3, logging_steps=1, learning_rate=1e-3, report_to="none", save_strategy="no") | changes
        return DPOTrainer(
            model=tiny_model() if model is None else model,
            ref_model=ref_model,
            args=DPOConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, **options),
            train_dataset=preference_rows,
            eval_dataset=preference_rows.select(range(13)),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


@pytest.fixture
def sft(tmp_path, tokenizer, sft_rows):
    def make(model=None, peft_config=None, rows=sft_rows, **changes):
        options = dict(max_steps=3, logging_steps=1, learning_rate=1e-3, report_to="none", save_strategy="no") | changes
        return SFTTrainer(
            model=tiny_model() if model is None else model,
            args=SFTConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, **options),
            train_dataset=rows,
            eval_dataset=sft_rows.select(range(13)),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dpo_starts_at_log_2(dpo, peft, dropout):
    model = tiny_model("gpt2", resid_pdrop=dropout) if dropout else tiny_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    trainer = dpo(model, peft_config=lora(lora_dropout=dropout, target_modules="all-linear") if peft else None)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/accuracies"] == 0.5 or abs(first["rewards/margins"]) < 1e-5
    assert losses(trainer)[-1] != first["loss"]


def test_the_names_that_people_plot(dpo):
    trainer = dpo(max_steps=1)
    trainer.train()
    names = {"loss", "grad_norm", "learning_rate", "num_tokens", "logps/chosen", "logps/rejected"}
    names |= {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    assert names <= trainer.state.log_history[0].keys()
    assert {f"eval_{n}" for n in names - {"grad_norm", "learning_rate", "num_tokens"}} <= trainer.evaluate().keys()


def test_the_frozen_reference_stays_where_it_was(dpo):
    trainer = dpo()
    start = tiny_model().state_dict()
    trainer.train()
    reference = trainer.ref_policy.model.state_dict()
    assert all(torch.equal(reference[key], start[key]) for key in start)
    assert not any(p.requires_grad for p in trainer.ref_policy.parameters())


def test_under_lora_there_is_no_second_copy_and_the_base_stays(dpo):
    trainer = dpo(peft_config=lora())
    assert trainer.ref_policy is None
    trainer.train()
    base = trainer.model.model.get_base_model().state_dict()
    start = tiny_model().state_dict()
    assert all(torch.equal(base[key.replace(".weight", ".base_layer.weight")] if key.replace(
        ".weight", ".base_layer.weight") in base else base[key], start[key]) for key in start)  # fmt: skip


def test_lora_reference_is_the_frozen_copys(dpo):
    """The two ways to a reference give the same run."""
    adapter = lora(init_lora_weights=True, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    one = dpo(peft_config=adapter)
    torch.manual_seed(0)
    other = dpo(peft_config=adapter, ref_model=tiny_model())
    one.train(), other.train()
    close(losses(one), losses(other))


def test_another_reference(dpo):
    trainer = dpo(ref_model=tiny_model(seed=1))
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) > 1e-4


def test_a_reference_that_cannot_take_segments_takes_the_policy_to_rows(dpo, caplog):
    trainer = dpo(ref_model=tiny_model("stablelm"))
    assert trainer.data_collator.layout == "rows" and "StableLmForCausalLM: padded rows, because" in caplog.text
    trainer.train()
    want = dpo(ref_model=tiny_model("stablelm"), layout="rows")
    want.train()
    close(losses(trainer), losses(want))
    with pytest.raises(ValueError, match="--layout segments: StableLmForCausalLM cannot take it"):
        dpo(ref_model=tiny_model("stablelm"), layout="segments")


@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_other_losses_start_where_their_formula_says(dpo, loss_type):
    trainer = dpo(loss_type=loss_type, max_steps=1)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx({"hinge": 1.0, "ipo": 25.0}[loss_type], rel=1e-5)


def test_mixtures_and_the_own_arguments_of_losses(dpo):
    mixed = dpo(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], max_steps=1)
    mixed.train()
    log = mixed.state.log_history[0]
    likelihood = losses(mixed)[0] - 0.8 * math.log(2) - 0.2 * 2 * math.log(2)
    assert likelihood == pytest.approx(math.log(log["perplexity/chosen"]), rel=0.2)  # over pairs, not over tokens
    simpo = dpo(loss_type="simpo", beta=2.0, loss_kwargs={"simpo_gamma": 1.0}, max_steps=1)
    simpo.train()
    assert losses(simpo)[0] > math.log(1 + math.e) - 0.5


def test_a_loss_that_wants_what_the_trainer_lacks_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"loss_type sigmoid: .*simpo_gamma"):
        DPOConfig(str(tmp_path), loss_kwargs={"simpo_gamma": 1.0}, use_cpu=True)


@pytest.mark.parametrize("make", ["sft", "dpo"])
def test_evaluation_does_not_depend_on_the_batch_size(make, request):
    make = request.getfixturevalue(make)
    changes = {"ref_model": tiny_model(seed=1)} if make.__qualname__.startswith("dpo") else {}
    found = [make(per_device_eval_batch_size=size, **changes).evaluate() for size in (1, 4, 13)]
    names = [k for k in found[0] if "runtime" not in k and "per_second" not in k]
    assert len(names) >= 2
    for other in found[1:]:
        close([other[k] for k in names], [found[0][k] for k in names])


def test_perplexity_is_of_the_corpus(sft, tokenizer):
    """exp(total NLL / total tokens), from the model's own dense logits, a row at a time."""
    trainer = sft()
    total, tokens = 0.0, 0
    model = tiny_model().double().eval()
    for row in trainer.eval_dataset:
        logps = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        for before, label in zip(logps, row["labels"][1:], strict=True):
            if label != -100:
                total, tokens = total - float(before[label]), tokens + 1
    metrics = trainer.evaluate()
    close(metrics["eval_perplexity"], math.exp(total / tokens))
    close(metrics["eval_loss"], total / tokens)


def test_sft_learns(sft):
    trainer = sft(max_steps=30, learning_rate=5e-3)
    before = trainer.evaluate()["eval_perplexity"]
    trainer.train()
    assert trainer.evaluate()["eval_perplexity"] < before / 3


def test_dpo_learns(dpo):
    trainer = dpo(max_steps=60, learning_rate=2e-3)
    trainer.train()
    assert trainer.evaluate()["eval_rewards/accuracies"] > 0.9


def test_the_checkpoint_is_an_ordinary_one_and_the_best_is_loaded(sft, tmp_path):
    trainer = sft(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    held = trainer.model.model.state_dict()
    assert loaded.keys() == held.keys()
    assert all(torch.equal(loaded[k], held[k]) and torch.equal(best[k], held[k]) for k in held)


def test_an_adapter_starts_from_the_seed(sft):
    """Whatever numbers were drawn before."""
    starts = []
    for before, seed in ((1, 3), (2, 3), (2, 4)):
        torch.manual_seed(before)
        model = sft(peft_config=lora(), seed=seed).model
        starts.append(torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_A" in n]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])


def test_an_adapter_resumes(sft, tmp_path):
    torch.manual_seed(0)
    whole = sft(peft_config=lora(), save_strategy="steps", save_steps=2)
    whole.train()
    torch.manual_seed(0)
    again = sft(peft_config=lora(), save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    close(losses(again), losses(whole))


def test_the_old_word_for_the_tokenizer(tmp_path, tokenizer, sft_rows, caplog):
    args = SFTConfig(str(tmp_path), use_cpu=True, report_to="none")
    SFTTrainer(model=tiny_model(), args=args, train_dataset=sft_rows, tokenizer=tokenizer)
    assert "tokenizer= is now called processing_class=" in caplog.text


def test_a_model_by_name_brings_its_tokenizer(tmp_path, model_folder, sft_rows):
    args = SFTConfig(str(tmp_path), use_cpu=True, report_to="none", model_init_kwargs={"dtype": "bfloat16"})
    trainer = SFTTrainer(str(model_folder), args, train_dataset=sft_rows)
    assert trainer.model.dtype == torch.bfloat16 and trainer.processing_class.chat_template


def test_compiled_it_gives_the_same(sft, dpo):
    compiling = dict(torch_compile=True, torch_compile_backend="eager")
    plain, compiled = (sft(tiny_model(num_hidden_layers=1), max_steps=1, **options) for options in ({}, compiling))
    assert compiled.data_collator.layout == "segments"
    plain.train(), compiled.train()
    close(losses(compiled), losses(plain))
    assert compiled.model.model.state_dict().keys() == plain.model.model.state_dict().keys()
    assert not hasattr(compiled.model_wrapped, "_orig_mod")  # accelerate would compile the whole model
    compiled = dpo(**compiling)
    for policy in (compiled.model, compiled.ref_policy):
        assert all("compiled" in layer.forward.__name__ for layer in policy.model.model.layers)


def test_the_optimizer_is_fused_for_all_weights(sft):
    trainer = sft(peft_config=lora())
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in groups} == {id(parameter) for parameter in trained} and len(trained) > 4


def test_small_updates_of_half_precision_weights_are_warned_of(sft, caplog):
    sft(model=tiny_model().bfloat16(), learning_rate=1e-5)
    assert "training bfloat16 weights in place" in caplog.text


def test_streams_without_an_end_are_refused_with_a_line(tmp_path, tokenizer, sft_rows):
    args = SFTConfig(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="a stream does not say how many rows it has: pass --max_steps"):
        SFTTrainer(tiny_model(), args, train_dataset=sft_rows.to_iterable_dataset(), processing_class=tokenizer)


@pytest.mark.parametrize("make", ["sft", "dpo"])
def test_the_layout_is_the_models_and_is_said_once(make, request, caplog):
    make = request.getfixturevalue(make)
    assert make().data_collator.layout == "segments" and not caplog.text
    assert make(tiny_model("stablelm")).data_collator.layout == "rows"
    assert (
        caplog.text.count("StableLmForCausalLM: padded rows, because its attention cannot be replaced (exact, slower)")
        == 1
    )
    with pytest.raises(
        ValueError, match=r"^--layout segments: StableLmForCausalLM cannot take it, its attention cannot"
    ):
        make(tiny_model("stablelm"), layout="segments")


def test_rows_longer_than_a_planned_batch_are_trained_on_and_told(sft, caplog):
    trainer = sft(tokens_per_batch=12, per_device_train_batch_size=5)
    longer = [n for n in map(len, trainer.train_dataset.rows["input_ids"]) if n > 12]
    assert f"{len(longer)} of 48 rows are longer than the 12 tokens of a batch (up to {max(longer)})" in caplog.text
    tokens = [batch.input_ids.numel() for batch in trainer.get_train_dataloader()]
    assert sum(tokens) == sum(map(len, trainer.train_dataset.rows["input_ids"]))
    assert [n for n in sorted(tokens) if n > 12] == sorted(longer)


BAD = {
    "layout": ("diagonal", "layout must be one of auto, segments, rows, got 'diagonal'"),
    "tokens_per_batch": (0, "tokens_per_batch must be at least 1, got 0"),
    "max_length": (1, "max_length must be at least 2, got 1"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("config", [SFTConfig, DPOConfig])
def test_bad_settings_are_refused_at_once(config, name, tmp_path):
    value, said = BAD[name]
    with pytest.raises(ValueError, match=f"^{said}$"):
        config(str(tmp_path), use_cpu=True, **{name: value})


def trls(kind, tmp_path, tokenizer, rows, **more):
    """TRL's trainer of the same name, run on the same rows."""
    trl = pytest.importorskip("trl")
    args = getattr(trl, f"{kind}Config")(
        str(tmp_path / "trl"), max_steps=3, logging_steps=1, learning_rate=1e-3, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    make = getattr(trl, f"{kind}Trainer")
    peer = make(model=tiny_model(), args=args, train_dataset=rows, processing_class=tokenizer, **more)
    peer.train()
    return peer


def test_sft_follows_trls_run(sft, tmp_path, tokenizer, sft_rows):
    peer = trls("SFT", tmp_path, tokenizer, sft_rows)
    ours = sft()
    ours.train()
    close(losses(ours), losses(peer))


def test_dpo_follows_trls_run(dpo, tmp_path, tokenizer, preference_rows):
    peer = trls("DPO", tmp_path, tokenizer, preference_rows, ref_model=tiny_model())
    ours = dpo()
    ours.train()
    close(losses(ours), losses(peer))
    for name in ("rewards/margins", "logps/chosen", "rewards/chosen"):
        close(*([e[name] for e in trainer.state.log_history if name in e] for trainer in (ours, peer)))
