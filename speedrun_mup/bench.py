"""How fast a training step is here, where its time goes, and what the device could do at best."""

# T tokens of a micro-batch, N micro-batches of a step

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.kernels.fp8 import E4M3
from speedrun_mup.core.model.attention import document_numbers
from speedrun_mup.core.utils import Handle, World, deterministic, join_world, leave_world
from speedrun_mup.data.batches import Batch
from speedrun_mup.files import strict_json
from speedrun_mup.training.flops import attention_flops, flops_per_token, keys_seen, weight_flops
from speedrun_mup.training.run import Run

PHASES = ("data", "forward", "backward", "optimizer", "communication", "other")
# Dense bfloat16, from NVIDIA's data sheets; the first entry that is part of the device's name.
DATASHEET_FLOPS = {"H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "RTX 4090": 165.2e12}
GIB = 2**30


class Stopwatch:
    """Time by phase, one lap per outermost phase; an inner phase stops the clock of the one around it.

    Marks are events in the device's stream on CUDA, so that measuring never makes host or device wait; MPS has to wait.
    """

    def __init__(self, device: torch.device):
        self._device, self._on_cuda = device, device.type == "cuda"
        self._laps: list[list[tuple[Any, str]]] = []
        self._open: list[str] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what happens inside as `phase`."""
        if not self._open:
            self._laps.append([])
        self._open.append(phase)
        self._mark(phase)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1] if self._open else "")

    def _mark(self, phase: str) -> None:
        """From now on, time is that of `phase`."""
        if self._on_cuda:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            wait_for(self._device)
            now = time.perf_counter()
        self._laps[-1].append((now, phase))

    def laps(self) -> list[dict[str, float]]:
        """Milliseconds by phase of every lap; waits for the device."""
        wait_for(self._device)
        found = []
        for marks in self._laps:
            times: dict[str, float] = dict.fromkeys(PHASES, 0.0)
            for (begin, phase), (end, _) in pairwise(marks):
                times[phase] += begin.elapsed_time(end) if self._on_cuda else 1e3 * (end - begin)
            found.append(times)
        return found


@dataclass(frozen=True)
class TimedWorld(World):
    """A World that counts waiting for others as communication: what is hidden behind work does not show."""

    watch: Stopwatch | None = None

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Handle:
        """Sum over ranks, as World does it, timed."""
        return self._timed(super().all_reduce(tensor, op))

    def reduce_scatter(self, full: Tensor) -> tuple[Tensor, Handle]:
        """Reduce and scatter, as World does it, timed."""
        part, handle = super().reduce_scatter(full)
        return part, self._timed(handle)

    def all_gather(self, part: Tensor) -> tuple[Tensor, Handle]:
        """All-gather, as World does it, timed."""
        full, handle = super().all_gather(part)
        return full, self._timed(handle)

    def _timed(self, handle: Handle) -> Handle:
        watch = self.watch
        if watch is None or self.size == 1:
            return handle

        def wait() -> None:
            with watch("communication"):
                handle.wait()

        return Handle(wait)


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark found. FLOPs are per token, FLOP/s of one rank, tokens/s of all, mfu shares of the data sheet's peak.

    flops: "6N" counts matrices alone; "masked" adds attention over the keys that window and documents allow, counted on
    the batches; "window" adds attention over the window, as if documents had no end. data_sheet_flops: None if unknown.
    measured: this device's own rate of a large matmul and of a copy (bytes read and written).
    """

    device: str
    torch: str
    settings: dict[str, Any]
    vocab: int
    chosen: str
    ranks: int
    steps: int
    step_ms: list[float]
    phases_ms: dict[str, float]
    tokens_per_s: float
    flops: dict[str, float]
    achieved_flops: dict[str, float]
    data_sheet_flops: float | None
    mfu: dict[str, float] | None
    measured: dict[str, float]
    peak_memory_gib: dict[str, float]
    start_s: float
    warmup_s: float
    graphs_in_warmup: int
    graphs_after: int
    profile: list[dict[str, Any]]

    def to_json(self) -> str:
        """All numbers as strict JSON."""
        return strict_json(asdict(self), indent=1)

    def summary(self) -> str:
        """All numbers as lines for a terminal."""
        total = sum(self.phases_ms.values())
        shares = ", ".join(f"{name} {ms:.1f} ({ms / total:.0%})" for name, ms in self.phases_ms.items())
        rates = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in self.achieved_flops.items())
        ceilings = ", ".join(f"{name} {_readable(name, rate)}" for name, rate in self.measured.items())
        memory = ", ".join(f"{name} {gib:.2f}" for name, gib in self.peak_memory_gib.items())
        counted = ", ".join(f"{name} {flops / 1e6:,.1f}" for name, flops in self.flops.items())
        lines = [
            f"{self.device}, torch {self.torch}; {self.ranks} rank(s), vocabulary {self.vocab:,}",
            self.chosen,
            f"speed: {self.tokens_per_s:,.0f} tokens/s, {statistics.median(self.step_ms):.1f} ms a step (median of "
            f"{self.steps} steps over the whole window schedule)",
            f"step, ms: {shares}",
            f"formula: 6 x matrix weights + 12 x width x keys x attention layers; MFLOP per token: {counted}",
            f"TFLOP/s of a rank: {rates}; measured here: {ceilings}",
            "MFU: " + self._mfu_line(),
            f"peak memory, GiB: {memory}",
            f"start: {self.start_s:.1f} s to the first step's end, {self.warmup_s:.1f} of them warming up; "
            f"{self.graphs_in_warmup} graphs compiled then, {self.graphs_after} afterwards",
        ]
        for row in self.profile:
            lines.append(f"  {row['ms']:9.2f} ms {row['share']:6.1%} {row['calls']:6.0f} x  {row['name'][:90]}")
        return "\n".join(lines)

    def _mfu_line(self) -> str:
        if self.mfu is None:
            share = self.achieved_flops["masked"] / self.measured["matmul"]
            return f"no data sheet known for this device; {share:.1%} of the measured matmul"
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.mfu.items())
        return f"{shares} of {(self.data_sheet_flops or 0) / 1e12:.1f} TFLOP/s (data sheet)"


