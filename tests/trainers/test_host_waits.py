"""No trainer makes the host wait for a tensor's value within a micro-batch: a GPU would stand still meanwhile.

A CPU never waits, but the operators that would make a GPU's host wait can be counted. What reads memory without an
operator (``tolist``) is seen on a GPU alone: tests/gpu. SFT and DPO run on the meta device in test_profiling.py.
"""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import sentences, tiny_model
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf
from rlhf.data import Collator
from rlhf.models.routing import routing

aten = torch.ops.aten
# Their result is a number of the host, or a tensor whose size depends on values.
WAITING = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.bincount,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.argwhere,
    aten.lift_fresh,  # of `torch.tensor`: a copy from numbers of the host
}  # fmt: skip
# On a CPU targets are checked before anything is computed.
CHECKS = ("int(token.min())", "int(ids.min())")


class WaitingOperators(TorchDispatchMode):
    """Counts operators that would make a GPU's host wait, by the line of this package that asked for them."""

    def __init__(self):
        super().__init__()
        self.lines = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._waits(func, args, kwargs or {}):
            stack = traceback.extract_stack()
            ours = [frame for frame in stack if Path(frame.filename).is_relative_to(Path(rlhf.__file__).parent)]
            line = f"{Path(ours[-1].filename).name}: {ours[-1].line}" if ours else "transformers"
            if not any(check in line for check in CHECKS):
                self.lines[f"{func.overloadpacket.__name__} at {line}"] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _waits(func, args, kwargs):
        operator = func.overloadpacket
        if operator in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            return any(index is not None and index.dtype == torch.bool for index in args[1])
        if operator is aten.repeat_interleave:
            return kwargs.get("output_size") is None
        return operator in WAITING


def test_the_operators_are_seen():
    numbers, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    counts, places = torch.tensor([1, 2, 0, 1]), torch.tensor([0, 2])
    with WaitingOperators() as seen:
        float(numbers.sum())
        numbers[mask]
        mask.nonzero()
        numbers.repeat_interleave(counts)
        numbers.unique()
        numbers.new_tensor(3.0)
    assert sum(seen.lines.values()) == 6
    with WaitingOperators() as seen:
        numbers[places]
        numbers.masked_fill(mask, 0.0).cumsum(0)
        numbers.repeat_interleave(counts, output_size=4)
    assert not seen.lines


OFFLINE = {
    "SFT": "sft_rows",
    "KTO": "unpaired_rows",
    "Reward": "preference_rows",
    "Distill": "sft_rows",
}
CASES = {
    "noise in embeddings": ("SFT", dict(neftune_noise_alpha=5.0)),
    "KTO": ("KTO", {}),
    "Reward": ("Reward", {}),
    "Distill": ("Distill", {}),
    "PPO": ("PPO", {}),
    "GRPO": ("GRPO", dict(loss_type="grpo", beta=0.1)),
    "online DPO": ("OnlineDPO", {}),
}


def made(kind, layout, rows, tokenizer, folder, **changes):
    options = dict(
        per_device_train_batch_size=4, max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=True, layout=layout, max_length=64,
    )  # fmt: skip
    more = {"teacher_model": tiny_model(seed=1)} if kind == "Distill" else {}
    if kind not in OFFLINE:
        options |= dict(max_completion_length=4) | (dict(num_generations=2) if kind == "GRPO" else {})
        more = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
    return getattr(rlhf, f"{kind}Trainer")(
        tiny_model(), args=getattr(rlhf, f"{kind}Config")(str(folder), **options, **changes), train_dataset=rows,
        processing_class=tokenizer, **more,
    )  # fmt: skip


def waits_of_a_micro_batch(kind, layout, request, tokenizer, folder, **changes):
    if kind in OFFLINE:
        rows = request.getfixturevalue(OFFLINE[kind]).select(range(4))
    else:
        rows = Dataset.from_list([{"prompt": text} for text in sentences(1, 4)])
    trainer = made(kind, layout, rows, tokenizer, folder, **changes)
    seen = WaitingOperators()
    own_step = trainer.training_step

    def watched(*args, **options):
        with seen:
            return own_step(*args, **options)

    trainer.training_step = watched
    trainer.train()
    assert trainer.state.global_step == 1
    return set(seen.lines)


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_in_a_micro_batch(case, request, tokenizer, tmp_path):
    kind, changes = CASES[case]
    assert waits_of_a_micro_batch(kind, "segments", request, tokenizer, tmp_path, **changes) == set()


def test_with_padded_rows_transformers_asks_whether_there_is_padding(request, tokenizer, tmp_path):
    """One reason more for segments: the question is asked within its model, so it stays."""
    (line,) = waits_of_a_micro_batch("SFT", "rows", request, tokenizer, tmp_path)
    assert line.startswith("_local_scalar_dense at bridge.py") and "backbone_of(model)(**inputs" in line


def test_counting_the_choices_of_routers_waits_for_nothing():
    pairs = [{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": []}] * 2
    rows, batch = Collator()(pairs), Collator(layout="segments")(pairs)
    logits = torch.arange(4.0).expand(batch.input_ids.numel(), 4)
    with WaitingOperators() as seen:
        found = routing((logits,), batch, top_k=2)
    assert not seen.lines
    assert found.chosen.tolist() == [0, 0, *[int(rows.attention_mask.sum())] * 2]
