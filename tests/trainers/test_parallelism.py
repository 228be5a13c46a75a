"""``--parallelism_config``: sizes are checked before any work, and rows are divided without a gap."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig

from rlhf import DistillConfig, KTOConfig, OnlineDPOConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf.data import Collator
from rlhf.data.segments import Span
from rlhf.models.context_parallel import rows_of_parts, segments_of_part
from rlhf.trainers.parallelism import check_context_parallel, gather_rows, parallel_sizes


def sizes(dp_replicate=1, dp_shard=1, cp=1):
    return {"dp_replicate_size": dp_replicate, "dp_shard_size": dp_shard, "cp_size": cp}


@pytest.mark.parametrize(
    ("given", "processes", "expected"),
    [
        (None, 8, None),
        ({}, 1, None),
        ({"cp_size": 2}, 2, sizes(cp=2)),
        ({"cp_size": 2}, 8, sizes(dp_shard=4, cp=2)),
        ({"dp_replicate_size": 2}, 8, sizes(dp_replicate=2, dp_shard=4)),
        ({"dp_shard_size": 2, "cp_size": 4}, 8, sizes(dp_shard=2, cp=4)),
        (ParallelismConfig(cp_size=4), 4, sizes(cp=4)),
    ],
)
def test_sizes(given, processes, expected):
    assert parallel_sizes(given, processes) == expected


def test_sizes_of_the_launcher(monkeypatch):
    assert parallel_sizes(None, 4) is None
    for name, value in {"CP_SIZE": "2", "DP_SHARD_SIZE": "2"}.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}", value)
    assert parallel_sizes(None, 4) is None
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    assert parallel_sizes(None, 4) == sizes(dp_shard=2, cp=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cp_size": 3}, "dp_replicate_size 1 x dp_shard_size 1 x cp_size 3 needs 3 processes, and there are 4"),
        ({"cp_size": 0}, "cp_size must be a whole number from 1 on, got 0"),
        ({"cp_size": "2"}, "cp_size must be a whole number from 1 on, got '2'"),
        ({"context": 2}, "no 'context'; known are dp_replicate_size, dp_shard_size, cp_size"),
        ({"tp_size": 2}, "tp_size: tensor parallelism is not supported"),
        ({"sp_size": 2}, "sp_size: sequence parallelism by DeepSpeed is not supported"),
        ("2", "expected a JSON object"),
    ],
)
def test_sizes_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parallel_sizes(given, 4)


def options(**changes):
    usual = dict(divides_rows=True, layout="auto", torch_compile=False, neftune_noise_alpha=None, fsdp="full_shard")
    return SimpleNamespace(**usual | {"parallelism_config": sizes(cp=2)} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(fsdp=""), "needs FSDP2"),
        (dict(layout="rows"), "--layout does not go with"),
        (dict(torch_compile=True), "--torch_compile does not go with"),
        (dict(neftune_noise_alpha=5.0), "--neftune_noise_alpha does not go with"),
        (dict(precompute_ref_log_probs=True), "--precompute_ref_log_probs does not go with"),
    ],
)
def test_what_does_not_go_with_context_parallelism(changes, message):
    check_context_parallel(options())
    with pytest.raises(ValueError, match=message):
        check_context_parallel(options(**changes))
    check_context_parallel(options(**changes, parallelism_config=None))


@pytest.mark.parametrize("config", [RewardConfig, PPOConfig, DistillConfig, OnlineDPOConfig])
def test_trainers_without_it(config, tmp_path):
    args = config(str(tmp_path), use_cpu=True)
    args.parallelism_config = sizes(cp=2)
    with pytest.raises(ValueError, match=f"{config.__name__[:-6]}Trainer has no context parallelism"):
        check_context_parallel(args)


def test_a_configuration_holds_sizes_and_is_written(tmp_path):
    assert SFTConfig(str(tmp_path), use_cpu=True, parallelism_config='{"cp_size": 1}').parallelism_config is None
    with pytest.raises(ValueError, match="cp_size 2 needs 2 processes, and there are 1"):
        KTOConfig(str(tmp_path), use_cpu=True, parallelism_config='{"cp_size": 2}')
    args = SFTConfig(str(tmp_path), use_cpu=True)
    args.parallelism_config = sizes(cp=2)
    assert args.to_dict()["parallelism_config"] == sizes(cp=2) == args.parallelism_config
    assert '"cp_size": 2' in args.to_json_string()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 7, 12, 25])
def test_each_row_has_one_process_and_the_work_is_even(length, size):
    parts = rows_of_parts(length, size)
    assert sorted(parts.flatten().tolist()) == list(range(parts.numel()))
    assert parts.numel() - length < 2 * size
    # Causal attention costs as many products as a row has keys.
    work = (parts + 1).sum(1)
    assert work.max() == work.min()


def visible(spans):
    """Which keys each query of a row sees, from the definition of a span."""
    starts = torch.tensor([0, *(span.length for span in spans)]).cumsum(0).tolist()
    rows = []
    for (length, parent, prefix), start in zip(spans, starts, strict=False):
        prompt = set(range(starts[parent], starts[parent] + prefix)) if prefix else set()
        rows += [prompt | set(range(start, start + offset + 1)) for offset in range(length)]
    return rows


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_query_has_the_keys_that_it_sees(size):
    spans = (Span(7), Span(3, 0, 4), Span(5, 0, 4), Span(1), Span(6), Span(2, 4, 1))
    padding = rows_of_parts(24, size).numel() - 24
    padded = (*spans, Span(padding)) if padding else spans
    expected = visible(padded)
    for rows in rows_of_parts(24, size):
        part = segments_of_part(padded, rows)
        layout = part.layout
        assert layout.query_starts[-1] == len(rows)
        assert layout.longest_query == max(span.length for span in part.spans)
        for index, (length, _, prefix) in enumerate(part.spans):
            first_key, last_key = layout.key_starts[index : index + 2].tolist()
            assert last_key - first_key == prefix + length <= layout.longest_key
            keys = layout.key_rows[first_key:last_key].tolist()
            for offset in range(length):
                query = int(rows[int(layout.query_starts[index]) + offset])
                # The last query of a span sees all its keys, the one before it all but the last.
                assert set(keys[: prefix + offset + 1]) == expected[query]


def test_rows_of_processes_that_share_a_batch_are_gathered_once():
    config = SimpleNamespace(cp_enabled=True, cp_size=2)
    # Two groups of two processes, with two rows each; the last row fills up the last batch.
    gathered = torch.tensor([[0.0], [1.0], [0.0], [1.0], [2.0], [9.0], [2.0], [9.0]])
    for is_last, expected in ((False, [0, 1, 2, 9]), (True, [0, 1, 2])):
        accelerator = SimpleNamespace(
            parallelism_config=config,
            gather=lambda rows: gathered,
            gradient_state=SimpleNamespace(end_of_dataloader=is_last, remainder=3),
        )
        assert gather_rows(accelerator, torch.zeros(2, 1)).flatten().tolist() == expected


def test_a_collated_row_keeps_its_targets():
    batch = Collator(0, layout="segments")([{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}])
    assert batch.segments.gather is None
