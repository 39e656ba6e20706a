"""What is chosen for which device, with a device that is pretended where this machine has none."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from contextlib import closing
from fractions import Fraction

import pytest
import torch

from speedrun_mup.config import TrainConfig, make_config
from speedrun_mup.core.errors import ConfigError, OutOfMemory
from speedrun_mup.core.model.attention import BACKENDS
from speedrun_mup.core.optimizers import Muon
from speedrun_mup.core.utils import World, is_out_of_memory
from speedrun_mup.training import hardware
from speedrun_mup.training.hardware import (
    pick_attention,
    pick_compile,
    pick_dtype,
    pick_fp8,
)
from speedrun_mup.training.memory import fit_micro_batch, fit_val_chunk, micro_batches_at_once
from speedrun_mup.training.passes import Passes
from speedrun_mup.training.run import Run, train
from speedrun_mup.training.schedules import BATCH_SCHEDULES, Stage
from speedrun_mup.training.tracking import read_metrics

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
BF16, FP32 = torch.bfloat16, torch.float32


def test_types_are_float32_unless_a_gpu_computes_in_bfloat16(monkeypatch):
    cfg = TrainConfig()
    assert pick_dtype(cfg, CPU) is FP32 and pick_dtype(cfg, MPS) is FP32
    for has, dtype in ((True, BF16), (False, FP32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert pick_dtype(cfg, CUDA) is dtype
    assert pick_dtype(TrainConfig(dtype="bfloat16"), CPU) is BF16


def test_compiling_is_for_cuda_where_it_works(monkeypatch):
    assert pick_compile(TrainConfig(), CPU) == (False, "only worthwhile on CUDA")
    assert pick_compile(TrainConfig(compile=True), CPU) == (True, "asked for")
    assert pick_compile(TrainConfig(compile=False), CPU) == (False, "only worthwhile on CUDA")
    for without in (TrainConfig(compile=False), make_config("laptop", {})):
        assert pick_compile(without, CUDA) == (False, "by flag or preset")

    def fails(function):
        raise ImportError("no triton")

    def is_full(function, **options):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "compile", is_full)
    with pytest.raises(RuntimeError, match="out of memory"):  # of this moment, and no reason to do without
        pick_compile(TrainConfig(), CUDA)
    with pytest.raises(RuntimeError, match="out of memory"):
        hardware._try_flex(16, 16, CPU, FP32)
    monkeypatch.setattr(torch, "compile", fails)
    assert pick_compile(TrainConfig(), CUDA) == (False, "torch.compile fails here: ImportError: no triton")
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    assert pick_compile(TrainConfig(), CUDA) == (True, "CUDA")


def test_flex_attention_is_for_where_its_kernels_work(monkeypatch):
    auto, flex = TrainConfig(), TrainConfig(attention="flex")
    reasons = {
        (CUDA, True): "its kernels have no tiles",
        (CUDA, False): "FlexAttention would have to be compiled",
        (CPU, True): "FlexAttention has no backward on cpu",
    }
    monkeypatch.setattr(hardware, "_try_flex", lambda *shape: "its kernels have no tiles")
    for (device, compiled), why in reasons.items():
        assert pick_attention(auto, device, BF16, compiled) == ("blocked", why)
        with pytest.raises(ConfigError, match=f"attention=flex cannot be used: {why}; use --attention blocked"):
            pick_attention(flex, device, BF16, compiled)
        for name in ("blocked", "dense"):
            assert pick_attention(TrainConfig(attention=name), device, BF16, compiled) == (name, "asked for")
    monkeypatch.setattr(hardware, "_try_flex", lambda *shape: "")
    for cfg in (auto, flex):
        assert pick_attention(cfg, CUDA, BF16, True) == ("flex", "CUDA, compiled")


@pytest.mark.slow
def test_flex_attention_is_tried_with_the_head_and_block_of_the_run():
    """Here it always fails, for want of a backward pass; the point is that this comes back as a reason."""
    hardware._try_flex.cache_clear()
    why = hardware._try_flex(16, 32, CPU, FP32)
    assert re.match(r"FlexAttention fails here with head_dim=16, block_size=32: \w+: \S", why)


@pytest.mark.gpu
def test_what_is_chosen_on_a_gpu_for_small_blocks_trains():
    """For which FlexAttention may have no tiles; with larger ones it is compared elsewhere, and compiles longer."""
    block_size = 16
    cuda, tokens, window = torch.device("cuda"), 4 * block_size, torch.full((), 2, dtype=torch.int32, device="cuda")
    name, _ = pick_attention(TrainConfig(block_size=block_size, val_chunk_tokens=tokens), cuda, FP32, True)
    doc = (torch.arange(tokens, device=cuda) > tokens // 3).int()

    def gradient(name, compiled, leaf):
        backend = BACKENDS[name]()
        attend = lambda x, window: backend.attend(x, x, x, backend.build_mask(doc, window, block_size, 2), 0.12)  # noqa: E731
        out = (torch.compile(attend, dynamic=False) if compiled else attend)(leaf, window)
        return torch.autograd.grad(out.square().sum(), leaf)[0]

    leaf = torch.randn(tokens, 2, 128, device=cuda, requires_grad=True)
    torch.testing.assert_close(gradient(name, True, leaf), gradient("dense", False, leaf), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("changes", "device", "dtype", "compiled", "expected"),
    [
        ({}, CUDA, BF16, True, (True, "the GPU has FP8 matmuls")),
        ({}, CUDA, FP32, True, (False, "activations are not bfloat16")),
        ({}, CUDA, BF16, False, (False, "the model is not compiled")),
        ({}, CPU, FP32, False, (False, "only worthwhile on CUDA")),
        ({}, MPS, BF16, True, (False, "no FP8 matmuls on this mps")),
        ({"fp8": False}, CUDA, BF16, True, (False, "asked for")),
        ({"fp8": True}, CPU, FP32, False, (True, "asked for")),
        ({"head_dim": 4, "width": 20}, CUDA, BF16, True, (False, "width=20 not a multiple of 16")),
    ],
)
def test_when_the_head_is_in_8_bits(monkeypatch, changes, device, dtype, compiled, expected):
    monkeypatch.setattr(hardware, "has_fp8", lambda device: device.type != "mps")
    assert pick_fp8(TrainConfig(**changes), device, dtype, compiled) == expected


@pytest.mark.parametrize(
    ("changes", "device", "dtype", "compiled", "fault"),
    [
        (
            {"width": 24, "head_dim": 4, "block_size": 8, "val_chunk_tokens": 64},
            *(CUDA, BF16, True),
            "width=24, block_size=8 not a multiple of 16",
        ),
        ({}, CUDA, FP32, True, "activations are not bfloat16"),
        ({}, CUDA, BF16, False, "the model is not compiled"),
        ({}, MPS, BF16, True, "no FP8 matmuls on this mps"),
    ],
)
def test_8_bits_that_cannot_work_are_an_error(monkeypatch, changes, device, dtype, compiled, fault):
    monkeypatch.setattr(hardware, "has_fp8", lambda device: device.type != "mps")
    with pytest.raises(ConfigError, match=f"fp8 cannot be used: {fault}; use --no-fp8"):
        pick_fp8(TrainConfig(fp8=True, **changes), device, dtype, compiled)


def test_a_pass_takes_as_many_micro_batches_as_the_device_likes():
    small = TrainConfig(micro_batch_tokens=2048, micro_batches=8, val_chunk_tokens=2048)
    assert [micro_batches_at_once(small, ranks, CPU) for ranks in (1, 2, 4, 8)] == [4, 4, 2, 1]
    assert micro_batches_at_once(small, 1, CUDA) == 8 and micro_batches_at_once(TrainConfig(), 1, CUDA) == 1
    assert micro_batches_at_once(dataclasses.replace(small, micro_batches_per_forward=3), 1, CPU) == 3


@pytest.mark.parametrize(
    ("most", "expected"), [(2048, (256, 8, 8)), (1024, (256, 8, 4)), (300, (256, 8, 1)), (128, (128, 16, 1))]
)
def test_memory_decides_first_on_the_pass_then_on_the_micro_batch(tiny, most, expected):
    """The tokens of a step stay the same."""
    cfg = tiny(fit_memory=True, micro_batch_tokens=256, micro_batches=8)
    found = fit_micro_batch(cfg, 8, lambda cfg: cfg.micro_batches_per_forward * cfg.micro_batch_tokens <= most)
    assert (found.micro_batch_tokens, found.micro_batches, found.micro_batches_per_forward) == expected
    assert not found.fit_memory and found.schedule.at(0).tokens == cfg.schedule.at(0).tokens


def test_a_micro_batch_of_one_block_that_does_not_fit_is_an_error(tiny):
    with pytest.raises(ConfigError, match="a micro-batch of 32 tokens does not fit .* block_size=32; use a smaller"):
        fit_micro_batch(tiny(fit_memory=True), 1, lambda cfg: False)


@pytest.mark.parametrize(
    ("whole", "most", "expected"), [(256, 256, 256), (256, 255, 128), (256, 32, 32), (224, 96, 96)]
)
def test_memory_decides_on_the_validation_chunk(tiny, whole, most, expected):
    """An odd number of blocks (of 32) loses one."""
    found = fit_val_chunk(tiny(val_chunk_tokens=whole), lambda cfg: cfg.val_chunk_tokens <= most)
    assert found == tiny(val_chunk_tokens=expected)
    with pytest.raises(
        ConfigError, match="a validation chunk of 32 tokens does not fit .* block_size=32; use a smaller"
    ):
        fit_val_chunk(tiny(), lambda cfg: False)


def no_memory_above(most: int, monkeypatch):
    """Let a pass over more than `most` tokens fail as it does on a full GPU."""
    passes, chunk = Passes.accumulate_gradients, Passes.chunk_loss

    def fill(tokens: int) -> None:
        if tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")

    def limited(run, micro_batches, step):
        fill(run.at_once * run.cfg.micro_batch_tokens)
        return passes(run, micro_batches, step)

    def limited_chunk(run, number, step):
        fill(run.cfg.val_chunk_tokens)
        return chunk(run, number, step)

    monkeypatch.setattr(Passes, "accumulate_gradients", limited)
    monkeypatch.setattr(Passes, "chunk_loss", limited_chunk)


@pytest.mark.slow
def test_a_run_finds_its_micro_batch_and_trains_as_if_it_had_been_given(tiny, monkeypatch):
    given = train(
        tiny(name="given", micro_batch_tokens=64, micro_batches=8, micro_batches_per_forward=1, val_chunk_tokens=64)
    )
    no_memory_above(64, monkeypatch)
    found = train(tiny(name="found", fit_memory=True))
    losses = [
        [record["loss"] for record in read_metrics(result.folder) if record["kind"] == "train"]
        for result in (given, found)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6 and found.val_loss == given.val_loss
    assert train(tiny(resume=str(found.folder), micro_batch_tokens=64, micro_batches=8, val_chunk_tokens=64)).finished


@pytest.mark.parametrize("kernel_warmup", [0, 1])
def test_validation_without_memory_is_one_line(tiny, monkeypatch, kernel_warmup):
    no_memory_above(200, monkeypatch)
    with pytest.raises(OutOfMemory) as fault:
        train(tiny(micro_batch_tokens=64, micro_batches=8, micro_batches_per_forward=1, kernel_warmup=kernel_warmup))
    line = (
        "step 0: no memory for validation on 256 tokens at once (Tried to allocate 9 GiB); try --val-chunk-tokens 128"
    )
    assert str(fault.value).replace("CUDA out of memory. ", "") == line


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ({"micro_batch_tokens": 224, "micro_batches": 4}, "--micro-batch-tokens 96 --micro-batches 9"),
        (
            {"micro_batch_tokens": 224, "micro_batches_per_forward": 4},
            "--micro-batches-per-forward 2, or --micro-batch-tokens 96 --micro-batches 9",
        ),
        ({"micro_batch_tokens": 32, "micro_batches": 4}, "a smaller --width"),
    ],
)
def test_training_without_memory_says_what_takes_less(tiny, monkeypatch, sizes, advice):
    no_memory_above(0, monkeypatch)
    with pytest.raises(OutOfMemory, match=f"; try {advice}$"):
        train(tiny(**{"micro_batches_per_forward": 1, "micro_batches": 4, "val_every": 0, **sizes}))


@pytest.mark.parametrize("kernel_warmup", [0, 1])
def test_an_update_without_memory_is_one_line(tiny, monkeypatch, kernel_warmup):
    def step(optimizer, good=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")

    monkeypatch.setattr(Muon, "step", step)
    with pytest.raises(OutOfMemory, match=r"^step 0: no memory for the optimizers' step .*; try a smaller --width, or"):
        train(tiny(kernel_warmup=kernel_warmup, val_every=0))


def test_a_model_without_memory_is_one_line(tiny, monkeypatch):
    def to(model, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")

    monkeypatch.setattr(torch.nn.Module, "to", to)
    with pytest.raises(OutOfMemory, match=r"^step 0: no memory for the weights \(.*\); try a smaller --width$"):
        train(tiny())


@pytest.mark.slow
@pytest.mark.parametrize(("strict", "expected"), [(False, 2), (True, 8)])
def test_memory_is_tried_with_what_a_step_holds_at_its_worst(tiny, monkeypatch, strict, expected):
    """A second pass finds the gradients of the first; a strict sum keeps those of many."""
    tried, whole = [], Passes.accumulate_gradients
    monkeypatch.setattr(
        Passes,
        "accumulate_gradients",
        lambda run, batches, step: tried.append((len(batches), step)) or whole(run, batches, step),
    )
    validated, chunk = [], Passes.chunk_loss
    monkeypatch.setattr(
        Passes, "chunk_loss", lambda run, number, step: validated.append(step) or chunk(run, number, step)
    )
    with closing(
        Run(tiny(fit_memory=True, micro_batches=8, micro_batches_per_forward=1, deterministic=strict), World())
    ):
        assert tried == [(expected, 5)] and validated == [6]  # with the widest window
    narrower = [Stage(Fraction(1, 2), 8, window=8), Stage(Fraction(1, 2), 8, window=2)]
    monkeypatch.setitem(BATCH_SCHEDULES, "narrower", lambda micro_batches: narrower)
    with closing(
        Run(
            tiny(fit_memory=True, micro_batches_per_forward=1, deterministic=strict, batch_schedule="narrower"), World()
        )
    ):
        assert tried[1:] == [(expected, 2)] and validated[1:] == [2]


@pytest.mark.gpu
def test_a_gpu_that_is_too_small_for_the_micro_batch(tiny):
    """Half of what a pass takes is all that there is; the run finds out and trains."""
    sizes = {
        "width": 256,
        "micro_batch_tokens": 16_384,
        "micro_batches": 2,
        "micro_batches_per_forward": 1,
        "device": "cuda",
        "compile": False,
    }
    world, capacity = World(device=torch.device("cuda")), torch.cuda.get_device_properties(0).total_memory
    with closing(Run(tiny(name="whole", **sizes), world)) as run:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        assert run.passes.fits(run.cfg)
        peak = torch.cuda.max_memory_allocated()
    del run
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5 * peak / capacity)
    try:
        with closing(Run(tiny(name="found", fit_memory=True, **sizes), world)) as run:
            assert run.cfg.micro_batch_tokens < sizes["micro_batch_tokens"]
            assert run.cfg.schedule.at(0).tokens == sizes["micro_batch_tokens"] * sizes["micro_batches"]
            assert run.train().finished
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_what_a_full_memory_looks_like():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: ...)"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate ..."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_run_says_in_one_line_what_was_chosen(tiny, capsys):
    with closing(Run(tiny(fp8=True), World())):
        pass
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("device:")]
    assert line == (
        "device: 1 x cpu, float32; not compiled (only worthwhile on CUDA); attention blocked (FlexAttention has no "
        "backward on cpu); head in fp8 (asked for); 4 of 4 micro-batches of 128 tokens a pass, 256 in validation"
    )


SPUN = """
import json, os, sys, time
import torch
from speedrun_mup.config import TrainConfig
from speedrun_mup.training import train

def spun():  # seconds of CPU that threads spent waiting for work
    x, before = torch.zeros(2**17), time.process_time() - time.thread_time()
    for _ in range(30):
        x.add_(1)
        time.sleep(0.002)
    return time.process_time() - time.thread_time() - before

meanwhile = []
train(TrainConfig(**json.loads(sys.argv[1])), observe=lambda *_: meanwhile.append(spun()))
print(json.dumps([max(meanwhile), spun()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or (os.cpu_count() or 1) < 2, reason="GNU's OpenMP, on two cores")
def test_threads_sleep_while_they_wait_where_torch_was_loaded_before_us(tiny):
    policy = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in policy} | {"OMP_NUM_THREADS": "2"}
    asked = [sys.executable, "-c", SPUN, json.dumps(dataclasses.asdict(tiny(iterations=3)))]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True)
    training, after = json.loads(done.stdout.splitlines()[-1])
    assert training < after / 5, (training, after)
