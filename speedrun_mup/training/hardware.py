"""Capability probes (dtype, compile, attention, FP8), and what they mean for a run. Every choice comes with its reason."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._functorch.config
from torch import Tensor

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.errors import ConfigError, in_a_line
from speedrun_mup.core.kernels.fp8 import GRANULE, has_fp8
from speedrun_mup.core.model.attention import Flex
from speedrun_mup.core.utils import is_out_of_memory


@contextmanager
def short_waits(device: torch.device) -> Iterator[None]:
    """On a CPU, have OpenMP's threads sleep soon where they wait, though torch was loaded without OMP_WAIT_POLICY.

    GNU's OpenMP reads the policy when it is loaded, but later, too, spins a thousandth as long while there are more of its
    threads than cores. So a second team is kept, of as many threads as the first, which sleeps.
    """
    if device.type != "cpu" or torch.get_num_threads() == 1 or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        yield
        return
    there, over = threading.Event(), threading.Event()

    def keep_team() -> None:
        try:
            torch.zeros(2**17).add_(1)  # large enough for all threads; each thread that asks for a team has its own
        finally:
            there.set()
        over.wait()

    keeper = threading.Thread(target=keep_team, name="short waits", daemon=True)
    keeper.start()
    try:
        there.wait()
        yield
    finally:
        over.set()
        keeper.join()


def pick_dtype(cfg: TrainConfig, device: torch.device) -> torch.dtype:
    """Of embeddings and activations: bfloat16 where the GPU computes in it, else float32 (CPUs emulate bfloat16)."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    return (
        torch.bfloat16
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float32
    )


def pick_compile(cfg: TrainConfig, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and why: only on CUDA, and only where a compiled function runs."""
    if cfg.compile:
        return True, "asked for"
    if device.type != "cuda":
        return False, "only worthwhile on CUDA"
    if cfg.compile is False:
        return False, "by flag or preset"
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as fault:  # anything may be missing: Triton, a C compiler, support for this GPU
        if is_out_of_memory(fault):
            raise
        return False, f"torch.compile fails here: {in_a_line(fault)}"
    return True, "CUDA"


def pick_attention(cfg: TrainConfig, device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[str, str]:
    """The attention backend, and why: FlexAttention where it works. ConfigError if it is asked for and does not.

    It has no backward on a CPU, and builds all T x T scores where it is not compiled. Its kernels come in tiles that not
    every GPU has room for, nor every block is a multiple of.
    """
    if cfg.attention not in ("auto", "flex"):
        return cfg.attention, "asked for"
    if device.type != "cuda":
        obstacle = f"FlexAttention has no backward on {device.type}"
    elif not compiled:
        obstacle = "FlexAttention would have to be compiled"
    else:
        obstacle = _try_flex(cfg.head_dim, cfg.block_size, device, dtype)
    if cfg.attention == "flex" and obstacle:
        raise ConfigError(f"attention=flex cannot be used: {obstacle}; use --attention blocked")
    return ("blocked", obstacle) if obstacle else ("flex", "CUDA, compiled")


@functools.cache
def _try_flex(head_dim: int, block_size: int, device: torch.device, dtype: torch.dtype) -> str:
    """What goes wrong in a forward and a backward pass over a few blocks, or nothing."""
    tokens = block_size * max(2, -(-256 // block_size))
    flex, documents = Flex(), torch.zeros(tokens, dtype=torch.int32, device=device)
    window = torch.ones((), dtype=torch.int32, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex.attend(q, k, v, flex.build_mask(documents, window, block_size), 1.0)

    q, k, v = (torch.zeros(tokens, 2, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        torch.compile(attend, dynamic=False)(q, k, v).sum().backward()
        torch.cuda.synchronize(device)
    except Exception as fault:  # the compiler's own, whatever it is
        if is_out_of_memory(fault):  # of this moment; the next may have room
            raise
        return f"FlexAttention fails here with head_dim={head_dim}, block_size={block_size}: {in_a_line(fault)}"
    return ""


def pick_fp8(cfg: TrainConfig, device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[bool, str]:
    """Whether the head trains with FP8 matmuls, and why. ConfigError if that is asked for and impossible."""
    odd = [f"{name}={getattr(cfg, name)}" for name in ("width", "block_size") if getattr(cfg, name) % GRANULE]
    on_cuda, obstacle = device.type == "cuda", ""
    if odd:
        obstacle = f"{', '.join(odd)} not a multiple of {GRANULE}"
    elif on_cuda and dtype is not torch.bfloat16:
        obstacle = "activations are not bfloat16"
    elif on_cuda and not compiled:
        obstacle = "the model is not compiled"
    elif not has_fp8(device):
        obstacle = f"no FP8 matmuls on this {device.type}"
    if cfg.fp8 and obstacle:
        raise ConfigError(f"fp8 cannot be used: {obstacle}; use --no-fp8")
    if cfg.fp8 is not None:
        return cfg.fp8, "asked for"
    if obstacle:
        return False, obstacle
    return (True, "the GPU has FP8 matmuls") if on_cuda else (False, "only worthwhile on CUDA")


def use_compile_cache(folder: Path) -> None:
    """Keep compiled code in `folder`, so that the next start need not compile; unless the environment names another.

    Comes before anything is compiled: torch then writes its own choice, a folder that may not outlive the machine's next
    start, into the environment. Torch also keeps derived gradients, but by default not those of a graph with an
    autograd.Function in it; its forward and backward are part of the graph, so that a changed one is not taken for the old.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