def _readable(name: str, rate: float) -> str:
    return f"{rate / 1e9:,.1f} GB/s" if name == "copy" else f"{rate / 1e12:.2f} TFLOP/s"


def bench(cfg: TrainConfig, steps: int, began: float, profiled: bool = False) -> BenchResult:
    """Train `steps` steps, over which the window grows as in a whole run, and say what they cost.

    began: time.perf_counter() when this process started. profiled: profile one more step, in the middle of the schedule.
    """
    with tempfile.TemporaryDirectory() as mine:
        world = join_world(cfg.device, cfg.timeout_s, cfg.deterministic)
        out = world.from_main(mine)
        quiet: dict[str, Any] = {"out": out, "resume": None, "save": False, "progress": False, "track": "none"}
        cfg = replace(cfg, iterations=steps, kernel_warmup=max(cfg.kernel_warmup, 1), **quiet)
        watch = Stopwatch(world.device)
        try:
            timed = TimedWorld(**vars(world), watch=watch)
            with deterministic(cfg.deterministic), closing(Run(cfg, timed)) as run:
                return measure(run, watch, began, profiled)
        finally:
            leave_world()


@dataclass
class _Timed:
    """What was taken down while training. keys: that a query sees with the long and the short window, of each step."""

    warmup_s: float = 0.0
    start_s: float = 0.0
    graphs_in_warmup: int = 0
    graphs_after: int = 0
    memory: dict[str, float] = field(default_factory=dict)
    keys: list[tuple[float, float]] = field(default_factory=list)
    laps: list[dict[str, float]] = field(default_factory=list)
    profile: list[dict[str, Any]] = field(default_factory=list)


def measure(run: Run, watch: Stopwatch, began: float, profiled: bool) -> BenchResult:
    """The benchmark itself, on a run that has not trained yet."""
    cfg, ranks, device = run.cfg, run.world.size, run.world.device
    timed = _train_and_time(run, watch, began, profiled)
    step_ms = [sum(lap.values()) for lap in timed.laps]
    tokens_per_s = cfg.schedule.tokens / (sum(step_ms) / 1e3)
    shape = run.model.cfg
    weights = [run.schedule.at(step).tokens for step in range(cfg.iterations)]
    long, short = (statistics.fmean(seen, weights) for seen in zip(*timed.keys, strict=True))
    flops = {
        "6N": weight_flops(shape),
        "masked": weight_flops(shape) + attention_flops(shape, long, short),
        "window": flops_per_token(cfg, run.corpus.vocab_size),
    }
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else device.type
    peak = next((peak for part, peak in DATASHEET_FLOPS.items() if part in name), None) if on_cuda else None
    achieved = {formula: count * tokens_per_s / ranks for formula, count in flops.items()}
    return BenchResult(
        device=name,
        torch=torch.__version__,
        settings=asdict(cfg),
        vocab=run.corpus.vocab_size,
        chosen=run.passes.describe(),
        ranks=ranks,
        steps=cfg.iterations,
        step_ms=step_ms,
        phases_ms={phase: statistics.fmean(lap[phase] for lap in timed.laps) for phase in PHASES},
        tokens_per_s=tokens_per_s,
        flops=flops,
        achieved_flops=achieved,
        data_sheet_flops=peak,
        mfu={formula: rate / peak for formula, rate in achieved.items()} if peak else None,
        measured=ceilings(device, run.model.cfg.embed_dtype, run.model.cfg.fp8),
        peak_memory_gib=timed.memory,
        start_s=timed.start_s,
        warmup_s=timed.warmup_s,
        graphs_in_warmup=timed.graphs_in_warmup,
        graphs_after=timed.graphs_after,
        profile=timed.profile,
    )


