"""Where a step's time goes (``profile=N``), and what the first batch takes (``verbose``): nothing when off."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf.logprobs.head import backbone_of
from rlhf.logprobs.versions import activation_checkpointing
from rlhf.models import Policy
from rlhf.models.policy import Teacher
from rlhf.trainers.activations import Activations
from rlhf.trainers.throughput import FlopCounter, figures, table

WARM_UP = 2  # steps that are not timed; the matrix products of the last are counted
PHASES = ("data", "reference", "forward", "head", "head backward", "backward", "optimizer", "other")


class Clock:
    """Seconds in each phase; at any time one is running, or none."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phase: str | None = None
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._since = 0.0

    def switch(self, phase: str | None) -> str | None:
        """Go over to ``phase`` once the device has done what it was given; returns the phase before."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        if self.phase is not None:
            self.seconds[self.phase] += now - self._since
        before, self.phase, self._since = self.phase, phase, now
        return before

    @property
    def divides(self) -> bool:
        """Whether a step is running, outside the reference and what samples for it: these are one phase each."""
        return self.phase not in (None, "reference", "data")

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase inside a step; "data" opens the step."""
        if not self.divides and not (self.phase is None and phase == "data"):
            yield
            return
        before = self.switch(phase) or "other"
        try:
            yield
        finally:
            self.switch(before)


class Profiler(TrainerCallback):
    """Looks at a trainer's first batch, times ``args.profile`` steps after the first two, and reports.

    Phases: waiting for the batches; the reference policy, or the teacher; the backbone; the head and a loss that is
    taken with it (in the modes local and unit with their gradient); the backward pass down to the last hidden states,
    and below them; clipping and the update; the rest. A model that runs its own head has it under "forward".

    For as long as that takes, methods of the trainer are shadowed and its modules hooked. No number changes; but the
    clock waits for the device at each change of phase, so these steps are a little slower than others.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.attached = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attached.close()
        self.done = self.tokens = self.flops = 0
        self.flops_per_token = 0.0
        self.clock = Clock(args.device)
        self._shadow(self.trainer, "compute_loss", self._watched)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done += 1
        self.clock.switch(None)
        if args.profile and self.done == WARM_UP - 1:
            self._attach()
        elif args.profile and self.done == WARM_UP:
            self.flops_per_token = self.flops / max(self.tokens, 1)
            self.clock, self.tokens = Clock(args.device), 0
        elif args.profile and self.done == WARM_UP + args.profile:
            self._report()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.profile and self.done <= WARM_UP:
            print(f"profile: training ended at step {self.done}, and the first {WARM_UP} are not timed")
        elif args.profile and self.done < WARM_UP + args.profile:
            self._report()
        self.attached.close()

    def _shadow(self, owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Let this object answer to ``name`` with a wrapped method, until ``attached`` closes."""
        own = vars(owner).get(name)
        setattr(owner, name, wrapper(getattr(owner, name)))
        self.attached.callback(partial(delattr, owner, name) if own is None else partial(setattr, owner, name, own))

    def _watched(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        """The first call of ``compute_loss``: what it chose, and what it keeps for the backward pass."""

        def watched(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.attached.close()
            trainer = self.trainer
            with Activations(trainer.accelerator.unwrap_model(trainer.model)) as activations:
                loss = compute_loss(model, inputs, *args, **kwargs)
            if trainer.args.verbose:
                print(activations.describe_batch(inputs))
            if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # gathered weights would be counted
                print(activations.describe(activation_checkpointing(trainer.args)[0]))
            return loss

        return watched

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.clock.during(phase):
                return function(*args, **kwargs)

        return timed

    def _timed_teacher(self, teacher: Teacher) -> Teacher:
        @contextmanager
        def timed(student: Policy) -> Iterator[Policy]:
            with self.clock.during("reference"), teacher(student) as policy:
                yield policy

        return timed

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.done >= WARM_UP:
                return function(*args, **kwargs)
            with FlopCounter() as counter:
                result = function(*args, **kwargs)
            self.flops += counter.total
            return result

        return counted

    def _attach(self) -> None:
        trainer = self.trainer
        for owner, name, phase in (
            (trainer, "get_batch_samples", "data"),
            (trainer, "ask_reference", "reference"),
            (trainer.accelerator, "backward", "head backward"),
            (trainer, "_clip_grad_norm", "optimizer"),
            (trainer, "_get_grad_norm", "optimizer"),
            (trainer.optimizer, "step", "optimizer"),
            (trainer.model_wrapped, "zero_grad", "optimizer"),
        ):
            if hasattr(owner, name):
                self._shadow(owner, name, partial(self._timed, phase))
        teacher = getattr(trainer, "teacher", None)
        if hasattr(teacher, "policy_of"):
            self._shadow(teacher, "policy_of", self._timed_teacher)
        self._shadow(trainer, "training_step", self._counted)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        backbone = backbone_of(policy.model.get_base_model() if policy.has_adapter else policy.model)
        for hook in (
            policy.register_forward_pre_hook(self._count_tokens),
            backbone.register_forward_pre_hook(lambda *_: self._enter("forward")),
            backbone.register_forward_hook(self._leave_backbone),
            policy.register_forward_hook(lambda *_: self._enter("other")),
        ):
            self.attached.callback(hook.remove)

    def _count_tokens(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.clock.divides:
            self.tokens += args[0].input_ids.numel()

    def _enter(self, phase: str) -> None:
        if self.clock.divides:
            self.clock.switch(phase)

    def _leave_backbone(self, module: nn.Module, args: Any, output: Any) -> None:
        self._enter("head")
        if self.clock.divides and output[0].requires_grad:
            output[0].register_hook(self._gradient_arrives)

    def _gradient_arrives(self, gradient: Tensor) -> None:
        if self.clock.phase == "head backward":
            self.clock.switch("backward")

    def _report(self) -> None:
        self.attached.close()
        trainer, args = self.trainer, self.trainer.args
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else trainer.model.dtype
        found = figures(
            self.clock.seconds,
            self.done - WARM_UP,
            self.tokens,
            self.tokens * self.flops_per_token,
            args.device,
            dtype,
        )
        path = Path(args.output_dir) / "profile.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(table(found))
