"""Trainers that compare the policy with a frozen reference: in memory, under the adapter, or stored on disk."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from rlhf.data import Batch, Packed
from rlhf.trainers.base import BaseTrainer
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.options import as_config
from rlhf.trainers.parallelism import cp_size
from rlhf.trainers.preparation import sets_of
from rlhf.trainers.reference import Reference, ReferenceSyncArguments
from rlhf.trainers.reference_logps import add_ref_logps, reference_fingerprint
from rlhf.trainers.sharding import can_shard, shard


@dataclass
class ReferencedConfig(ReferenceSyncArguments, BaseConfig):
    """What trainers against a reference share; names and defaults are TRL's where TRL has the same thing."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of AdamW."})
    beta: float = field(default=0.1, metadata={"help": "Larger values keep the policy closer to the reference."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the reference's log-probs once, before training, and store them on disk, so that no copy "
            "of the weights stays in memory. Default: on if rows are read more than once."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Batch size of that computation; default: per_device_eval_batch_size."}
    )

    divides_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sync()
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError("sync_ref_model moves the reference, precompute_ref_log_probs asks it once: choose one")


class Scorer(NamedTuple):
    """What gives the reference's log-probs before training.

    Args:
        reference: asked for them.
        model: runs the forward passes.
    """

    reference: Reference
    model: nn.Module


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
        self.set_up()  # first, as it may change how rows are collated for the reference
        precompute = args.precompute_ref_log_probs
        if precompute is None:
            # Before training, processes that share batches have nothing to share yet.
            asks_often = has_stream or args.sync_ref_model or cp_size(args) > 1
            precompute = not asks_often and self._reads_rows_again()
        # Before training the policy itself is the reference: where all sums are stored then, no copy is needed.
        self.reference = self.make_reference(ref_model, copies=not precompute)
        self.reference_is_start = ref_model is None
        self.stored_key: str | None = None  # names the file that stores the reference's sums, if there is one
        self.sync_reference()
        if precompute:
            self._precompute()
            if isinstance(ref_model, str):
                self.reference = None  # nobody else holds it: its memory is free for training

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

    def resume_state(self) -> dict[str, Any]:
        state = super().resume_state()
        if self.args.sync_ref_model and self.ref_policy is not None:
            state["ref_model"] = self.ref_policy.model.state_dict()
        return state

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
        """Give every row the reference's sums."""
        precision = self.accelerator.mixed_precision
        is_sharded = can_shard(self.accelerator)
        if is_sharded and precision != "no":
            precision += ", sharded"  # which rounds elsewhere
        # Weights of the adapter are no part of a reference that switches it off.
        adapter_off = self.reference is not None and self.reference.frozen is None
        fingerprint = reference_fingerprint(self._reference_now().model, precision, adapter_off)
        self.stored_key = fingerprint + self.reference_key()
        # Made by the first row that is not stored yet.
        scorer = cache(partial(self._sharded_scorer, adapter_off)) if is_sharded else self._scorer
        self.train_dataset = self._with_ref_logps(self.train_dataset, "training rows", scorer)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self._with_ref_logps(rows, name, scorer) for name, rows in self.eval_dataset.items()
            }
        else:
            self.eval_dataset = self._with_ref_logps(self.eval_dataset, "evaluation rows", scorer)

    def _scorer(self) -> Scorer:
        policy = self._reference_now().to(self.args.device).eval()
        return Scorer(self.reference or Reference(policy, frozen=policy), policy)

    def _sharded_scorer(self, adapter_off: bool) -> Scorer:
        """The reference sharded as the policy will be: a copy, as the weights themselves must stay whole until then.

        FSDP2 rounds elsewhere than autocast does: from another forward pass, DPO would not begin at log 2.
        """
        frozen = self.freeze(copy.deepcopy(self._reference_now().model), shards=True)
        sharded = shard(frozen, self.accelerator)
        if adapter_off:
            return Scorer(Reference(frozen, None), sharded)
        return Scorer(Reference(frozen, frozen, sharded), sharded)

    def _reference_now(self) -> Any:
        """The policy that gives the reference's log-probs; at the start that may be the trained one itself."""
        return self.ref_policy or self.accelerator.unwrap_model(self.model)

    def _with_ref_logps(self, rows: Any, name: str, scorer: Callable[[], Scorer]) -> Any:
        if isinstance(rows, Packed):  # the columns belong to the rows that it packs
            rows.rows = self._with_ref_logps(rows.rows, name, scorer)
        if rows is None or isinstance(rows, Packed):
            return rows
        # Trainer may keep the model on the CPU until it trains.
        policy = self._reference_now()
        device_before = next(policy.parameters()).device

        def score(rows: list[dict[str, Any]]) -> Tensor:
            batch: Any = self.data_collator([self.reference_row(row) for row in rows])
            reference, model = scorer()
            return self._sums_under(reference, model, batch.to(self.args.device))

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
        policy.to(device_before)
        return rows

    def _tokenised_rows(self, dataset: Any) -> Any:
        """Rows for an evaluation, with the reference's sums where no copy of it is kept."""
        rows = super()._tokenised_rows(dataset)
        if isinstance(rows, dict) or self.stored_key is None or not isinstance(rows, Dataset):
            return rows
        if set(self.ref_columns) <= set(rows.column_names):
            return rows
        # At step 0 the policy still is the reference, unless that is another model.
        policy_is_reference = self.reference_is_start and self.state.global_step == 0
        if self.reference is None and not policy_is_reference:
            raise ValueError(
                "Cannot compute reference log-probs for a dataset passed to evaluate(): the reference is not in memory "
                "any more; pass the rows as eval_dataset, or train with --precompute_ref_log_probs false"
            )
        return self._with_ref_logps(rows, "evaluation rows", self._scorer)

    # The reference's log-probs of a batch

    def sums(self, batch: Batch, logps: Tensor) -> Tensor:
        """The log-probability of each answer, [S], from those of its tokens, [N]."""
        return batch.targets.sum(logps)

    def ref_sums(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums of log-probabilities under the reference: as stored, or computed now.

        Args:
            model: the trained policy, as accelerate wrapped it.
            batch: sequences to score.
        Returns:
            [S], in nats, without gradient.
        Raises:
            ValueError: nothing is stored, and the reference is not in memory.
        """
        stored = batch.per_sequence.get("ref_logps")
        if stored is not None:
            return stored
        if self.reference is None:
            raise ValueError("these rows have no reference log-probs; train with --precompute_ref_log_probs false")
        return self._sums_under(self.reference, model, batch)

    def _sums_under(self, reference: Reference, model: nn.Module, batch: Batch) -> Tensor:
        """Sums of log-probabilities under the reference, [S], computed now and without gradient."""
        with torch.no_grad(), self.accelerator.autocast():
            return self.sums(batch, reference.logps(model, batch))


def has_streams(*datasets: Any) -> bool:
    """Whether one of these data sets, or of those in a dictionary, is read row by row."""
    return any(isinstance(rows, IterableDataset) for rows in sets_of(*datasets))
