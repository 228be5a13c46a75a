"""Run by test_sharded.py under torchrun: whole trainings whose weights are sharded over two CPU processes.

accelerate shards over accelerators alone. That is patched away here, and nothing else: what is sharded, trained, saved
and resumed is accelerate's, torch's or DeepSpeed's own work.

    torchrun --nproc_per_node 2 sharded_training.py fsdp2|zero2|zero3 FOLDER KINDS…
"""

import gc
import json
import os
import sys
from pathlib import Path

STEPS = 3
SAVED_AT = 2
KINDS = ("sft", "dpo", "kto", "reward", "distill")
IN_SHARDS = ("sft", "dpo")  # with FSDP2: checkpoints in shards, and whole ones for the others


def shard_on_cpus(kind: str) -> None:
    """Let accelerate shard over CPU processes; before anything makes a configuration."""
    import accelerate.state
    import torch
    from accelerate.utils import DistributedType

    if kind == "fsdp2":
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        }  # fmt: skip
        torch.distributed.init_process_group("gloo")
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


def make_trainer(kind: str, folder: Path, tokenizer, batch: int, **changes):
    """A trainer of a tiny model; the same rows are in a step for any number of processes."""
    from conftest import preference_rows, sft_rows, tiny_model, unpaired_rows

    import rlhf

    os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT" if kind in IN_SHARDS else "FULL_STATE_DICT"
    names = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward", "distill": "Distill"}
    rows = {"sft": sft_rows, "distill": sft_rows, "kto": unpaired_rows}.get(kind, preference_rows)
    config = getattr(rlhf, f"{names[kind]}Config")(
        str(folder), per_device_train_batch_size=batch, max_steps=STEPS, logging_steps=1, save_steps=SAVED_AT,
        report_to="none", disable_tqdm=True, learning_rate=1e-2, max_grad_norm=1.0,
        # Gradients that are nearly 0 come out of rounding, and Adam would magnify them.
        adam_epsilon=1e-3, **changes,
    )  # fmt: skip
    own = {"teacher_model": tiny_model(seed=1)} if kind == "distill" else {}
    model = tiny_model(
        "qwen2" if kind == "kto" else "llama"
    )  # a head that is tied to the embeddings, and one of its own
    return getattr(rlhf, f"{names[kind]}Trainer")(
        model, args=config, train_dataset=rows.__wrapped__(), processing_class=tokenizer, **own
    )


def resumed(kind: str, folder: Path, tokenizer, batch: int, name: str) -> list[float]:
    """The losses of a run that goes on from a checkpoint of another one."""
    trainer = make_trainer(kind, folder / f"{kind}-{name}", tokenizer, batch, allow_changes=name == "alone")
    trainer.train(resume_from_checkpoint=str(folder / kind / f"checkpoint-{SAVED_AT}"))
    trainer.save_model()
    return losses(trainer)


def first_loss_in_half_precision(folder: Path, tokenizer) -> float:
    """Of DPO with bf16 products, at the start; log 2, if policy and reference are computed alike."""
    import transformers.training_args

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # these CPUs stand for accelerators
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    trainer = make_trainer("dpo", folder / "half", tokenizer, 2, bf16=True, save_strategy="no")
    trainer.train()
    os.environ.pop("ACCELERATE_MIXED_PRECISION")
    return losses(trainer)[0]


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_all(folder: Path, tokenizer, kinds) -> dict[str, dict[str, list[float]]]:
    found = {}
    for kind in kinds:
        trainer = make_trainer(kind, folder / kind, tokenizer, 2)
        trainer.train()
        trainer.save_model()
        found[kind] = {"whole": losses(trainer), "resumed": resumed(kind, folder, tokenizer, 2, "resumed")}
    return found


def main() -> None:
    sharding, folder, kinds = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    shard_on_cpus(sharding)
    import torch.distributed as dist
    from transformers import AutoTokenizer

    if sharding == "fsdp2":
        from sharded import compare

        compare()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    found = train_all(folder, tokenizer, kinds)
    if sharding == "fsdp2":
        found["dpo"]["half"] = [first_loss_in_half_precision(folder, tokenizer)]
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
        for kind in kinds:
            found[kind]["alone"] = resumed(kind, folder, tokenizer, 4, "alone")
        gc.collect()
        dist.destroy_process_group()
    (folder / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
