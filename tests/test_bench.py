"""The stopwatch with a clock of our own, and the benchmark on a model that trains in milliseconds."""

from __future__ import annotations

import json
import statistics
import time

import pytest
import torch
from helpers.dist import run_ranks

from speedrun_mup import bench as bench_module
from speedrun_mup import bench_generate
from speedrun_mup.bench import PHASES, Stopwatch, TimedWorld, bench
from speedrun_mup.cli import main
from speedrun_mup.core.model import GPT
from speedrun_mup.core.utils import World
from speedrun_mup.training.flops import attention_flops, weight_flops
from speedrun_mup.training.model_config import Vocabulary, model_config
from speedrun_mup.training.run import Run

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """clock(s) lets s seconds pass."""
    now = [0.0]
    monkeypatch.setattr(bench_module.time, "perf_counter", lambda: now[0])

    def let_pass(seconds: float) -> None:
        now[0] += seconds

    return let_pass


@pytest.fixture
def no_ceilings(monkeypatch):
    """Leave out what takes most of the time."""
    monkeypatch.setattr(bench_module, "ceilings", lambda device, dtype, fp8: {"matmul": 1e12, "copy": 1e10})


def test_an_inner_phase_stops_the_clock_of_the_outer_one(clock):
    watch = Stopwatch(CPU)
    for factor in (1, 10):
        with watch("other"):
            clock(0.001 * factor)
            with watch("optimizer"):
                clock(0.002 * factor)
                with watch("communication"):
                    clock(0.004 * factor)
                clock(0.008 * factor)
            clock(0.016 * factor)
        clock(5)  # between laps nobody counts
    none = dict.fromkeys(PHASES, 0)
    expected = {"other": 17, "optimizer": 10, "communication": 4}
    assert [{name: round(ms, 6) for name, ms in lap.items()} for lap in watch.laps()] == [
        none | expected,
        none | {name: 10 * ms for name, ms in expected.items()},
    ]


def test_a_phase_that_fails_is_closed():
    watch = Stopwatch(CPU)
    with pytest.raises(RuntimeError), watch("other"), watch("forward"):
        raise RuntimeError
    with watch("other"):
        pass
    assert len(watch.laps()) == 2


def waiting(world: World) -> tuple[float, float]:
    """Seconds that rank 0 takes to arrive, and milliseconds that this rank counts as communication."""
    watch = Stopwatch(CPU)
    timed = TimedWorld(**vars(world), watch=watch)
    with watch("other"):
        if world.rank == 0:
            time.sleep(0.3)
        total = torch.ones(())
        timed.all_reduce(total).wait()
        part, scattered = timed.reduce_scatter(torch.arange(4.0))
        scattered.wait()
        full, gathered = timed.all_gather(part)
        gathered.wait()
    assert total == 2 and torch.equal(full, 2 * torch.arange(4.0))
    return watch.laps()[0]["communication"]


@pytest.mark.dist
def test_waiting_for_another_rank_is_communication():
    late, early = run_ranks(2, waiting)
    assert early > 200 > late


def test_alone_there_is_no_communication():
    watch = Stopwatch(CPU)
    with watch("other"):
        TimedWorld(watch=watch).all_reduce(torch.ones(())).wait()
    assert watch.laps()[0]["communication"] == 0


@pytest.mark.slow
def test_a_benchmark_adds_up(tiny):
    cfg = tiny()
    began = time.perf_counter()
    result = bench(cfg, steps=4, began=began, profiled=True)
    wall = time.perf_counter() - began
    assert result.steps == len(result.step_ms) == 4 and result.ranks == 1 and result.device == "cpu"
    assert statistics.fmean(result.step_ms) == pytest.approx(sum(result.phases_ms.values()))
    assert result.tokens_per_s == pytest.approx(512 * 4 / (sum(result.step_ms) / 1e3))
    assert all(result.phases_ms[name] > 0 for name in ("data", "forward", "backward", "optimizer", "other"))
    assert result.phases_ms["communication"] == 0
    assert 0 < result.warmup_s < result.start_s < wall
    assert result.mfu is None and result.data_sheet_flops is None
    assert result.measured.keys() == {"matmul", "copy"} and all(rate > 1e6 for rate in result.measured.values())
    assert 0 < result.peak_memory_gib["training"] < 64
    assert result.profile[0]["ms"] >= result.profile[-1]["ms"] > 0
    assert sum(row["share"] for row in result.profile) <= 1
    assert any(row["name"] == "aten::mm" for row in result.profile)
    assert json.loads(result.to_json())["settings"]["width"] == 64
    assert "tokens/s" in result.summary() and "no data sheet known" in result.summary()


