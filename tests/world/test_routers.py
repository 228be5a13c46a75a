"""The load-balancing loss of routers is trained where a config asks for it, and does not depend on how a step is cut.

Transformers adds it to the loss of a batch (huggingface/transformers#28255, #28505: padding must not count).
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close, tiny_model
from datasets import Dataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from rlhf.data import Collator
from rlhf.models import routing
from rlhf.rollouts import LocalEngine, Sampling

RATE = 0.1
MIXED = dict(router_aux_loss_coef=0.5, output_router_logits=True)
KINDS = {
    "mixtral": {},
    "qwen3_moe": dict(
        moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=8, decoder_sparse_step=1
    ),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
}


def mixture(kind="mixtral", **changes):
    if kind == "mixtral":
        return tiny_model(kind, **MIXED | changes)
    small = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    own = dict(max_position_embeddings=128, initializer_range=0.2, vocab_size=330, pad_token_id=0, eos_token_id=0)
    return tiny_model("llama", **{**small, **own, **KINDS[kind], **MIXED, **changes, "model_type": kind})


def lengths_apart():
    g = torch.Generator().manual_seed(0)
    return [torch.randint(5, 300, (n,), generator=g).tolist() for n in (12, 5, 9, 7)]


def args_of(config_class, tmp_path, batch=4, **changes):
    given = dict(
        output_dir=str(tmp_path), max_steps=1, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True,
        optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0, disable_tqdm=True,
        per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch, disable_dropout=True,
    )  # fmt: skip
    return config_class(**given | changes)


def one_step(trainer):
    trainer.train()
    return trainer.state.log_history[0], dict(trainer.model.model.named_parameters())


def sft(model, tmp_path, tokenizer, peft_config=None, **changes):
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in lengths_apart()])
    args = args_of(SFTConfig, tmp_path, **changes)
    given = dict(train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)
    return one_step(SFTTrainer(copy.deepcopy(model), args=args, **given))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers(kind, tmp_path, tokenizer):
    model, rows = mixture(kind), lengths_apart()
    whole = copy.deepcopy(model)
    ids, labels, mask = (torch.full((4, 12), fill) for fill in (0, -100, 0))
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    found = whole(input_ids=ids, labels=labels, attention_mask=mask)
    found.loss.backward()
    want = {name: p - RATE * p.grad for name, p in whole.named_parameters()}
    logs, weights = sft(model, tmp_path, tokenizer)
    close(logs["loss"], found.loss.detach())
    close(logs["aux_loss"], found.aux_loss.detach())
    close(math.log(logs["perplexity"]), (found.loss - 0.5 * found.aux_loss).detach())
    for name, p in weights.items():
        torch.testing.assert_close(p, want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", ["rows", "segments"])
def test_no_split_and_no_layout_moves_it(layout, batch, tmp_path, tokenizer):
    model = mixture()
    logs, weights = sft(model, tmp_path, tokenizer, layout="rows")
    own_logs, own = sft(model, tmp_path, tokenizer, layout=layout, batch=batch)
    for name in ("loss", "aux_loss", "grad_norm"):
        close(own_logs[name], logs[name])
    for name, p in own.items():
        torch.testing.assert_close(p, weights[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layout", "batch"), [("rows", 4), ("segments", 4), ("segments", 1)])
def test_pairs_count_their_prompt_with_each_answer(layout, batch, tmp_path, tokenizer):
    model, rows = mixture(), lengths_apart()
    pairs = [{"prompt_ids": row[:4], "chosen_ids": row[4:], "rejected_ids": row[:0:-1]} for row in rows]
    texts = [row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids") for row in pairs]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    want = model(input_ids=ids, attention_mask=mask).aux_loss.detach()
    args = args_of(DPOConfig, tmp_path, layout=layout, batch=batch)
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    logs, _ = one_step(trainer)
    close(logs["aux_loss"], want)
    close(logs["loss"], math.log(2) + 0.5 * want)


class Copies(TorchDispatchMode):
    """Counts copies between devices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.count += any(isinstance(arg, torch.Tensor) and arg.device != result.device for arg in args)
        return result


