"""Measure the constants of arithmetic.py on these processes, and compare its prediction with a real micro-batch.

    torchrun --nproc_per_node 2 docs/scaling/measure.py              # two GPUs of one node
    torchrun --nnodes 2 --nproc_per_node 1 … docs/scaling/measure.py  # one GPU in each of two nodes
    torchrun --nproc_per_node 2 docs/scaling/measure.py --tiny       # anywhere, to see that it runs

The model has the layers of Llama-3.2-1B. Its weights are sharded by FSDP2 over all processes.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from arithmetic import Machine, Model, Run, communication_seconds, training_flops
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.data import Collator
from rlhf.logprobs import TokenLoss
from rlhf.models import Policy, use_segments


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The median time of some work that all processes do."""
    work()
    times = []
    for _ in range(repeats):
        wait(device)
        dist.barrier()
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait(device: torch.device) -> None:
    """Until all that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_machine(device: torch.device, size: int) -> Machine:
    """The rates of matrix products, copies and communication; the link is that of a ring over all processes.

    Args:
        device: of this process.
        size: rows and columns of a matrix.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    matmul = 2 * size**3 / seconds(lambda: left @ right, device)
    copied = torch.empty_like(left)
    bandwidth = 2 * left.nbytes / seconds(lambda: copied.copy_(right), device)
    processes = dist.get_world_size()
    whole = torch.empty(processes * left.numel(), device=device, dtype=dtype)
    gather = seconds(lambda: dist.all_gather_into_tensor(whole, left.view(-1)), device)
    # A process receives the parts of all others.
    link = left.nbytes * (processes - 1) / gather
    on_host = torch.empty(left.shape, dtype=dtype)  # not pinned, as gathered weights are
    host = left.nbytes / seconds(lambda: left.copy_(on_host), device)
    return Machine(matmul=matmul, memory_bandwidth=bandwidth, within_node=link, between_nodes=link, host=host)


def micro_batch(policy: Policy, length: int, rows: int, device: torch.device) -> Callable[[], object]:
    """Forward and backward of rows of random tokens."""
    vocabulary = policy.config.vocab_size
    draws = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(3, vocabulary, (rows, length), generator=draws).tolist()
    batch = Collator(layout="segments")([{"input_ids": row, "labels": row} for row in ids]).to(device)
    loss = TokenLoss(lambda scores: -scores.logps)

    def work() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            scores = policy(batch, loss)
        scores.loss.backward()
        policy.zero_grad(set_to_none=True)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small matrices and a small model")
    tiny = parser.parse_args().tiny
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if has_gpu else "gloo")
    machine = measured_machine(device, 512 if tiny else 8192)

    hidden, layers, vocabulary = (256, 4, 4096) if tiny else (2048, 16, 128_256)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 256, 1), vocab_size=vocabulary,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        policy = Policy(LlamaForCausalLM(config))
    use_segments(policy.model)
    parameters = sum(weight.numel() for weight in policy.parameters())
    length, rows = (64, 4) if tiny else (2048, 8)
    alone = seconds(micro_batch(policy, length, rows, device), device, repeats=3)

    precision = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32) if has_gpu else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in policy.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    sharded = seconds(micro_batch(policy, length, rows, device), device, repeats=3)

    model = Model("measured", parameters, layers, hidden, config.num_key_value_heads * config.head_dim, vocabulary)
    run = Run(dist.get_world_size(), model, dist.get_world_size(), 1, rows, rows, 0, length, 1)
    flops = training_flops(model, run.micro_tokens, length)
    machine = replace(machine, utilization=flops / alone / machine.matmul)
    moved = communication_seconds(run, machine)
    if dist.get_rank() == 0:
        bandwidths = {"copy": machine.memory_bandwidth, "link": machine.within_node, "host": machine.host}
        rates = {"TFLOP/s": machine.matmul / 1e12, "utilization": machine.utilization}
        rates |= {f"{name} GB/s": rate / 1e9 for name, rate in bandwidths.items()}
        times = {"alone": alone, "communication": moved, "predicted": max(alone, moved), "measured": sharded}
        print(json.dumps({name: float(f"{value:.4g}") for name, value in (rates | times).items()}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
