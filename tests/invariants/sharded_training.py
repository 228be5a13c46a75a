"""Run by test_sharded.py under torchrun: whole trainings whose weights are sharded over two CPU processes.

accelerate shards over accelerators alone. That is patched away here, and nothing else: what is sharded, trained, saved
and resumed is accelerate's, torch's or DeepSpeed's own work.

    torchrun --nproc_per_node 2 sharded_training.py ddp|fsdp2|zero1|zero2|zero3 FOLDER CASES…
"""

import gc
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 3
SAVED_AT = 2


@dataclass(frozen=True)
class Case:
    """A training, in one process and in two.

    Args:
        trainer: the name of the trainer, without its last word.
        rows: a fixture of rows.
        model: a tiny model.
        options: of the trainer.
        lora: whether an adapter is trained.
        groups: ``parallelism_config`` of the run in several processes.
        processes: their number.
        resumes: the processes that go on from a checkpoint.
        slow: whether it runs among the slow tests alone.
    """

    trainer: str
    rows: str
    model: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    groups: dict[str, int] = field(default_factory=dict)
    processes: int = 2
    resumes: tuple[int, ...] = ()
    slow: bool = False


SHARED = {"cp_size": 2}
BALANCED = dict(router_aux_loss_coef=0.1)
CASES = {
    "sft": Case("SFT", "sft_rows", resumes=(2,)),
    "dpo": Case("DPO", "preference_rows", resumes=(1, 2)),
    "kto": Case("KTO", "unpaired_rows", "qwen2"),  # a head that is tied to the embeddings
    "reward": Case("Reward", "preference_rows"),
    "distill": Case("Distill", "sft_rows"),
    "sft, checkpointed activations": Case("SFT", "sft_rows", options=dict(activation_checkpointing=True), slow=True),
    "dpo, adapter": Case("DPO", "preference_rows", lora=True, slow=True),
    "dpo, stored reference": Case("DPO", "preference_rows", options=dict(precompute_ref_log_probs=True), slow=True),
    "mixture": Case("SFT", "sft_rows", "mixtral", BALANCED),
    "dpo, mixture": Case("DPO", "preference_rows", "qwen3_moe", BALANCED, slow=True),
    "vision tower": Case("SFT", "sft_rows", "gemma3", slow=True),
    "sft, adapter": Case("SFT", "sft_rows", lora=True, slow=True),
    "ppo": Case("PPO", "prompt_rows", slow=True),
    "ppo, critic": Case("PPO", "prompt_rows", options=dict(value_model="critic")),
    "shared sft": Case("SFT", "sft_rows", groups=SHARED, slow=True),
    "shared dpo": Case("DPO", "preference_rows", "mixtral", BALANCED, groups=SHARED),
    "shared kto": Case("KTO", "unpaired_rows", groups=SHARED, slow=True),
    "two copies of two shards": Case("DPO", "preference_rows", groups={"dp_replicate_size": 2}, processes=4, slow=True),
    "two batches for four": Case("SFT", "sft_rows", groups=SHARED, processes=4, slow=True),
}
OFFLOADED = ("kto",)  # with FSDP2: weights and optimizer in the memory of the CPU


def shard_on_cpus(kind: str) -> None:
    """Let accelerate shard over CPU processes; before anything makes a configuration."""
    import accelerate.state
    import torch
    from accelerate.utils import DistributedType

    if kind == "ddp":
        return  # accelerate knows it on CPUs
    if kind == "fsdp2":
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        }  # fmt: skip
        torch.distributed.init_process_group("gloo")
        torch.Tensor.pin_memory = lambda self, *args: self  # offloaded weights are pinned for an accelerator
    else:
        os.environ |= {
            "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": kind[-1], "DS_ACCELERATOR": "cpu",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        }  # fmt: skip
        import deepspeed.comm  # noqa: F401

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiles C++
    state = accelerate.state.PartialState
    state._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    state.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


class FirstPolicy:
    """An engine outside of the trainer that keeps the first weights, so that any number of processes sample alike."""

    version = 0

    def __init__(self, tokenizer) -> None:
        from conftest import tiny_model

        from rlhf.rollouts import LocalEngine

        self.engine = LocalEngine(tiny_model(), tokenizer)

    def generate(self, *args, **kwargs):
        return self.engine.generate(*args, **kwargs)

    def update_weights(self, weights, version: int) -> None:
        list(weights)  # each is gathered by all processes together

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def reward_letters(completions, **_):
    return [float(len(text) % 7) for text in completions]


def prompt_rows():
    from conftest import sentences
    from datasets import Dataset

    return Dataset.from_list([{"prompt": text} for text in sentences(1, 24)])


