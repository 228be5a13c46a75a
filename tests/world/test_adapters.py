"""An adapter's folder is what was trained, whoever loads it.

Reported: huggingface/trl#872, hiyouga/LLaMA-Factory#2588 and huggingface/peft#2264 (a second adapter loses the first),
huggingface/peft#2184 (PiSSA and OLoRA), #736 (biases), #1750 (new tokens), #2898 (adapters on embeddings),
#1980 (prompt tuning), #2556 (layers that LoRA cannot sit on), huggingface/trl#2707 (a value head beside an adapter).
"""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import _SMALL, ARCHITECTURES, close, sentences, tiny_model
from datasets import Dataset
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from world.families import tiny_family

from rlhf import (
    DistillConfig,
    DistillTrainer,
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf.data import Collator
from rlhf.models import Policy, add_adapter, load_model, load_reward_model, load_tokenizer
from rlhf.models.adapter_base import keep_base
from rlhf.models.adapter_layers import linear_layers
from rlhf.models.adapters import REFUSED

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 305, 314]])


def lora(**options):
    return LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **options})


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Of a model with a head of its own, and of one whose head is the embeddings."""
    made = {}
    for name, options in (("llama", {"attention_bias": True}), ("tied", {"tie_word_embeddings": True})):
        made[name] = tmp_path_factory.mktemp(name)
        tiny_model(**options).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture
def sft(tmp_path, sft_rows):
    def run(model, peft_config=None, out=tmp_path / "run", rows=sft_rows, **options):
        named = {"processing_class": options.pop("processing_class")} if "processing_class" in options else {}
        args = dict(max_steps=2, learning_rate=0.03, lr_scheduler_type="constant", report_to="none", use_cpu=True)
        args |= dict(save_strategy="no", disable_tqdm=True, disable_dropout=True) | options
        trainer = SFTTrainer(model, SFTConfig(out, **args), train_dataset=rows, peft_config=peft_config, **named)
        trainer.train()
        trainer.save_model()
        return trainer, str(out)

    return run


def loads_alike(trainer, folder):
    want = logits(trainer.model.model)
    base = json.loads(Path(folder, "adapter_config.json").read_text())["base_model_name_or_path"]
    ways = {
        "rlhf": lambda: load_model(folder),
        "transformers": lambda: AutoModelForCausalLM.from_pretrained(folder),
        "peft": lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
        "peft on the base": lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
    }
    for name, load in ways.items():
        worst = float((logits(load()) - want).abs().max())
        assert worst < 2e-5 * float(want.abs().max()), f"{name}: off by {worst}"


KINDS = {
    "lora": ("llama", lora),
    "everywhere": ("llama", lambda: lora(target_modules=None, use_rslora=True)),
    "tied head": ("tied", lambda: lora(target_modules=["lm_head", "q_proj"])),
    "tied embeddings": ("tied", lambda: lora(target_modules=["embed_tokens", "q_proj"])),
    "both": ("tied", lambda: lora(target_modules=["embed_tokens", "lm_head"])),
    "both as one": ("tied", lambda: lora(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)),
    "embeddings whole": ("tied", lambda: lora(modules_to_save=["embed_tokens"])),
    "tokens": ("tied", lambda: lora(trainable_token_indices=[305, 314])),
    "pissa": ("llama", lambda: lora(init_lora_weights="pissa")),
    "random pissa": ("llama", lambda: lora(init_lora_weights="pissa_niter_2")),
    "olora": ("llama", lambda: lora(init_lora_weights="olora")),
    "biases": ("llama", lambda: lora(bias="all")),
    "ia3": ("llama", lambda: IA3Config(task_type="CAUSAL_LM")),
    "dora": ("llama", lambda: lora(use_dora=True)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_folder_is_what_was_trained(kind, folders, sft):
    base, config = KINDS[kind]
    loads_alike(*sft(str(folders[base]), config()))


def test_an_adapter_on_an_adapter(folders, sft, tmp_path):
    """The second one sits on the first, which is saved with it; a folder that is moved as a whole still loads."""
    _, first = sft(str(folders["llama"]), lora(), out=tmp_path / "first")
    start = logits(load_model(first))
    trainer, second = sft(first, lora(target_modules="all-linear"), out=tmp_path / "second")
    with trainer.model.model.disable_adapter():
        close(logits(trainer.model.model), start)
    loads_alike(trainer, second)
    assert load_tokenizer(second).get_vocab()
    shutil.move(second, tmp_path / "moved")
    close(logits(load_model(str(tmp_path / "moved"))), logits(trainer.model.model))
    shutil.rmtree(tmp_path / "moved" / "base")
    with pytest.raises(FileNotFoundError, match=r"its base model .* is gone; write where it is into .*adapter_config"):
        load_model(str(tmp_path / "moved"))


def test_an_error_of_the_base_model_names_the_adapter(folders, tmp_path):
    adapter = tmp_path / "adapter"
    get_peft_model(tiny_model(), lora()).save_pretrained(adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "nowhere"}))
    for load in (load_model, load_tokenizer, load_reward_model):
        with pytest.raises(ValueError, match=rf"^{adapter}: its base model nowhere: "):
            load(str(adapter))


def test_checkpoints_share_what_they_sit_on_and_resume(folders, sft, tmp_path):
    _, first = sft(str(folders["llama"]), lora(), out=tmp_path / "first")
    saving = dict(save_strategy="steps", save_steps=1)
    trainer, second = sft(first, lora(), out=tmp_path / "second", **{"max_steps": 4} | saving)
    assert [str(p.relative_to(second)) for p in (tmp_path / "second").glob("**/base")] == ["base"]
    want = logits(trainer.model.model)
    again = SFTTrainer(first, trainer.args, train_dataset=trainer.train_dataset, peft_config=lora())
    again.train(resume_from_checkpoint=f"{second}/checkpoint-2")
    close(logits(again.model.model), want)


def test_an_adapter_on_weights_that_were_changed_in_memory(folders, sft, tokenizer):
    """Merged by hand, say, and not saved: the checkpoint that the model was loaded from has other weights."""
    first = get_peft_model(load_model(str(folders["llama"])), lora(init_lora_weights=False))
    loads_alike(*sft(first.merge_and_unload(), lora(), processing_class=tokenizer))


def test_an_adapter_on_a_model_in_memory(sft, tokenizer):
    loads_alike(*sft(tiny_model(), lora(), processing_class=tokenizer))


@pytest.mark.parametrize("base", ["llama", "tied"])
@pytest.mark.parametrize("adapter", [True, False])
def test_new_tokens_are_learned_and_saved(base, adapter, folders, sft, tokenizer):
    """Rows of the embeddings are added for them, and learned under an adapter too."""
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<tool>", "<sep>"], special_tokens=True)
    rows = Dataset.from_list([{"text": f"{text} <tool> the cat <sep>"} for text in sentences(7, 8)])
    trainer, folder = sft(str(folders[base]), lora() if adapter else None, rows=rows, processing_class=more)
    assert trainer.model.config.vocab_size == len(load_tokenizer(folder)) == 332
    if adapter:
        rows = trainer.model.get_input_embeddings().weight[330:]
        with trainer.model.model.disable_adapter():
            assert (trainer.model.get_input_embeddings().weight[330:] - rows).abs().max() > 1e-3
        loads_alike(trainer, folder)
    else:
        close(logits(load_model(folder)), logits(trainer.model.model))


def test_a_new_token_to_pad_with_is_in_the_model(folders, sft, tokenizer):
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"pad_token": "[PAD]"})
    _, folder = sft(str(folders["tied"]), processing_class=more, layout="rows")
    assert load_model(folder).config.vocab_size == 331 > load_tokenizer(folder).pad_token_id


def test_tokens_that_no_row_has_change_no_model(folders, sft, tokenizer):
    """Gemma 3's tokenizer has a token for images that its text models lack."""
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<image>"], special_tokens=True)
    trainer, _ = sft(str(folders["llama"]), lora(), processing_class=more)
    assert trainer.model.config.vocab_size == 330
    assert trainer.model.peft_config["default"].base_model_name_or_path == str(folders["llama"])


