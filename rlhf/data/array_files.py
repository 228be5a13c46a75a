"""Arrays in files that are mapped into memory: a new one appears whole, with all of its room on the disk."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

UNFINISHED = ".new"  # end of the name of a file that is being written
_BLOCK_BYTES = 2**24


def create_array(path: Path, shape: tuple[int, ...], dtype: Any, fill: float = 0) -> None:
    """Write an array of one value in numpy's format, in place of a file that is there.

    The file appears under its name once all of it is on the disk. Its room is taken, so that a full disk is an error
    here: in a file with holes, the first write to the mapped memory would end the process without a word (SIGBUS).

    Args:
        path: of the file.
        shape: of the array.
        dtype: of its numbers.
        fill: every number.
    Raises:
        OSError: the file cannot be written, as on a full disk; names it.
    """
    dtype = np.dtype(dtype)
    num_values = int(np.prod(shape))
    block = np.full(min(num_values, _BLOCK_BYTES // dtype.itemsize), fill, dtype)
    unfinished = path.with_name(f"{path.name}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            npy.write_array_header_1_0(file, header)
            for start in range(0, num_values, len(block) or 1):
                file.write(block[: num_values - start].data)
            file.flush()
            # Before the rename: else a power failure could leave the name and not the numbers.
            os.fsync(file.fileno())
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        num_bytes = num_values * dtype.itemsize
        raise OSError(f"{path}: {num_bytes} bytes cannot be written ({error.strerror}); free some space") from error
    os.replace(unfinished, path)
