"""A trainer's state comes back as it was, and a file that is none is refused in one line."""

import math
import pickle
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.trainers.plain_state import load_state, save_state


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.arange(4)
    state = {
        "numbers": [1, 0.1, math.inf, True, None, np.float32(0.5)],
        "kinds": {"tuple": (1, (2,)), "set": {"a"}, 3: b"\x00\xff", "tensor": "a tag that is none"},
        "times": [datetime(2026, 11, 28, 3), date(2026, 11, 28), Decimal("0.10")],
        "tensors": [shared, shared[:2], torch.ones(2, dtype=torch.bfloat16)],
        "again": shared,
    }
    save_state(tmp_path / "state.json", state)
    loaded = load_state(tmp_path / "state.json")
    tensors = loaded.pop("tensors"), loaded.pop("again")
    assert loaded == {name: value for name, value in state.items() if name not in ("tensors", "again")}
    assert [tensor.tolist() for tensor in tensors[0]] == [[0, 1, 2, 3], [0, 1], [1, 1]]
    assert tensors[0][0] is tensors[1] and tensors[0][2].dtype == torch.bfloat16


def test_an_object_is_refused_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"state\.row\.image: a \w*Path cannot be kept in a checkpoint"):
        save_state(tmp_path / "state.json", {"row": {"image": [tmp_path]}})


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", b'{"a": 1, "b": 2}', b'{"tensor": "9"}', b'{"dict": 3}', b'{"date": 4}', pickle.dumps(print)],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    save_state(tmp_path / "state.json", {})
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.json"):
        load_state(tmp_path / "state.json")
    save_state(tmp_path / "state.json", {})
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.json: damaged"):
        load_state(tmp_path / "state.json")
