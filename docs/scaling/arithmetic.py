"""The arithmetic of docs/scaling/README.md: memory, communication, rollouts and checkpoints of a run on many GPUs.

    python docs/scaling/arithmetic.py           # prints the tables of the page
    python docs/scaling/arithmetic.py --write   # and writes them into it

All times are seconds, all sizes bytes, of one GPU unless a name says otherwise.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("README.md")
MARKS = "<!-- tables -->\n", "<!-- end of tables -->\n"
GIB = 2**30


@dataclass(frozen=True)
class Model:
    """A dense decoder such as Llama 3.

    Args:
        name: for the tables.
        parameters: of all weights.
        layers: decoder layers.
        hidden: size of the hidden states.
        kv_size: size of the keys of one token in one layer; the values have as much.
        vocabulary: tokens; the head is a matrix of its own.
    """

    name: str
    parameters: float
    layers: int
    hidden: int
    kv_size: int
    vocabulary: int = 128_256

    @property
    def layer_parameters(self) -> float:
        """Of one decoder layer."""
        return (self.parameters - 2 * self.vocabulary * self.hidden) / self.layers


@dataclass(frozen=True)
class Machine:
    """What a GPU and its connections give: the page says which figures are measured, and which assumed.

    Args:
        matmul: floating-point operations a second of a large bf16 product.
        memory_bandwidth: bytes a second, read and written, of a large copy.
        utilization: share of ``matmul`` that a training step reaches, communication apart.
        memory: bytes.
        within_node: bytes a second to and from the other GPUs of a node.
        between_nodes: bytes a second to and from other nodes, by the adapter of one GPU.
        host: bytes a second between a GPU and ordinary (pageable) memory of its host.
        file_system: bytes a second that all nodes together write to the shared file system.
        hours_between_failures: of one GPU. 419 interruptions in 54 days of 16,384 GPUs (arXiv 2407.21783, table 5).
        decoding_efficiency: share of ``memory_bandwidth`` that a server reaches while it samples.
    """

    matmul: float = 786e12
    memory_bandwidth: float = 4.3e12
    utilization: float = 0.41
    memory: float = 139 * GIB
    within_node: float = 300e9
    between_nodes: float = 40e9
    host: float = 12e9
    file_system: float = 20e9
    hours_between_failures: float = 54 * 24 * 16_384 / 419
    decoding_efficiency: float = 0.6


@dataclass(frozen=True)
class Run:
    """A run of GRPO.

    Args:
        gpus: in all, eight a node.
        model: that is trained.
        shards: GPUs that share one copy of weights, gradients and optimizer state.
        gpus_of_server: that hold one copy of the model in a server.
        micro_rows: completions of a micro-batch of one GPU.
        rows: completions of a step.
        prompt: tokens of a prompt.
        completion: tokens of a completion.
        concurrent: completions that one server samples at a time.
    """

    gpus: int
    model: Model
    shards: int
    gpus_of_server: int
    micro_rows: int
    rows: int
    prompt: int
    completion: int
    concurrent: int

    @property
    def length(self) -> int:
        """Tokens of a prompt and its completion, both as long as they may be."""
        return self.prompt + self.completion

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch of one GPU."""
        return self.micro_rows * self.length


LLAMA_8B = Model("8B", 8.03e9, 32, 4096, 1024)
LLAMA_70B = Model("70B", 70.6e9, 80, 8192, 1024)
LLAMA_405B = Model("405B", 405.9e9, 126, 16_384, 1024)
RUNS = (
    Run(8, LLAMA_8B, 2, 1, 8, 576, 512, 2048, 288),
    Run(64, LLAMA_70B, 16, 4, 4, 1152, 512, 4096, 144),
    Run(512, LLAMA_70B, 16, 4, 4, 10_752, 512, 4096, 144),
    Run(512, LLAMA_405B, 128, 8, 2, 3072, 512, 4096, 96),
)


# Memory


def memory(model: Model, shards: int, tokens: int) -> dict[str, float]:
    """What training holds on one GPU under FSDP2, with activation checkpointing.

    Args:
        model: that is trained.
        shards: GPUs that share the weights.
        tokens: of a micro-batch.

    Returns:
        Bytes, by part.
    """
    embedding = model.vocabulary * model.hidden
    return {
        # float32: weights, gradients, and two moments of Adam.
        "weights, gradients, Adam": 16 * model.parameters / shards,
        # bf16: the layer that is computed and the next one; embedding and head stay through a step.
        "gathered weights": 2 * (2 * model.layer_parameters + 2 * embedding),
        # The gradients of a layer and of the head, before they are summed over the GPUs.
        "whole gradients": 4 * max(model.layer_parameters, embedding),
        # bf16: the input of each layer; and about 34 numbers for each hidden unit of a token in the layer that is
        # computed again (arXiv 2205.05198, equation 2, without dropout and without stored scores).
        "activations": 2 * tokens * model.hidden * (model.layers + 17),
        # A chunk of logits, float32, and its gradient.
        "logits": 2 * 2**30,
    }


