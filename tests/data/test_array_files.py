"""New arrays appear whole, and a disk without room for them is an error in words."""

import resource

import numpy as np
import pytest
from numpy.lib.format import open_memmap

from rlhf.data.array_files import create_array


@pytest.mark.parametrize("shape", [(3, 5), (7,), (3_000_000, 2), (0, 2)])
def test_the_file_is_that_of_numpy(tmp_path, shape):
    create_array(tmp_path / "ours.npy", shape, np.float32, fill=np.nan)
    array = open_memmap(tmp_path / "ours.npy", mode="r")
    assert array.shape == shape and array.dtype == np.float32 and np.isnan(array).all()
    np.save(tmp_path / "theirs.npy", np.full(shape, np.nan, np.float32))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path):
    path = tmp_path / "array.npy"
    create_array(path, (10,), np.uint8, fill=7)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # larger files are refused, as by a full disk
    try:
        with pytest.raises(
            OSError, match=r"array\.npy: 4000000 bytes cannot be written \(File too large\); free some space"
        ):
            create_array(path, (1_000_000,), np.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["array.npy"] and (np.load(path) == 7).all()
