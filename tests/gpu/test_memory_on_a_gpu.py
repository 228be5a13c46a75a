"""Memory on a GPU: what the recorder of a dry run measures, and what the record of a run says of the card."""

import pytest
import torch

from rlhf.planning.tracking import MemoryRecorder
from rlhf.runs.facts import machine

pytestmark = pytest.mark.gpu
MEBIBYTE = 2**20


def test_phases_have_the_peaks_of_their_tensors(gpu):
    recorder = MemoryRecorder(gpu)

    def work():
        recorder.mark("forward")
        kept = torch.zeros(8 * MEBIBYTE, dtype=torch.uint8, device=gpu)
        torch.zeros(4 * MEBIBYTE, dtype=torch.uint8, device=gpu)
        recorder.mark("backward")
        return torch.zeros(2 * MEBIBYTE, dtype=torch.uint8, device=gpu), kept

    recorder.record(work)
    forward, backward = recorder.phases["forward"], recorder.phases["backward"]
    assert forward.peak == pytest.approx(12 * MEBIBYTE, rel=0.01) and forward.end == pytest.approx(
        8 * MEBIBYTE, rel=0.01
    )
    assert backward.peak == pytest.approx(10 * MEBIBYTE, rel=0.01)


def test_the_record_names_the_card(gpu):
    accelerator = machine()["accelerator"]
    if gpu.type == "cpu":
        assert accelerator is None
    else:
        assert torch.cuda.get_device_properties(0).name in accelerator and "GiB" in accelerator