# Training


def training_flops(model: Model, tokens: float, length: float) -> float:
    """Operations of forward and backward, without those that checkpointing repeats.

    Args:
        model: that is trained.
        tokens: of all sequences.
        length: of a sequence.

    Returns:
        Floating-point operations.
    """
    # Two for a weight forward and four backward; attention reads half of the earlier tokens on average.
    return tokens * (6 * model.parameters + 6 * model.layers * model.hidden * length)


def compute_seconds(run: Run, machine: Machine) -> float:
    """Of a micro-batch on one GPU; checkpointing computes the forward pass twice."""
    flops = training_flops(run.model, run.micro_tokens, run.length)
    return flops * 4 / 3 / (machine.matmul * machine.utilization)


def collective_rate(run: Run, machine: Machine) -> float:
    """Bytes a second that each GPU gets while the GPUs of one copy gather weights, all at the same time."""
    if run.shards <= 8:
        return machine.within_node
    # A ring for each GPU of a node: what enters a node comes by all eight adapters, and goes on within the node.
    return min(machine.within_node, 8 * machine.between_nodes)


def communication_seconds(run: Run, machine: Machine) -> float:
    """Of a micro-batch: weights are gathered twice in bf16, gradients are summed once in float32."""
    moved = (2 * 2 + 4) * run.model.parameters * (1 - 1 / run.shards)
    return moved / collective_rate(run, machine)


def least_tokens(run: Run, machine: Machine) -> float:
    """Tokens of a micro-batch from which on communication can hide behind the arithmetic."""
    return run.micro_tokens * communication_seconds(run, machine) / compute_seconds(run, machine)


def micro_seconds(run: Run, machine: Machine) -> float:
    """Of a micro-batch: the longer of the two, as they overlap."""
    return max(compute_seconds(run, machine), communication_seconds(run, machine))


# Rollouts


def decoding_seconds(run: Run, machine: Machine) -> float:
    """Of one token of each concurrent completion of a server: weights and keys and values are read once."""
    model = run.model
    length = run.prompt + run.completion / 2  # on average over a completion
    cache = run.concurrent * length * 2 * 2 * model.kv_size * model.layers
    read = (2 * model.parameters + cache) / run.gpus_of_server
    # Two operations a weight and token. The larger of the two times: reading and arithmetic overlap.
    arithmetic = 2 * model.parameters * run.concurrent / run.gpus_of_server / (machine.matmul * machine.utilization)
    return max(read / (machine.memory_bandwidth * machine.decoding_efficiency), arithmetic)


def cache_fits(run: Run, machine: Machine) -> bool:
    """Whether weights and the keys and values of all concurrent completions fit into a server, a tenth left free."""
    model = run.model
    cache = run.concurrent * run.length * 2 * 2 * model.kv_size * model.layers
    return 2 * model.parameters + cache <= 0.9 * machine.memory * run.gpus_of_server


@dataclass(frozen=True)
class Split:
    """GPUs of a run of GRPO that train and that sample, and what each of them takes for a step."""

    trainers: int
    servers: int
    training: float
    sampling: float
    update: float

    @property
    def one_after_the_other(self) -> float:
        """Seconds of a step that waits for its rollout."""
        return self.training + self.sampling + self.update

    @property
    def overlapped(self) -> float:
        """Seconds of a step while the next rollout is sampled. New weights are sent between two rollouts."""
        return max(self.training, self.sampling) + self.update


def split(run: Run, machine: Machine, trainers: int) -> Split:
    """A run with a number of GPUs that train; the others sample."""
    servers = (run.gpus - trainers) // run.gpus_of_server
    micros = math.ceil(run.rows / (trainers * run.micro_rows))
    copies = trainers // run.shards
    # Copies of the sharded model sum the gradients of a step once, in float32.
    between_copies = 0.0 if copies < 2 else 2 * 4 * run.model.parameters / run.shards / machine.between_nodes
    # The log-probs of the policy before a step are a forward pass more, a third of forward and backward.
    training = micros * micro_seconds(run, machine) * 4 / 3 + between_copies
    waves = math.ceil(run.rows / (servers * run.concurrent))
    sampling = waves * run.completion * decoding_seconds(run, machine)
    return Split(trainers, servers, training, sampling, update_seconds(run, machine, servers))


def best_split(run: Run, machine: Machine) -> Split:
    """The split of the shortest step, with rollouts ahead of training."""
    choices = range(run.shards, run.gpus - run.gpus_of_server + 1, run.shards)
    return min((split(run, machine, trainers) for trainers in choices), key=lambda found: found.overlapped)


# New weights for the servers


def server_link(run: Run, machine: Machine) -> float:
    """Bytes a second from one GPU that trains to the GPUs of a server."""
    return machine.within_node if run.gpus <= 8 else machine.between_nodes


