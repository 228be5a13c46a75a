"""Where the time of a step goes (``profile=N``): torch's profiler, with a label around each part of a step."""

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.profiler import profile, record_function
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.kernels.peak import measure_peak
from rlhf.logprobs.head import backbone_of
from rlhf.models.flops import Flops, batch_flops
from rlhf.models.policy import Policy, Wrapper
from rlhf.trainers.compiling import CompiledTrainer

WARM_UP = 2  # steps that are not timed: memory is allocated and kernels are chosen in them
# "head" is the head and the loss computed with it. "step" is all that has no other label.
LABELS = ("data", "rollout", "reference", "forward", "head", "loss", "backward", "optimizer", "step")
PREFIX = "rlhf."


class Profiler(TrainerCallback):
    """Times ``args.profile`` steps after the first two, prints the share of each part, and writes two files.

    ``profile.json`` in ``output_dir`` has the seconds; ``trace.json`` has every operation, for a viewer such as
    Perfetto. No number of the run changes. A label waits for the device where it begins and ends, so that what was
    queued counts where it was queued; these steps are a little slower than others.

    Args:
        args: a trainer's arguments: ``profile``, ``output_dir`` and ``device`` are read.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.steps_done = self.tokens = 0
        self.flops = Flops()  # of the steps that are timed
        self.weights_dtype = torch.float32  # of the model that was run last
        self.profile: Any = None
        self.step: ExitStack | None = None  # labels that last until the end of the step; None between steps
        self.recording = ExitStack()  # the profiler and its hooks, while steps are timed
        self.running: list[tuple[nn.Module, ExitStack]] = []  # modules whose forward runs now, with their labels

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """A part of a step. Parts may lie in one another: time counts for the innermost.

        Args:
            name: one of :data:`LABELS`. "data" begins a step.
        """
        if name == "data" and self.profile is not None and self.step is None:
            self.step = ExitStack()
            self.step.enter_context(record_function(f"{PREFIX}step"))
        # Evaluation and saving are between steps, and count for none.
        if self.step is None:
            yield
            return
        self._wait_for_device()
        with record_function(PREFIX + name):
            yield
            self._wait_for_device()

    def _wait_for_device(self) -> None:
        if self.args.device.type != "cpu":
            torch.accelerator.synchronize(self.args.device)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.step is not None:
            self.step.enter_context(self.label("optimizer"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps_done += 1
        if self.step is not None:
            self.step.close()
            self.step = None
        if self.steps_done == WARM_UP:
            self._start()
        elif self.steps_done == WARM_UP + self.args.profile:
            self._report()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.steps_done <= WARM_UP:
            self.recording.close()
            print(f"profile: training ended at step {self.steps_done}, and the first {WARM_UP} are not timed")
        elif self.profile is not None:
            self._report()

    def _start(self) -> None:
        # Hooks of all modules, as the profiler knows neither the policy nor its reference.
        self.recording.enter_context(global_hooks.register_module_forward_pre_hook(self._enter_module))
        self.recording.enter_context(global_hooks.register_module_forward_hook(self._leave_module, always_call=True))
        self.profile = self.recording.enter_context(profile())

    def _enter_module(self, module: nn.Module, inputs: Any) -> None:
        name = self._label_of(module)
        if self.step is None or name is None:
            return
        if name == "head":
            self.tokens += inputs[0].input_ids.numel()
        if isinstance(module, Wrapper):
            self.flops += batch_flops(
                module.without_adapter, inputs[0], with_head=isinstance(module, Policy), with_gradient=name == "head"
            )
            self.weights_dtype = module.dtype
        labels = ExitStack()
        labels.enter_context(self.label(name))
        self.running.append((module, labels))

    def _label_of(self, module: nn.Module) -> str | None:
        needs_grad = torch.is_grad_enabled()
        if isinstance(module, Wrapper):
            # Without a gradient a policy is only asked, as a reference or a teacher. With one, all that it does
            # outside its backbone belongs to the head.
            return "head" if needs_grad else "reference"
        policy = self.running[-1][0] if self.running else None
        is_backbone = isinstance(policy, Wrapper) and module is backbone_of(policy.without_adapter)
        return "forward" if needs_grad and is_backbone else None

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.running and self.running[-1][0] is module:
            self.running.pop()[1].close()

    def _report(self) -> None:
        self.recording.close()
        steps = self.steps_done - WARM_UP
        seconds = seconds_of_labels(self.profile.events())
        total = sum(seconds.values())
        figures = {
            "steps": steps,
            "step_seconds": total / steps,
            "seconds": {name: spent / steps for name, spent in seconds.items()},
            "tokens": self.tokens / steps,
            "tokens_per_second": self.tokens / total,
            **self._flops(total),
        }
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "profile.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        self.profile.export_chrome_trace(str(folder / "trace.json"))
        self.profile = None
        print(table(figures))

    def _flops(self, seconds: float) -> dict[str, Any]:
        dtype = self._dtype_of_products()
        peak = measure_peak(self.args.device, dtype)
        steps = self.steps_done - WARM_UP
        return {
            "model_flops": self.flops.model / steps,
            "hardware_flops": self.flops.hardware / steps,
            "peak_flops_per_second": peak,
            "peak_dtype": str(dtype).removeprefix("torch."),
            "model_flops_utilization": self.flops.model / seconds / peak,
            "hardware_flops_utilization": self.flops.hardware / seconds / peak,
        }

    def _dtype_of_products(self) -> torch.dtype:
        if self.args.bf16:
            return torch.bfloat16
        return torch.float16 if self.args.fp16 else self.weights_dtype


class ProfiledTrainer(CompiledTrainer):
    """A ``transformers.Trainer`` whose parts of a step have labels, where a profiler is there."""

    profiler: Profiler | None = None
    args: Any

    def add_profiler(self) -> None:
        """Profile, in the first process, where the configuration asks for it."""
        if self.args.profile and self.args.process_index == 0:
            self.profiler = Profiler(self.args)
            self.add_callback(self.profiler)

    def label(self, name: str) -> AbstractContextManager[Any]:
        """The label of a part of a step; nothing without a profiler."""
        return nullcontext() if self.profiler is None else self.profiler.label(name)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.label("data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.label("backward"):  # less the loss, which has a label of its own
            return super().training_step(*args, **kwargs)

    def compute_loss_context_manager(self) -> Any:
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.label("loss"))
        return stack

    def _clip_grad_norm(self, model: Any) -> Any:
        with self.label("optimizer"):
            return super()._clip_grad_norm(model)


def seconds_of_labels(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of each label, without those of the labels inside it; together those of all steps.

    Args:
        events: of torch's profiler; one without a label of ours is passed over.
    Returns:
        By label.
    """
    labelled = [event for event in events if event.name.startswith(PREFIX)]
    # An outer label begins first; where two begin together, the longer one is outside.
    labelled.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    seconds = dict.fromkeys(LABELS, 0.0)
    outer_events: list[Any] = []
    for event in labelled:
        while outer_events and outer_events[-1].time_range.end <= event.time_range.start:
            outer_events.pop()
        name = event.name.removeprefix(PREFIX)
        if not outer_events and name != "step":
            continue  # evaluation between two steps
        seconds_spent = event.time_range.elapsed_us() / 1e6
        seconds[name] += seconds_spent
        if outer_events:
            seconds[outer_events[-1].name.removeprefix(PREFIX)] -= seconds_spent
        outer_events.append(event)
    return seconds