def make_trainer(name: str, folder: Path, tokenizer, processes: int, **changes):
    """A trainer of a tiny model; the same rows are in a step for any number of processes."""
    import conftest
    from peft import LoraConfig
    from world.families import tiny_family

    import rlhf

    os.environ["FSDP_OFFLOAD_PARAMS"] = "true" if name in OFFLOADED else "false"
    case = CASES[name]
    groups = case.groups if processes > 1 else {}
    options = dict(
        per_device_train_batch_size=4 * groups.get("cp_size", 1) // processes, max_steps=STEPS, logging_steps=1,
        save_steps=SAVED_AT, save_strategy="steps" if case.resumes else "no",
        report_to="none", disable_tqdm=True, learning_rate=1e-2, max_grad_norm=1.0,
        # Gradients that are nearly 0 come out of rounding, and Adam would magnify them.
        adam_epsilon=1e-3,
    )  # fmt: skip
    if case.trainer == "PPO":
        options |= dict(max_completion_length=8, max_length=64, beta=0.0, max_steps=2)
    if groups:
        options["parallelism_config"] = groups
    own = {"peft_config": LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0)} if case.lora else {}
    if case.trainer == "Distill":
        own["teacher_model"] = conftest.tiny_model(seed=1)
    if case.trainer == "PPO":
        own |= {"reward_funcs": reward_letters, "engine": FirstPolicy(tokenizer)}
        rows = prompt_rows()
    else:
        rows = getattr(conftest, case.rows).__wrapped__()
    if case.options.get("value_model"):
        changes["value_model"] = str(folder.parent / "critic")
    config = getattr(rlhf, f"{case.trainer}Config")(str(folder), **{**options, **case.options, **changes})
    model = tiny_family("gemma3") if case.model == "gemma3" else conftest.tiny_model(case.model)
    return getattr(rlhf, f"{case.trainer}Trainer")(
        model, args=config, train_dataset=rows, processing_class=tokenizer, **own
    )


def resumed(name: str, folder: Path, tokenizer, processes: int) -> list[float]:
    """The losses of a run that goes on from a checkpoint of another one."""
    place = folder / f"{name}-resumed-{processes}"
    trainer = make_trainer(name, place, tokenizer, processes, allow_changes=processes == 1)
    trainer.train(resume_from_checkpoint=str(folder / name / f"checkpoint-{SAVED_AT}"))
    trainer.save_model()
    return losses(trainer)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_all(folder: Path, tokenizer, names) -> dict[str, dict[str, list[float]]]:
    found = {}
    for name in names:
        trainer = make_trainer(name, folder / name, tokenizer, CASES[name].processes)
        trainer.train()
        trainer.save_model()
        found[name] = {"": losses(trainer)}
        if 2 in CASES[name].resumes:
            found[name]["-resumed-2"] = resumed(name, folder, tokenizer, 2)
    return found


def compare_references(folder: Path, tokenizer) -> None:
    """In bf16 too, stored log-probs are those of a reference in memory, to the last digit; DPO begins at log 2."""
    from transformers import training_args

    training_args.is_torch_bf16_gpu_available = lambda: True  # FSDP2 computes in bf16 on a CPU too
    found = {}
    for name in ("dpo", "dpo, adapter"):
        for stored in (False, True):
            changes = dict(bf16=True, max_steps=2, save_strategy="no", precompute_ref_log_probs=stored)
            trainer = make_trainer(name, folder / f"{name}-{stored}", tokenizer, 2, **changes)
            trainer.train()
            found[name, stored] = losses(trainer)
        assert found[name, True] == found[name, False], found
    assert abs(found["dpo", True][0] - math.log(2)) < 1e-7, found


def main() -> None:
    sharding, folder, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    shard_on_cpus(sharding)
    import torch.distributed as dist
    from transformers import AutoTokenizer

    if sharding == "fsdp2" and dist.get_world_size() == 2:
        from context_parallel import compare_context_parallel
        from sharded import compare

        compare()
        compare_context_parallel()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    if sharding == "fsdp2" and dist.get_world_size() == 2:
        compare_references(folder, tokenizer)
    found = train_all(folder, tokenizer, names)
    gc.collect()  # a model that still holds the group would abort at the interpreter's end
    is_first = dist.get_rank() == 0
    dist.barrier()
    dist.destroy_process_group()
    if not is_first:
        return
    # The same checkpoints, by one process.
    if sharding == "fsdp2":
        os.environ |= {"WORLD_SIZE": "1"}
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        for name in names:
            if 1 in CASES[name].resumes:
                found[name]["-resumed-1"] = resumed(name, folder, tokenizer, 1)
        gc.collect()
        dist.destroy_process_group()
    (folder / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