def update_seconds(run: Run, machine: Machine, servers: int) -> float:
    """New weights for all servers, as the code sends them.

    The first process gathers float32 weights into the memory of its host. Then it copies them to its GPU and broadcasts
    them, for each server anew.
    """
    size = 4 * run.model.parameters
    gathering = size * (1 - 1 / run.shards) / collective_rate(run, machine) + size / machine.host
    return gathering + servers * (size / machine.host + size / server_link(run, machine))


def one_group_seconds(run: Run, machine: Machine) -> float:
    """New weights in bf16, from the GPUs that train and without their hosts, once to all servers: not in the code."""
    return 2 * run.model.parameters * (1 / collective_rate(run, machine) + 1 / server_link(run, machine))


# Checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A distributed checkpoint: each GPU of one copy writes its shard.

    Args:
        size: weights and two moments of Adam, float32.
        seconds: to write it.
        interval: seconds between two of them that lose least time.
        lost: share of the time that writing them and going on after failures takes.
    """

    size: float
    seconds: float
    interval: float
    lost: float


def checkpoint(run: Run, machine: Machine) -> Checkpoint:
    """The best interval is sqrt(2 x time to write x time between failures): Young, CACM 1974, equation 2."""
    size = 12 * run.model.parameters
    seconds = size / machine.file_system
    between_failures = machine.hours_between_failures * 3600 / run.gpus
    interval = math.sqrt(2 * seconds * between_failures)
    # Writing, and half an interval with one read of the checkpoint at each failure.
    lost = seconds / interval + (interval / 2 + seconds) / between_failures
    return Checkpoint(size, seconds, interval, lost)


# The page


def rows(header: list[str], lines: list[list[str]]) -> str:
    """A table of Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]) + "\n"


def name_of(run: Run) -> str:
    """How a run is called in the tables."""
    return f"{run.gpus} GPUs, {run.model.name}"


def memory_table(machine: Machine) -> str:
    lines = []
    for run in RUNS:
        parts = memory(run.model, run.shards, run.micro_tokens)
        gib = [f"{size / GIB:.1f}" for size in parts.values()]
        total = sum(parts.values())
        lines.append([name_of(run), str(run.shards), *gib, f"**{total / GIB:.0f}**", f"{total / machine.memory:.0%}"])
    header = ["run", "shards", *memory(LLAMA_8B, 8, 1), "sum", "of the GPU"]
    return rows(header, lines)


def training_table(machine: Machine) -> str:
    lines = []
    for run in RUNS:
        arithmetic, moved = compute_seconds(run, machine), communication_seconds(run, machine)
        needed = f"{least_tokens(run, machine):,.0f}"
        lines.append([name_of(run), f"{run.micro_tokens:,}", f"{arithmetic:.2f}", f"{moved:.2f}", needed])
    return rows(["run", "tokens", "arithmetic, s", "communication, s", "tokens that hide it"], lines)


def split_table(machine: Machine) -> str:
    lines = []
    for run in RUNS:
        found = best_split(run, machine)
        assert cache_fits(run, machine)
        gain = found.one_after_the_other / found.overlapped
        parts = [found.training, found.sampling, found.update]
        shape = [str(found.trainers), f"{found.servers} of {run.gpus_of_server}"]
        seconds = [f"{part:.1f}" for part in parts]
        one_group = f"{one_group_seconds(run, machine):.1f}"
        step = f"**{found.overlapped:.0f}**"
        lines.append([name_of(run), f"{run.rows:,}", *shape, *seconds, step, f"{gain:.2f}x", one_group])
    header = ["run", "rows", "train", "servers, GPUs", "training, s", "sampling, s", "weights, s", "step, s"]
    return rows([*header, "rollouts ahead gain", "weights in one group, s"], lines)


def checkpoint_table(machine: Machine) -> str:
    lines = []
    for run in RUNS:
        found = checkpoint(run, machine)
        shard = found.size / run.shards / GIB
        times = [f"{found.seconds:.0f}", f"{found.interval / 60:.0f}", f"{found.lost:.2%}"]
        lines.append([name_of(run), f"{found.size / GIB:,.0f}", f"{shard:.1f}", *times])
    return rows(["run", "GiB", "GiB a GPU", "to write, s", "best interval, min", "time lost"], lines)


def tables(machine: Machine) -> str:
    """All tables of the page."""
    return "\n".join(
        [
            "### Memory of one GPU that trains, GiB\n",
            memory_table(machine),
            "### A micro-batch\n",
            training_table(machine),
            "### A step of GRPO\n",
            split_table(machine),
            "### Checkpoints\n",
            checkpoint_table(machine),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables into the page")
    found = tables(Machine())
    if not parser.parse_args().write:
        print(found)
        return
    before, rest = PAGE.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n{found}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