def table(figures: dict[str, Any]) -> str:
    """The figures as lines of text.

    Args:
        figures: as ``profile.json`` holds them.
    Returns:
        One line for each part of a step.
    """
    total, tokens_per_second = figures["step_seconds"], figures["tokens_per_second"]
    lines = [f"profile of the mean of {figures['steps']} steps, {figures['tokens']:.0f} tokens each:"]
    for name, spent in figures["seconds"].items():
        label_shown = "other" if name == "step" else name
        if spent:
            lines.append(f"  {label_shown:<14}{1000 * spent:>10.1f} ms{100 * spent / total:>7.1f} %")
    lines.append(f"  {'step':<14}{1000 * total:>10.1f} ms, {tokens_per_second:.0f} tokens/s")
    for name, utilization in (("MFU", "model_flops"), ("HFU", "hardware_flops")):
        share, teraflops = figures[f"{utilization}_utilization"], figures[utilization] / 1e12
        lines.append(f"  {name:<14}{100 * share:>10.1f} %, {teraflops:.4g} TFLOP of {utilization.split('_')[0]}")
    lines.append(
        f"  of the speed of one large product: {figures['peak_flops_per_second'] / 1e12:.4g} TFLOP/s in "
        f"{figures['peak_dtype']}"
    )
    return "\n".join(lines)
