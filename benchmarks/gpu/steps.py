"""Steps of SFT, DPO and GRPO as users start them, beside TRL's on the same rows: time, memory, share of the ceiling."""

import copy
import importlib
import importlib.util
import itertools
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.gpu.measuring import Results, Row, Setup, llama, peak_gib, product_tflops, reset_peak, shape_of_1b, wait
from benchmarks.gpu.training import make_trainer, rows_of_words, tokenizer, train

TITLE = "Steps of a model of 1B parameters: float32 weights, bf16"
SIDES = ("rlhf", "trl")
# Products with each weight: a forward pass is 2 operations for a token, a backward pass 4, DPO's reference 2 more.
OPERATIONS = {"sft": 6, "dpo": 8}


class Clock(TrainerCallback):
    """Times steps, and lists the places where the host waits for the device in the last one."""

    def __init__(self, setup: Setup, steps: int) -> None:
        self.setup = setup
        self.steps = steps
        self.seconds: list[float] = []
        self.waits: Counter[str] = Counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait(self.setup)
        self.watches = self.setup.on_gpu and state.global_step == self.steps - 1
        if self.watches:
            self.caught = warnings.catch_warnings(record=True)
            self.messages = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.watches:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            for message in self.messages or ():
                if "synchroniz" in str(message.message):
                    self.waits[f"{Path(message.filename).name}:{message.lineno}"] += 1
        wait(self.setup)
        self.seconds.append(time.perf_counter() - self.start)


def measure(setup: Setup) -> Results:
    results = Results(setup)
    for kind, side in itertools.product(("sft", "dpo", "grpo"), SIDES):
        has_side = importlib.util.find_spec(side) is not None
        # TRL's GRPO takes minutes where Triton interprets its kernels.
        if has_side and not (side == "trl" and kind == "grpo" and not setup.on_gpu):
            results.measure({"step": kind, "side": side}, _train, setup, kind, side)
    return results


def _train(setup: Setup, kind: str, side: str) -> Row:
    steps, size, words = (3, 4, (4, 12)) if setup.tiny else (6, 16, (40, 160))
    model = llama(setup, torch.float32, **shape_of_1b(setup, len(tokenizer())))
    clock = Clock(setup, steps)
    trainer = make_trainer(
        setup, importlib.import_module(side), kind, model, rows_of_words(kind, steps * size, words),
        max_steps=steps, per_device_train_batch_size=size, learning_rate=1e-6, bf16=setup.on_gpu, callbacks=[clock],
        **_options(setup, kind, side, model),
    )  # fmt: skip
    reset_peak(setup)
    train(trainer)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    # The first steps allocate memory and choose kernels.
    seconds = statistics.median(clock.seconds[2:])
    row = {
        "ms": seconds * 1e3,
        "peak GiB": peak_gib(setup),
        "loss": [round(entry["loss"], 4) for entry in log[:2]],
        "waits": sum(clock.waits.values()),
        "where": ", ".join(f"{place} × {count}" for place, count in clock.waits.most_common(4)),
    }
    if kind in OPERATIONS and side == "rlhf":
        tokens = (log[-1]["num_tokens"] - log[1]["num_tokens"]) / (len(log) - 2)
        # Embeddings are read, not multiplied; a tied head is multiplied. Attention is left out: a few percent.
        embeddings = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
        parameters = sum(parameter.numel() for parameter in model.parameters()) - embeddings
        tflops = OPERATIONS[kind] * parameters * tokens / seconds / 1e12
        row |= {"tokens/s": tokens / seconds, "of the ceiling": tflops / product_tflops(setup, torch.bfloat16)}
    return row


def _options(setup: Setup, kind: str, side: str, model: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"max_length": 1024}
    if kind == "dpo":
        options |= {"ref_model": copy.deepcopy(model), "precompute_ref_log_probs": False}
    if kind == "grpo":
        options = {
            "num_generations": 4, "max_completion_length": 16 if setup.tiny else 128, "beta": 0.0,
            "reward_funcs": lambda completions, **_: [float(len(text) % 7) for text in completions],
        }  # fmt: skip
    if side == "trl":
        options["gradient_checkpointing"] = False
    return options
