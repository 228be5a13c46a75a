"""Trainers that compare the policy with a frozen reference: in memory, under the adapter, or stored on disk."""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from rlhf.data import Batch, Packed
from rlhf.models import Policy, load_model
from rlhf.models.adapter_off import adapter_off_is_start
from rlhf.trainers.base import BaseConfig, BaseTrainer
from rlhf.trainers.options import as_config
from rlhf.trainers.preparation import sets_of
from rlhf.trainers.reference_logps import add_ref_logps, reference_fingerprint
from rlhf.trainers.reference_sync import SyncReference


@dataclass
class ReferencedConfig(BaseConfig):
    """What trainers against a reference share; names and defaults are TRL's where TRL has the same thing."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of AdamW."})
    beta: float = field(default=0.1, metadata={"help": "Larger stays nearer the reference."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the reference's log-probs once, before training, and keep them on disk: no copy of the "
            "weights in memory. By default where rows are read more than once."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows at a time in that pass; per_device_eval_batch_size by default."}
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Move the reference towards the policy from time to time (TR-DPO)."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Share of the policy in the new reference, with sync_ref_model; in (0, 1]."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Steps between two moves, with sync_ref_model."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}")
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"ref_model_sync_steps must be at least 1, got {self.ref_model_sync_steps}")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError("sync_ref_model moves the reference, precompute_ref_log_probs asks it once: choose one")


class ReferencedTrainer(BaseTrainer):
    """A trainer whose loss compares the policy with a frozen reference.

    The reference is the model as it is at the start (or ``ref_model``): with the adapter off, where that is the same,
    as under a new LoRA adapter; otherwise a frozen copy of the weights.
    """

    ref_tokens: ClassVar[tuple[str, ...]]  # columns of a row, where it has them, that determine what is scored
    ref_columns: ClassVar[tuple[str, ...]]  # columns that hold the reference's sum for each completion of a row

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: str | nn.Module | None = None,
        args: ReferencedConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = as_config(args, self.config_class)
        if ref_model is not None and ref_model is model:
            raise ValueError("ref_model is the model that is trained: leave it out, and a copy of it is the reference")
        has_stream = has_streams(kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        if args.precompute_ref_log_probs and has_stream:
            raise ValueError(
                "precompute_ref_log_probs is not supported with IterableDataset: a stream has no place to keep "
                "the reference's log-probs; load the rows whole, or leave the option off"
            )
        super().__init__(model, args, **kwargs)
        self.set_up()
        precompute = args.precompute_ref_log_probs
        if precompute is None:
            precompute = not has_stream and not args.sync_ref_model and self._reads_rows_again()
        self.ref_policy: Policy | None = None
        self.callers_reference: Policy | None = None  # in memory anyway, so that it can be asked at any time
        self.has_ref_model = ref_model is not None
        # Whether the model with its adapter off is the reference; else it is a copy of the model as it is now.
        is_own_adapter = self.model.has_adapter and not self.has_ref_model
        self.adapter_off_is_reference = is_own_adapter and adapter_off_is_start(self.model.model)
        if ref_model is not None:
            loaded = load_model(ref_model, **args.model_kwargs()) if isinstance(ref_model, str) else ref_model
            self.ref_policy = self.freeze(loaded)
            self.share_layout(self.ref_policy.model)
            self.callers_reference = None if isinstance(ref_model, str) else self.ref_policy
        elif not self.adapter_off_is_reference and not precompute:
            self.ref_policy = self.freeze(copy.deepcopy(self.model.model))
        self.stored_key: str | None = None  # names the file that stores the reference's sums, if there is one
        if args.sync_ref_model:
            is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            steps = args.ref_model_sync_steps
            self.add_callback(SyncReference(self.ref_policy, args.ref_model_mixup_alpha, steps, is_sharded))
        if precompute:
            self._precompute()

    def set_up(self) -> None:
        """Checks and settings of a subclass, once the model, the rows and the devices are known."""

    def _reads_rows_again(self) -> bool:
        """Whether training reads a row a second time, so that storing its reference saves work."""
        args = self.args
        if self.train_dataset is None:
            return False
        if args.max_steps <= 0:
            return args.num_train_epochs > 1
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return args.max_steps * rows_per_step > len(self.train_dataset)  # type: ignore[arg-type]

    # A reference that moves is part of a checkpoint

    def resume_state(self) -> dict[str, Any] | None:
        state = super().resume_state()
        if not self.args.sync_ref_model or self.ref_policy is None:
            return state
        return {**(state or {}), "ref_model": self.ref_policy.model.state_dict()}

    def load_resume_state(self, state: dict[str, Any]) -> None:
        super().load_resume_state(state)
        if self.ref_policy is not None and "ref_model" in state:
            self.ref_policy.model.load_state_dict(state["ref_model"])

    # Sums that are computed once and stored

    def reference_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row whose sequences are those of :attr:`ref_columns`."""
        return row

    def reference_key(self) -> str:
        """What else determines the stored sums of the reference."""
        return ""

    def _precompute(self) -> None:
        """Give every row the reference's sums; it is not asked any more then, and no copy stays in memory."""
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError("ZeRO-3 shards the weights before they could be asked: --precompute_ref_log_probs false")
        reference = self.ref_policy or self.model
        precision = self.accelerator.mixed_precision
        fingerprint = reference_fingerprint(reference.model, precision, self.adapter_off_is_reference)
        self.stored_key = fingerprint + self.reference_key()
        self.train_dataset = self._with_ref_logps(self.train_dataset, "training rows")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._with_ref_logps(rows, name) for name, rows in self.eval_dataset.items()}
        else:
            self.eval_dataset = self._with_ref_logps(self.eval_dataset, "evaluation rows")
        self.ref_policy = None

    def _with_ref_logps(self, rows: Any, name: str) -> Any:
        if isinstance(rows, Packed):
            rows.rows = self._with_ref_logps(rows.rows, name)
        if rows is None or isinstance(rows, Packed):
            return rows
        reference = self.ref_policy or self.callers_reference or self.accelerator.unwrap_model(self.model)
        device_before = next(reference.parameters()).device
        reference.to(self.args.device).eval()

        def score(rows: list[dict[str, Any]]) -> Tensor:
            batch: Any = self.data_collator([self.reference_row(row) for row in rows])
            return self.ask_reference(reference, batch.to(self.args.device))

        rows = add_ref_logps(
            rows,
            [column for column in self.ref_tokens if column in rows.column_names],
            self.ref_columns,
            str(self.stored_key),
            score,
            self.accelerator,
            self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size,
            name,
            self.args.disable_tqdm,
        )
        reference.to(device_before)
        return rows

    def _tokenised_rows(self, dataset: Any) -> Any:
        """Rows for an evaluation, with the reference's sums where no copy of it is kept."""
        rows = super()._tokenised_rows(dataset)
        if isinstance(rows, dict) or self.stored_key is None or not isinstance(rows, Dataset):
            return rows
        if set(self.ref_columns) <= set(rows.column_names):
            return rows
        # The policy of step 0 is the reference still, unless another model is.
        has_changed = self.has_ref_model or self.state.global_step > 0
        if has_changed and self.callers_reference is None and not self.adapter_off_is_reference:
            raise ValueError(
                "Cannot compute reference log-probs for a dataset passed to evaluate(): the reference is not in memory "
                "any more; pass the rows as eval_dataset, or train with --precompute_ref_log_probs false"
            )
        return self._with_ref_logps(rows, "evaluation rows")

    # The reference's log-probs of a batch

    @property
    def ref_model(self) -> Any:
        """The reference's transformers model, where there is one besides the policy's own."""
        reference = self.ref_policy or self.callers_reference
        return None if reference is None else reference.model

    def sums(self, batch: Batch, logps: Tensor) -> Tensor:
        """The log-probability of each answer, [S], from those of its tokens, [N]."""
        return batch.targets.sum(logps)

    def ref_sums(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums of log-probabilities under the reference, [S]: as stored, or computed now.

        Args:
            model: the trained policy, as accelerate wrapped it.
            batch: sequences to score.
        Raises:
            ValueError: nothing is stored, and the reference is not in memory.
        """
        stored = batch.per_sequence.get("ref_logps")
        if stored is not None:
            return stored
        if self.ref_policy is None and not self.adapter_off_is_reference:
            raise ValueError("these rows have no reference log-probs; train with --precompute_ref_log_probs false")
        return self.ask_reference(self.ref_policy or model, batch)

    def ask_reference(self, reference: nn.Module, batch: Batch) -> Tensor:
        """Sums of log-probabilities, [S], without gradient.

        Args:
            reference: a frozen policy, or the trained one, whose adapter is switched off meanwhile.
            batch: sequences to score.
        """
        without_adapter: AbstractContextManager[Any] = nullcontext()
        if self.ref_policy is None and self.adapter_off_is_reference:
            without_adapter = self.accelerator.unwrap_model(reference).adapter_off()
        with torch.no_grad(), self.accelerator.autocast(), without_adapter:
            return self.sums(batch, reference(batch).logps)


def has_streams(*datasets: Any) -> bool:
    """Whether one of these data sets, or of those in a dictionary, is read row by row."""
    return any(isinstance(rows, IterableDataset) for rows in sets_of(*datasets))
