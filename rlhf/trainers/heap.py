"""Memory that a CPU run frees and needs again a moment later."""

import ctypes
import sys

import psutil

M_TRIM_THRESHOLD, M_MMAP_MAX, MADV_HUGEPAGE = -1, -4, 14  # <malloc.h>, <sys/mman.h>
HUGE = 2**21


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, in pages of 2 MiB; Linux with glibc only, elsewhere nothing.

    By default it gives every large tensor back to the system and asks for it anew, 4 KiB at a time: a third of a
    second of page faults for each GiB, several GiB a step.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    # Address space for half of the free memory, none of it touched: what comes to lie there has huge pages.
    size = psutil.virtual_memory().available // 2
    start = libc.malloc(size)
    if start is None:
        return
    first = -(-start // HUGE) * HUGE
    libc.madvise(first, (start + size - first) // HUGE * HUGE, MADV_HUGEPAGE)
    libc.malloc(4 * HUGE)  # stays, above it: else the heap would shrink again
    libc.free(start)
