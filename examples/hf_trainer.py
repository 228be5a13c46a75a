"""A loss of ours inside transformers' own Trainer; accumulation does not change it.

python examples/hf_trainer.py
"""

import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from rlhf.losses import as_compute_loss, causal_lm_loss


def main(batch_size: int = 8, accumulation: int = 1, steps: int = 10) -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    ids = torch.randint(0, 64, (8, 12))
    labels = ids.clone()
    labels[:, 0] = -100  # nothing comes before the first token; transformers counts the others
    labels[::2, 6:] = -100
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=steps,
            learning_rate=3e-3, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        compute = as_compute_loss(causal_lm_loss, label_smoothing=0.1, z_loss=1e-4)
        trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=rows, compute_loss_func=compute)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
