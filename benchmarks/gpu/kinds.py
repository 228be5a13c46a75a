"""Ways to run SFT: precisions, adapters, compiling, checkpointing, accumulation, resuming."""

import importlib.util
from typing import Any

import torch

from benchmarks.gpu.measuring import Results, Row, Setup, llama
from benchmarks.gpu.training import make_trainer, rows_of_words, tokenizer, train

TITLE = "Ways to run: three steps of SFT of a small model"
STEPS = 3
# Name, weights, options. All but the last digits of bf16 should agree with the first.
ANYWHERE: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("float32", torch.float32, {}),
    ("float32 once more", torch.float32, {}),
    ("bf16 weights", torch.bfloat16, {}),
    ("padded rows", torch.float32, {"layout": "rows"}),
    ("two micro-batches", torch.float32, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    ("activation checkpointing", torch.float32, {"activation_checkpointing": True}),
    ("LoRA on bf16 weights", torch.bfloat16, {"lora": True}),
]
ON_A_GPU: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("--bf16", torch.float32, {"bf16": True}),
    ("--fp16", torch.float32, {"fp16": True}),
    ("--bf16, checkpointing", torch.float32, {"bf16": True, "activation_checkpointing": True}),
    ("--bf16, LoRA on bf16 weights", torch.bfloat16, {"bf16": True, "lora": True}),
    ("--bf16, compiled, padded rows", torch.float32, {"bf16": True, "torch_compile": True, "layout": "rows"}),
    ("--bf16, compiled, segments", torch.float32, {"bf16": True, "torch_compile": True, "layout": "segments"}),
]


def measure(setup: Setup) -> Results:
    results = Results(setup)
    for name, weights, options in ANYWHERE + (ON_A_GPU if setup.on_gpu else []):
        results.measure({"way": name}, _train, setup, weights, options)
    results.measure({"way": "resumed after two steps"}, _resumed, setup)
    if importlib.util.find_spec("bitsandbytes") is not None and setup.on_gpu:
        results.measure({"way": "--bf16, QLoRA in 4 bits"}, _quantised, setup)
    return results


def _model(setup: Setup, weights: torch.dtype) -> Any:
    shape = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, vocab_size=len(tokenizer()))
    return llama(setup, weights, **shape)


def _trainer(setup: Setup, model: Any, lora: bool = False, **options: Any) -> Any:
    import rlhf

    if lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0)
    defaults = dict(max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-3, bf16=False)
    return make_trainer(setup, rlhf, "sft", model, rows_of_words("sft", 4 * STEPS, (4, 40)), **(defaults | options))


def _figures(trainer: Any) -> Row:
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "layout": trainer.data_collator.layout,
        "losses": ", ".join(f"{entry['loss']:.5f}" for entry in log),
        "gradient norms": ", ".join(f"{entry['grad_norm']:.4f}" for entry in log),
    }


def _train(setup: Setup, weights: torch.dtype, options: dict[str, Any]) -> Row:
    trainer = _trainer(setup, _model(setup, weights), **options)
    train(trainer)
    return _figures(trainer)


def _resumed(setup: Setup) -> Row:
    options = {"save_strategy": "steps", "save_steps": 2}
    first = _trainer(setup, _model(setup, torch.float32), **options)
    train(first)
    again = _trainer(setup, _model(setup, torch.float32), **options, output_dir=first.args.output_dir)
    train(again, resume_from_checkpoint=str(first.args.output_dir) + "/checkpoint-2")
    return _figures(again)


def _quantised(setup: Setup) -> Row:
    import tempfile

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tempfile.mkdtemp()
    _model(setup, torch.bfloat16).save_pretrained(folder)
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=in_4_bits, dtype=torch.bfloat16)
    trainer = _trainer(setup, model, lora=True, bf16=True)
    train(trainer)
    return _figures(trainer)