def test_a_file_of_an_enlarged_vocabulary_loads(folders, tmp_path):
    """As PEFT saves one: with the whole embeddings, for a base that has fewer rows."""
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    model.resize_token_embeddings(335)
    adapted = get_peft_model(model, lora(init_lora_weights=False, modules_to_save=["embed_tokens", "lm_head"]))
    adapted.save_pretrained(tmp_path)
    close(logits(load_model(str(tmp_path))), logits(adapted))


def test_a_second_stage_of_a_reward_model(folders, preference_rows, tmp_path):
    def reward(model, out):
        args = RewardConfig(out, max_steps=2, learning_rate=0.03, report_to="none", use_cpu=True, disable_tqdm=True)
        trainer = RewardTrainer(model, args, train_dataset=preference_rows, peft_config=lora(task_type="SEQ_CLS"))
        trainer.train()
        trainer.save_model()
        return trainer.model.model

    reward(str(folders["llama"]), tmp_path / "first")
    model = reward(str(tmp_path / "first"), tmp_path / "second")
    want = logits(model)
    close(logits(load_reward_model(str(tmp_path / "second")).model), want)
    pad = dict(num_labels=1, pad_token_id=model.config.pad_token_id)
    close(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "second", **pad)), want)


STARTS = {
    "lora": lambda model: lora(),
    "pissa": lambda model: lora(init_lora_weights="pissa"),
    "biases": lambda model: lora(bias="all"),
    "trained": lambda model: None,
}


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_the_reference_is_the_start(kind, precompute, preference_rows, tokenizer, tmp_path, caplog):
    """The adapter switched off where that is the start; else a copy, which stays while the model moves."""
    model = tiny_model("qwen2")
    config = STARTS[kind](model)
    if config is None:
        model = get_peft_model(model, lora(init_lora_weights=False))
    start = logits(model)
    args = dict(max_steps=3, learning_rate=0.05, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1)
    args = DPOConfig(tmp_path, precompute_ref_log_probs=precompute, save_strategy="no", **args)
    trainer = DPOTrainer(
        model, args=args, train_dataset=preference_rows, processing_class=tokenizer, peft_config=config
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(0.693147, abs=1e-4) and losses[-1] != pytest.approx(losses[0], abs=1e-3)
    assert ("a frozen copy is the reference" in caplog.text) == (kind != "lora")
    if not precompute:
        reference = trainer.model.model if trainer.ref_policy is None else trainer.ref_policy.model
        if trainer.ref_policy is None:
            with reference.disable_adapter():
                close(logits(reference), start)
        else:
            close(logits(reference), start)


def test_a_teacher_that_would_learn_is_refused(sft_rows, tokenizer, tmp_path):
    adapted = get_peft_model(tiny_model("qwen2"), lora(bias="all"))
    with pytest.raises(ValueError, match="with its adapter off would be trained too"):
        DistillTrainer(
            adapted, args=DistillConfig(tmp_path, use_cpu=True), train_dataset=sft_rows, processing_class=tokenizer
        )


def test_two_adapters_are_refused(sft_rows, tokenizer, tmp_path):
    adapted = get_peft_model(tiny_model(), lora())
    with pytest.raises(ValueError, match="the model has an adapter already"):
        SFTTrainer(
            adapted, SFTConfig(tmp_path, use_cpu=True), train_dataset=sft_rows, processing_class=tokenizer,
            peft_config=lora(),
        )  # fmt: skip


def test_invocation_tokens_and_prompts_are_refused_by_name(sft_rows, tokenizer, tmp_path):
    for config, name in (
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT_TUNING"),
        (lora(alora_invocation_tokens=[5]), "aLoRA"),
        (lora(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    ):
        with pytest.raises(ValueError, match=f"{name} adapters cannot be trained here"):
            SFTTrainer(
                tiny_model(), SFTConfig(tmp_path, use_cpu=True), train_dataset=sft_rows, processing_class=tokenizer,
                peft_config=config,
            )  # fmt: skip


# What a tiny model asks of a kind: sizes that divide its own.
SIZES = {
    "ADALORA": dict(total_step=10, tinit=1, tfinal=1),
    "C3A": dict(block_size=8),
    "FOURIERFT": dict(n_frequency=16),
    "IA3": dict(target_modules=None),
    "LN_TUNING": dict(target_modules=None),
    "MISS": dict(r=4),
    "PSOFT": dict(r=4),
    "ROAD": dict(group_size=4),
    "SHIRA": dict(r=2),
    "TRAINABLE_TOKENS": dict(token_indices=[5, 6], target_modules=["embed_tokens"]),
    "VBLORA": dict(vector_length=8, num_vectors=16),
    "WAVEFT": dict(n_frequency=16),
}


@pytest.mark.parametrize("kind", PEFT_TYPE_TO_CONFIG_MAPPING, ids=lambda kind: kind.value)
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_peft_trains_and_reloads_or_is_refused(kind, folders, tmp_path):
    make = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    options = dict(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], num_virtual_tokens=4)
    options = {name: value for name, value in options.items() if name in make.__dataclass_fields__}
    config = make(**options | SIZES.get(kind.value, {}))
    model = load_model(str(folders["llama"]))
    if config.is_prompt_learning or config.is_adaption_prompt or kind in REFUSED:
        with pytest.raises(ValueError, match=f"{kind.value} adapters cannot be trained here"):
            add_adapter(model, config)
        return
    torch.manual_seed(0)
    adapted = add_adapter(model, config)
    batch = Collator(0)([{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}])
    policy = Policy(adapted)
    learned = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.05)
    losses = []
    for _ in range(3):
        loss = -policy(batch).logps.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    keep_base(adapted, tmp_path, set())
    adapted.save_pretrained(tmp_path)
    close(logits(load_model(str(tmp_path))), logits(adapted))


FAMILIES = {
    "mamba": dict(state_size=8),
    "falcon_h1": dict(
        head_dim=8, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
        mamba_chunk_size=16,
    ),
    "jamba": dict(mamba_d_state=8, mamba_dt_rank=4, num_experts=2, use_mamba_kernels=False),
    "llama4_text": dict(
        head_dim=8, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=48, attention_chunk_size=8
    ),
    "phimoe": dict(num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.0),
    "gpt_oss": dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": {},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_lora_finds_its_layers_in_every_family(family, tmp_path):
    """Without targets, and by PEFT's word for all; heads, routers and what a scan reads past the layer are left out."""
    ARCHITECTURES.setdefault(family, dict(model_type=family, **_SMALL))
    found = []
    for targets in (None, "all-linear"):
        adapted = add_adapter(tiny_model(family, **FAMILIES[family]), LoraConfig(r=2, target_modules=targets))
        found.append([name for name, p in adapted.named_parameters() if p.requires_grad])
    assert found[0] == found[1] and not any("router" in name or "lm_head" in name for name in found[0])
    policy = Policy(adapted)
    losses = []
    for _ in range(3):
        loss = -policy(Collator(0)([{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}])).logps.mean()
        loss.backward()
        losses.append(float(loss.detach()))
        for p in policy.parameters():
            if p.requires_grad and p.grad is not None:
                p.data -= p.grad.sign() * 0.02
                p.grad = None
    assert losses[-1] < losses[0]


def test_no_layer_to_sit_on_is_said():
    model = torch.nn.Sequential(torch.nn.Embedding(3, 3))
    with pytest.raises(ValueError, match="no linear layer for the adapter to sit on: name some"):
        linear_layers(model)


@pytest.mark.filterwarnings("ignore")
def test_the_value_head_beside_an_adapter_goes_on(folders, sft_rows, tmp_path):
    def ppo(model, **options):
        args = dict(max_steps=2, learning_rate=0.03, max_completion_length=4, max_length=64, report_to="none")
        args |= dict(use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=4, **options)
        reward = lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids]  # noqa: E731
        return PPOTrainer(model, reward, PPOConfig(tmp_path, **args), train_dataset=sft_rows, peft_config=lora())

    trainer = ppo(str(folders["llama"]), beta=0.1)
    assert trainer.ref_policy is None  # the adapter switched off is the reference
    trainer.train()
    trainer.save_model()
    want = trainer.policy.value_head.weight
    assert want.abs().max() > 0
    close(ppo(str(tmp_path)).policy.value_head.weight.detach(), want.detach())


def test_adapters_in_folders_of_the_folder_are_named(folders, tmp_path):
    adapted = get_peft_model(load_model(str(folders["llama"])), lora(), adapter_name="pupil")
    adapted.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="adapters are in its folders pupil: name one of them"):
        load_model(str(tmp_path))
    close(logits(load_model(str(tmp_path / "pupil"))), logits(adapted))
    assert len(load_tokenizer(str(tmp_path / "pupil"))) == 330  # its base model's


def test_a_layer_that_takes_its_inputs_in_groups_is_left_out():
    """DeepSeek V4 has one; the trial of it stopped every run with an adapter."""
    model = tiny_family("deepseek_v4")
    grouped = {name.rpartition(".")[2] for name, layer in model.named_modules() if hasattr(layer, "n_groups")}
    assert grouped and not grouped & linear_layers(model)
