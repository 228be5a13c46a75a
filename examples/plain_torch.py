"""Our losses in a plain torch loop: fine-tune with z-loss, then align with DPO on log-probs of whole answers.

python examples/plain_torch.py
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.losses import causal_lm_loss, dpo_loss, perplexity, sequence_logps


def main(steps: int = 40) -> dict[str, float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    good = torch.randint(0, 32, (8, 12))  # eight "answers" to imitate
    bad = torch.randint(32, 64, (8, 12))
    good[:, :3] = bad[:, :3] = torch.randint(0, 32, (8, 3))  # after the same prompts
    labels = [ids.clone() for ids in (good, bad)]
    for own in labels:
        own[:, :3] = -100  # prompts are not scored

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = perplexity(model(good).logits, labels[0]).item()
    for _ in range(steps):
        loss = causal_lm_loss(model(good).logits, labels[0], z_loss=1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = perplexity(model(good).logits, labels[0]).item()

    reference = copy.deepcopy(model).eval().requires_grad_(False)
    ids, both = torch.cat([good, bad]), torch.cat(labels)
    chosen, rejected = torch.arange(8), torch.arange(8, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(steps):
        ref_logps = sequence_logps(reference(ids).logits, both)
        loss = dpo_loss(sequence_logps(model(ids).logits, both), ref_logps, chosen, rejected, beta=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"perplexity before": before, "perplexity after": after, "DPO loss": loss.item()}


if __name__ == "__main__":
    print(main())
