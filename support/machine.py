"""Set and measure this process's threads and memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys

import torch


def use_all_cores(num_processes: int = 1) -> None:
    """Give torch this process's share of the cores on CPU.

    `accelerate launch` without a configuration file sets OMP_NUM_THREADS=1, which halves the speed of a laptop.
    TORCH_NUM_THREADS in the environment overrides the share.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(int(os.environ.get("TORCH_NUM_THREADS", max(1, cores // num_processes))))
    tune_malloc()


def tune_malloc() -> None:
    """Let glibc keep memory that torch frees on the CPU. With another C library, do nothing.

    By default glibc returns large blocks to the system immediately, and the system clears fresh pages for each
    activation and gradient. That takes a tenth of an update of GPT-2 small (docs/notebook/performance.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory in MiB since the process started: of CUDA's allocator, else resident memory (RSS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB on Linux
