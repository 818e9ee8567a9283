"""The device that a benchmark runs on: whether it is there, its clock, its memory."""

from __future__ import annotations

import time
from argparse import Namespace

import torch

from cluster.machine import peak_memory_bytes
from jobs.benchmarks.support.record import num_cpus
from sparsify.errors import InputError


def use_device(options: Namespace) -> int:
    """Check that --device is there, and set the threads that --threads asks for; their number.

    Raises:
        InputError: there is no GPU.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU here; use --device cpu")
    num_threads = options.threads or num_cpus()
    torch.set_num_threads(num_threads)
    return int(num_threads)


def wall_s(device: str) -> float:
    """Seconds of the clock; on a GPU when it has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def now_s(device: str) -> float:
    """Seconds: of the clock on a GPU, when it has done what it was given; on a CPU seconds of work
    of all threads, which other programs disturb less."""
    return wall_s(device) if device == "cuda" else time.process_time()


def peak_bytes(device: str) -> int:
    """Most memory since the start, or since `forget_peak`: of the GPU, or of the whole process."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory_bytes()


def forget_peak(device: str) -> None:
    """Count the peak of a GPU from here on; a process's own cannot be forgotten."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
