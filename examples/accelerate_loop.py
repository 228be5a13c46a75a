"""A loss of ours under accelerate: gradient accumulation that divides by the tokens of the whole step.

python examples/accelerate_loop.py
accelerate launch --config_file configs/accelerate/two_cpu.yaml examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator, PartialState
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.losses import causal_lm_loss


def main(steps: int = 8) -> list[float]:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    rows = torch.randint(0, 64, (16, 12))
    rows[:, 6:] = torch.where(torch.rand(16, 1) < 0.5, rows[:, 6:], -100)  # answers of two lengths
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=2))
    losses = []
    for _ in range(steps):
        batches = list(loader)  # one step: all micro-batches of all processes
        count = accelerator.reduce(sum((labels[:, 1:] != -100).sum() for labels in batches))
        total = torch.zeros(())
        for labels in batches:
            logits = model(labels.clamp(min=0)).logits
            # Gradients are averaged over processes, so each adds its share times their number.
            loss = causal_lm_loss(logits, labels, num_items=count) * accelerator.num_processes
            accelerator.backward(loss)
            total += loss.detach() / accelerator.num_processes
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(total).item())
    # The process group is closed here, once DDP has let go of it: at the interpreter's exit its threads may abort.
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    found = main()
    if PartialState().is_main_process:
        print(f"{found[0]:.4f} -> {found[-1]:.4f}")
