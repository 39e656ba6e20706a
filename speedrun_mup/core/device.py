"""What a process computes on: pick a device, and know what works there."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from speedrun_mup.core.errors import ConfigError, in_a_line


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called `name`, of GPUs that with LOCAL_RANK's number; "auto" takes CUDA, else MPS, else CPU.

    ConfigError if it is not on this machine. Other GPUs are left alone: each process that touches one takes memory there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    number, have = env_int("LOCAL_RANK", 0), torch.cuda.device_count()
    if name == "cuda" and 0 < have <= number:
        raise ConfigError(f"LOCAL_RANK={number} but this machine has {have} GPUs; use --nproc_per_node={have}")
    try:
        device = torch.device("cuda", number) if name == "cuda" else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as fault:
        raise ConfigError(f"device={name} is not usable here ({in_a_line(fault)}); try --device cpu") from None
    return device


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether `fault` means that memory is full: CUDA has a class for it, MPS and CPUs a text."""
    texts = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")  # the last is cuBLAS's and cuDNN's
    return isinstance(fault, torch.OutOfMemoryError | MemoryError) or any(text in str(fault) for text in texts)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether our kernels in Triton run on `device`: it may be missing, or the C compiler, or room for their tiles.

    Warns where they do not; raises what means that memory is full, which says nothing about them.
    """
    if device.type != "cuda":
        return False
    try:
        from speedrun_mup.core.kernels.triton import symmetric_product, transpose_bytes

        x = torch.zeros(1, 128, 128, dtype=torch.bfloat16, device=device)
        symmetric_product(x, symmetric_product(x))
        transpose_bytes(x[0].view(torch.uint8))
        torch.cuda.synchronize(device)
    except Exception as fault:  # Triton's own, whatever it is
        if is_out_of_memory(fault):
            raise
        warnings.warn(f"torch's kernels instead of ours in Triton, which fail here: {in_a_line(fault)}", stacklevel=2)
        return False
    return True


def env_int(name: str, default: int) -> int:
    """The environment variable `name` as a number. Raises ConfigError for what is none."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"environment variable {name}={text!r} is not a number; start with torchrun or unset it"
        ) from None


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """If `on`, let torch use only kernels that give the same bits every time."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # every byte that is read is written first
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
