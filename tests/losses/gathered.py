"""Run by test_representation.py under torchrun."""

import torch
import torch.distributed as dist

from rlhf.losses import info_nce_loss


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(4 * size, 5, generator=g, dtype=torch.float64) for _ in range(2))
    whole_q, whole_k = q.clone().requires_grad_(), k.clone().requires_grad_()
    info_nce_loss(whole_q, whole_k, temperature=0.2).backward()
    own = slice(4 * rank, 4 * rank + 4)
    part_q, part_k = q[own].clone().requires_grad_(), k[own].clone().requires_grad_()
    (info_nce_loss(part_q, part_k, temperature=0.2, gather=True) / size).backward()
    torch.testing.assert_close(part_q.grad, whole_q.grad[own])
    torch.testing.assert_close(part_k.grad, whole_k.grad[own])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