def _train_and_time(run: Run, watch: Stopwatch, began: float, profiled: bool) -> _Timed:
    """Warm up, then train all steps under the stopwatch, and one more under the profiler if that is wanted."""
    world, device, steps, timed = run.world, run.world.device, run.cfg.iterations, _Timed()
    warming = time.perf_counter()
    run.warm_up_kernels()
    wait_for(device)
    timed.warmup_s, timed.graphs_in_warmup = time.perf_counter() - warming, graphs_compiled()
    timed.memory["warmup and validation"] = _peak_memory(device)
    run.passes.phase = watch
    with closing(run.passes.batches.stream(0, world.rank, world.size)) as stream:
        for step in range(steps):
            with watch("other"):
                with watch("data"):
                    micro_batches = next(stream)
                run.take_step(micro_batches, step)
                run.process_pending_steps(at_once=False)
            if step == 0:
                wait_for(device)
                timed.start_s = time.perf_counter() - began
            timed.keys.append(_mean_keys(run, micro_batches, step))
        run.process_pending_steps()
        timed.laps = watch.laps()[-steps:]
        timed.memory["training"] = _peak_memory(device)
        timed.graphs_after = graphs_compiled() - timed.graphs_in_warmup
        timed.profile = profile_step(run, next(stream), steps // 2) if profiled else []
    return timed


def graphs_compiled() -> int:
    """How many graphs torch.compile has made in this process."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds
        return 0
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _mean_keys(run: Run, micro_batches: list[Batch], step: int) -> tuple[float, float]:
    """Keys that a query sees in layers with the long and with the short window, on these batches."""
    cfg = run.cfg
    window = run.schedule.at(step).window
    docs = [document_numbers(run.passes.sequences(batch, step)[0], run.corpus.bos_token) for batch in micro_batches]
    long, short = (
        statistics.fmean(keys_seen(doc, reach, cfg.block_size) for doc in docs) for reach in (window, window // 2)
    )
    return long, short


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def _peak_memory(device: torch.device) -> float:
    """GiB: the most that tensors took since the last call on CUDA; elsewhere the most that the process took so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def profile_step(run: Run, micro_batches: list[Batch], step: int, most: int = 20) -> list[dict[str, Any]]:
    """The most expensive ops (on CUDA: kernels) of one step: name, calls, ms, share of all."""
    on_cuda = run.world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    wait_for(run.world.device)
    with profile(activities=activities, acc_events=True) as profiler:
        run.take_step(micro_batches, step)
        wait_for(run.world.device)
    run.process_pending_steps()

    def took(entry: Any) -> float:
        return entry.self_device_time_total if on_cuda else entry.self_cpu_time_total

    entries = [
        entry
        for entry in profiler.key_averages()
        if took(entry) > 0
        and (not on_cuda or entry.device_type == torch.autograd.DeviceType.CUDA)
        and not entry.key.startswith("Optimizer.step#")  # a range around kernels that are there themselves
    ]
    total = sum(map(took, entries))
    return [
        {"name": entry.key, "calls": entry.count, "ms": took(entry) / 1e3, "share": took(entry) / total}
        for entry in sorted(entries, key=took, reverse=True)[:most]
    ]


def ceilings(device: torch.device, dtype: torch.dtype, fp8: bool) -> dict[str, float]:
    """What this device reaches: FLOP/s of a large square matmul, bytes/s of a large copy, on random data."""
    side, size = (8192, 2**29) if device.type == "cuda" else (1024, 2**25)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    found = {"matmul": 2 * side**3 / seconds(lambda: a @ b, device)}
    if fp8 and device.type == "cuda":
        a8, b8, one = a.to(E4M3), b.to(E4M3), torch.ones((), device=device)
        found["fp8 matmul"] = (
            2
            * side**3
            / seconds(
                lambda: torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True), device
            )
        )
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * 4 * size / seconds(lambda: target.copy_(source), device)
    return found


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median time of `work`, after three calls to warm up."""
    watch = Stopwatch(device)
    for _ in range(repeats + 3):
        with watch("other"):
            work()
    return statistics.median(lap["other"] for lap in watch.laps()[3:]) / 1e3