@pytest.mark.parametrize("answers", ["a shared prompt", "texts"])
def test_tokens_are_counted_on_the_device(answers):
    """The host would wait for a copy of its own counts in each micro-batch."""
    pair = {"prompt_ids": [5, 6, 7], "chosen_ids": [8], "rejected_ids": [9, 4]}
    text = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    batch = Collator(layout="segments")([pair if answers == "a shared prompt" else text] * 2)
    logits = torch.zeros(batch.input_ids.numel(), 4)
    # A pair's prompt of 3 is in both sequences: 4 and 5 tokens. All experts are alike here.
    assert routing((logits,), batch, top_k=2).rows == (18 if answers == "a shared prompt" else 6)
    elsewhere, logits = batch.to("meta"), logits.to("meta")
    with Copies() as copies:
        routing((logits,), elsewhere, top_k=2)
    assert copies.count == 0


def test_a_head_of_its_own_is_balanced_too(tmp_path, tokenizer):
    lora = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    model = mixture()
    logs, _ = sft(model, tmp_path, tokenizer)
    for layout in ("rows", "segments"):
        own, _ = sft(model, tmp_path, tokenizer, peft_config=lora, layout=layout)
        close([own[name] for name in ("loss", "aux_loss")], [logs[name] for name in ("loss", "aux_loss")])


def test_on_policy_and_the_sampler(tmp_path, tokenizer):
    """Answers are sampled by the fast way as ever, and the step has the loss of both."""
    model = mixture()
    prompts = Dataset.from_list([{"prompt": "the cat"}, {"prompt": "a dog says"}])
    args = args_of(GRPOConfig, tmp_path, num_generations=2, max_completion_length=4, max_length=32)
    trainer = GRPOTrainer(
        model, reward_funcs=lambda completion_ids, **_: [float(ids[0]) for ids in completion_ids], args=args,
        train_dataset=prompts, processing_class=tokenizer,
    )  # fmt: skip
    logs, _ = one_step(trainer)
    assert trainer.aux_loss_enabled and logs["aux_loss"] > 1.5  # top-2 of 4 experts: 2 where all are alike
    engine = LocalEngine(model, tokenizer)
    prompt = [5, 6, 7]
    (completion,) = engine.generate([prompt], 1, Sampling(max_tokens=4), 0)[0]
    logits = model(input_ids=torch.tensor([prompt + completion.ids])).logits[0, 2:-1]
    taken = F.log_softmax(logits, -1)[range(len(completion.ids)), completion.ids]
    torch.testing.assert_close(torch.tensor(completion.logps), taken.detach(), rtol=1e-4, atol=1e-5)
    assert model.config.output_router_logits


def test_it_is_off_unless_asked(tmp_path, tokenizer):
    plain, _ = sft(mixture(output_router_logits=False), tmp_path, tokenizer)
    off, _ = sft(mixture(), tmp_path, tokenizer, router_aux_loss_coef=0.0)
    on, _ = sft(mixture(output_router_logits=False), tmp_path, tokenizer, router_aux_loss_coef=0.5)
    assert "aux_loss" not in plain and "aux_loss" not in off
    close(off["loss"], plain["loss"])
    close(on["loss"], plain["loss"] + 0.5 * on["aux_loss"])
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        sft(tiny_model("llama"), tmp_path, tokenizer, router_aux_loss_coef=0.1)


def test_who_balances_nothing_says_so(tmp_path, tokenizer, preference_rows):
    args = args_of(RewardConfig, tmp_path, router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="router_aux_loss_coef: this trainer"):
        RewardTrainer(tiny_model("llama"), args=args, train_dataset=preference_rows, processing_class=tokenizer)


def test_reentrant_checkpointing_would_lose_its_gradient(tmp_path, tokenizer):
    again = dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="the load-balancing loss of the routers would have no gradient"):
        SFTTrainer(
            mixture(), args_of(SFTConfig, tmp_path, **again), train_dataset=Dataset.from_dict({"input_ids": [[5, 6]]}),
            processing_class=tokenizer,
        )  # fmt: skip