@pytest.mark.slow
def test_a_strict_benchmark_is_deterministic_as_strict_training_is(tiny, no_ceilings, monkeypatch):
    found, whole = [], Run.take_step
    monkeypatch.setattr(
        Run,
        "take_step",
        lambda run, *args: found.append(torch.are_deterministic_algorithms_enabled()) or whole(run, *args),
    )
    for strict in (True, False):
        bench(tiny(deterministic=strict), steps=1, began=0.0)
    assert found == [True, False]


@pytest.mark.slow
def test_flops_are_those_of_the_model_and_of_the_batches(tiny, no_ceilings):
    cfg = tiny()
    result = bench(cfg, steps=2, began=0.0)
    shape = model_config(cfg, Vocabulary(result.vocab))
    parameters = GPT(shape).named_parameters()
    matrices = sum(p.numel() for name, p in parameters if p.ndim > 1 and "embed" not in name and "lambdas" not in name)
    assert result.flops["6N"] == 6 * matrices == weight_flops(shape)
    assert result.flops["6N"] < result.flops["masked"] < result.flops["window"]
    assert result.achieved_flops["6N"] == result.flops["6N"] * result.tokens_per_s
    # In the first step every window is one block: a query sees what is before it in block and document.
    assert result.flops["masked"] < result.flops["6N"] + attention_flops(shape, 64, 32)
    assert bench(cfg, steps=2, began=0.0).flops == result.flops


@pytest.mark.dist
def test_tokens_a_second_are_those_of_all_ranks_and_flops_those_of_one(tiny):
    for result in run_ranks(2, lambda world: vars(bench(tiny(), steps=2, began=0.0))):
        assert result["tokens_per_s"] == pytest.approx(512 * 2 / (sum(result["step_ms"]) / 1e3))
        assert result["achieved_flops"]["6N"] == result["flops"]["6N"] * result["tokens_per_s"] / 2


@pytest.mark.slow
def test_the_share_of_a_known_devices_peak(tiny, no_ceilings):
    result = bench(tiny(), steps=1, began=0.0)
    known = bench_module.replace(
        result, data_sheet_flops=989.4e12, mfu={name: rate / 989.4e12 for name, rate in result.achieved_flops.items()}
    )
    assert "989.4 TFLOP/s (data sheet)" in known.summary()


@pytest.mark.slow
def test_on_the_command_line(capsys, no_ceilings):
    flags = "--preset laptop --data synthetic --device cpu --width 64 --n-layer 6 --micro-batches 1 --steps 2"
    assert main(["bench", *flags.split(), "--val-tokens", "4096", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["steps"] == 2 and out["settings"]["width"] == 64
    assert main(["bench", "--steps", "x"]) == 2
    capsys.readouterr()
    assert main(["bench", "--steps", "0"]) == 2
    assert capsys.readouterr().err == "error: argument --steps: it must be at least 1, not 0\n"


@pytest.mark.parametrize("flags", [["--steps", "28"], ["--profile"]])
def test_flags_of_training_steps_are_refused_where_text_is_written(flags, capsys):
    assert main(["bench", "--generate", *flags]) == 2
    assert capsys.readouterr().err == f"error: {flags[0]} is about training steps; leave out --generate\n"


@pytest.mark.slow
def test_writing_is_measured(tiny, monkeypatch, capsys):
    """Every number is there and positive; the memory is that of the long and short windows' keys and values."""
    monkeypatch.setattr(bench_generate, "WRITTEN", 3)
    cfg = tiny(width=32)
    found = bench_generate.bench_generation(cfg)
    assert found.first_token_ms.keys() == {1, 512} and found.tokens_per_s.keys() == {1, 8}
    assert found.token_ms.keys() == {96, 8 * 96}
    assert min(*found.first_token_ms.values(), *found.tokens_per_s.values(), *found.token_ms.values()) > 0
    model = GPT(model_config(cfg, Vocabulary(65)))
    layers = [block.attn.has_long_window for block in model.blocks if block.attn is not None]
    tokens = sum(96 if long else 32 for long in layers)
    assert found.cache_mib == 2 * 4 * 32 * tokens / 2**20
    flags = "--preset laptop --data synthetic --device cpu --width 32 --head-dim 16 --block-size 32 --window-tokens 96"
    assert main(["bench", "--generate", "--json", *flags.split()]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == found.parameters
    assert main(["bench", "--generate", *flags.split()]) == 0
    assert "samples side by side: " in capsys.readouterr().out
