"""Keep freed memory for the next step, on the CPU."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE = 2**30  # bytes: more than the tensors of a step, less than datasets, which go back when they are freed


def keep_freed_memory() -> bool:
    """Let glibc give no freed memory back to the system, except blocks of a gigabyte or more; tell whether it obeys.

    A step frees all its activations. By default each block of 32 MiB or more goes back, and a step begins by having
    the system zero some hundred thousand pages that it had a moment ago. The peak stays; what is freed stays this
    process's until it ends. Other C libraries have their own ways, and are left alone.

    Source: mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
