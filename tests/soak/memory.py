"""Memory over a long run: a line for every so many steps, so that one sees whether it levels off.

    PYTHONPATH=.:tests python tests/soak/memory.py --steps 6000 --every 500
    PYTHONPATH=.:tests python tests/soak/memory.py --model SmolLM2-135M-Instruct --words 400 --steps 200 --every 20

Batches have many lengths, as those of real rows do. torch's environment is that of the commands, and a variable that is
set stays: `ONEDNN_PRIMITIVE_CACHE_CAPACITY=1024 LRU_CACHE_CAPACITY=1024` are torch's own bounds.
`--command grpo` samples completions in each step.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from conftest import sentences, tiny_model, tokenizer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rlhf import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from rlhf.cli.main import TORCH_ENVIRONMENT


class Recorder(TrainerCallback):
    """Prints resident memory, open files, and the processor time of a step."""

    def __init__(self, every: int) -> None:
        self.every, self.begin = every, time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        seconds = (time.process_time() - self.begin) / self.every
        open_files = len(os.listdir("/proc/self/fd"))
        print(f"{state.global_step:7} {megabytes:8.0f} MiB {open_files:4} files {seconds * 1000:9.2f} ms", flush=True)
        self.begin = time.process_time()


def train(args: argparse.Namespace, output: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32") if args.model else tiny_model()
    words = AutoTokenizer.from_pretrained(args.model) if args.model else tokenizer.__wrapped__()
    prompts = sentences(1, 4096, 3, 12)
    answers = sentences(2, 4096, 3, args.words)
    options = dict(
        max_steps=args.steps, per_device_train_batch_size=args.batch, logging_steps=args.every, save_strategy="no",
        learning_rate=1e-5, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    common: dict[str, Any] = dict(model=model, processing_class=words, callbacks=[Recorder(args.every)])
    if args.command == "sft":
        rows = [{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in zip(prompts, answers, strict=True)]
        SFTTrainer(train_dataset=Dataset.from_list(rows), args=SFTConfig(output, **options), **common).train()
        return
    rows = [{"prompt": prompt} for prompt in prompts]
    config = GRPOConfig(output, max_length=128, max_completion_length=args.words, num_generations=2, **options)
    GRPOTrainer(train_dataset=Dataset.from_list(rows), args=config, reward_funcs=[_length], **common).train()


def _length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", choices=("sft", "grpo"), default="sft")
    parser.add_argument("--model", help="folder of a checkpoint; by default one of 40,000 weights")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--words", type=int, default=40, help="the longest answer")
    args = parser.parse_args()
    for variable, value in TORCH_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    print({variable: os.environ[variable] for variable in TORCH_ENVIRONMENT})
    with tempfile.TemporaryDirectory() as output:
        train(args, output)


if __name__ == "__main__":
    main()
