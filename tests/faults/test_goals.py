"""What a run promises under faults drawn at random, in a short form; benchmarks/reliability.py runs the long one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.dist import new_store, run_ranks
from test_checkpoint import assert_is_step, on_ranks, reseal, save
from test_training import assert_same_state, assert_same_training, curve, state_of

from faults.harness import dice, fork_together, repeats, wait
from faults.torchrun import is_alive
from speedrun_mup.config import TrainConfig, make_config
from speedrun_mup.config_file import from_json, to_json
from speedrun_mup.core.errors import ConfigError, NonFiniteError, UserError
from speedrun_mup.core.utils import World
from speedrun_mup.training.checkpoint import MANIFEST, CheckpointError, DamagedCheckpoint, Loaded
from speedrun_mup.training.run import Run, train

STRICT = {"width": 32, "deterministic": True, "iterations": 12, "save_every": 2, "val_every": 4, "timeout_s": 30.0}


def rank_life(cfg: TrainConfig, rank: int, size: int, port: int) -> None:
    """One rank's part in a life of a run, as torchrun would start it."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update(meeting, RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    try:
        os._exit(0 if train(cfg).finished else 75)
    except UserError as fault:
        os._exit(fault.exit_code)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.usefixtures("warm")
def test_killed_lives_over_world_sizes(tiny, monkeypatch):
    """One random rank or all are killed at a random time, and 1, 2 or 4 ranks go on: bitwise the run of one process."""
    monkeypatch.setattr("speedrun_mup.core.distributed.ROLL_CALL_S", 0.2)
    begun = time.monotonic()
    whole = train(tiny(name="whole", **STRICT))
    duration, rng, killed, runs = time.monotonic() - begun, dice(5), 0, 0
    while killed < repeats(4):
        cfg, runs, finished = tiny(name=f"cut {runs}", **STRICT), runs + 1, False
        folder = Path(cfg.out) / str(cfg.name)
        while not finished:
            size, store = rng.choice((1, 2, 4)), new_store()
            resumed = dataclasses.replace(cfg, resume=str(folder) if (folder / "config.json").exists() else None)
            ranks = fork_together([partial(rank_life, resumed, rank, size, store.port) for rank in range(size)])
            victims = rng.choice((ranks, [rng.choice(ranks)])) if killed < repeats(4) else []
            deadline = time.monotonic() + duration * rng.uniform(0.1, 1.0) * size
            while victims and time.monotonic() < deadline and all(map(is_alive, ranks)):
                time.sleep(0.005)
            hit = [pid for pid in victims if is_alive(pid)]
            for pid in hit:
                os.kill(pid, signal.SIGKILL)
            killed += bool(hit)
            codes = [wait(pid) for pid in ranks]
            finished = not any(codes)
            assert set(codes) <= {0, 6, -signal.SIGKILL}, codes
        assert_same_training(whole, dataclasses.replace(whole, folder=folder))


@pytest.mark.dist
def test_a_nan_anywhere_stops_before_the_update(tiny):
    """Any step, rank, parameter and entry."""
    rng = dice(6)
    with closing(Run(tiny(name="names", width=32), World())) as run:
        sizes = {name: p.numel() for name, p in run.model.named_parameters()}
    for trial in range(repeats(3)):
        step, culprit, name = rng.randrange(6), rng.randrange(2), rng.choice(sorted(sizes))
        entry, value = rng.randrange(sizes[name]), rng.choice((float("nan"), float("inf"), float("-inf")))
        cfg = tiny(name=f"nan {trial}", width=32, val_every=0)

        def work(world: World, cfg=cfg, step=step, culprit=culprit, name=name, entry=entry, value=value) -> bool:
            with closing(Run(cfg, world)) as run:
                before = {}

                def observe(now, model, batches):
                    before.clear()
                    before.update(state_of(run))
                    if now == step and world.rank == culprit:

                        def poison(grad):
                            flat = grad.clone()
                            flat.view(-1)[entry] = value
                            return flat

                        model.get_parameter(name).register_hook(poison)

                with pytest.raises(NonFiniteError, match=f"step {step}: not finite on rank {culprit}: {name};"):
                    run.train(observe)
                after = state_of(run)
                new = {key: torch.zeros_like(after[key]) for key in after.keys() - before.keys()}  # at step 0
                assert_same_state(after, before | new)
                return True

        assert run_ranks(2, work) == [True, True]


@pytest.mark.slow
@pytest.mark.dist
def test_without_strict_ranks_change_little(tiny):
    """Relative difference of the loss at step 100 between 1 and 4 ranks: below 1e-4."""
    settings = {"width": 32, "iterations": 101, "val_every": 0, "save": False}
    alone = train(tiny(name="1", **settings))
    assert run_ranks(4, lambda world: train(tiny(name="4", **settings)).finished, 300) == [True] * 4
    ours, theirs = (dict(curve(folder))[100] for folder in (alone.folder, alone.folder.with_name("4")))
    assert ours == pytest.approx(theirs, rel=1e-4)


# --- mutations


def mutated(data: bytes, rng) -> bytes:
    """`data` after one to three small accidents: bits, bytes, cuts, repeats, other numbers."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed) or 1)
        match rng.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[at : at + rng.randint(1, 40)]
            case 2:
                changed[at:at] = changed[at : at + rng.randint(1, 40)]
            case 3:
                changed[at:at] = rng.choice([b"\0", b"\xff\xfe", b'"', b"{", b"]", b"NaN", b"1e999", b"-1", b"null"])
            case 4:
                digits = [i for i, byte in enumerate(changed) if 48 <= byte <= 57] or [0]
                changed[rng.choice(digits) :][:1] = b"9"
                changed[rng.choice(digits) : rng.choice(digits)] = b"9" * rng.randint(1, 20)
            case 5:
                changed = changed[:at]
    return bytes(changed)


@pytest.mark.slow
def test_fuzzed_checkpoints(tmp_path):
    """A mutated file, half of the time sealed again as somebody who knows the format could: refused or loaded right."""
    for step in (1, 2):
        on_ranks(2, lambda world, step=step: save(tmp_path, step, world))
    folder, rng, refused = tmp_path / "step-00000002", dice(7), 0
    kept = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    for _ in range(repeats(150)):
        name, resealed = rng.choice(sorted(kept)), rng.random() < 0.5
        data = mutated(kept[name], rng)
        (folder / name).write_bytes(data)
        if resealed and name != MANIFEST:
            entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            reseal(folder, lambda body, name=name, entry=entry: body["files"].update({name: entry}))
        try:
            loaded = Loaded(folder)
            for key, size in loaded.optim_sizes.items():
                loaded.slice(key, 0, size)
        except CheckpointError as fault:
            assert isinstance(fault, DamagedCheckpoint) or "schema" in str(fault)
            assert "\n" not in str(fault) and str(folder) in str(fault)
            refused += 1
        else:
            if not resealed or name == MANIFEST:
                assert data == kept[name]
                assert_is_step(loaded, 2)
        for name, data in kept.items():
            (folder / name).write_bytes(data)
    assert refused > repeats(150) * 0.6
    assert_is_step(Loaded(folder), 2)


def test_fuzzed_configs(tmp_path):
    """A mutated config.json is refused in one line, or is a valid config that says just what the file says."""
    rng, refused = dice(8), 0
    text = to_json(make_config("laptop", {"seed": 3})).encode()
    for _ in range(repeats(150)):
        data = mutated(text, rng)
        try:
            cfg = from_json(data.decode(errors="surrogateescape"), tmp_path / "config.json")
        except ConfigError as fault:
            assert str(fault).startswith(f"{tmp_path / 'config.json'} is not a valid config (") and "\n" not in str(
                fault
            )
            refused += 1
        else:
            told = json.loads(data.decode(errors="surrogateescape"))
            assert all(getattr(cfg, name) == value for name, value in told.items())
            assert from_json(to_json(cfg), Path("x")) == cfg
    assert refused > repeats(150) * 0.5


@pytest.mark.slow
def test_a_corrupt_config_does_not_end_the_search_for_a_run(tiny):
    """--resume auto meets a folder whose config cannot be read: it goes on to the next, with a line."""
    from helpers.runs import newest_unfinished

    from speedrun_mup.training.run_folder import claim_unfinished

    out, said = Path(tiny().out), list[str]()
    with closing(Run(tiny(name="a", iterations=1), World())):
        pass
    shutil.copytree(out / "a", out / "b")
    (out / "b" / "status.json").write_bytes(b"\xff{")
    (out / "b" / "config.json").write_bytes(b"\xff{")
    assert newest_unfinished(out) == out / "a"
    lock = claim_unfinished(out, say=said.append)
    assert lock and lock.folder == out / "a"
    assert len(said) == 1 and "config.json is not a valid config" in said[0] and str(out / "b") in said[0]


@pytest.mark.slow
def test_this_machine_gives_the_same_bits_every_time(tiny):
    """Three runs of one seed in float32 and in bfloat16: one result each."""
    for dtype in ("float32", "bfloat16"):
        runs = [train(tiny(name=f"{dtype} {i}", dtype=dtype, width=32, iterations=3)) for i in range(3)]
        for other in runs[1:]:
            assert_same_training(runs[0], other)
        assert torch.isfinite(torch.tensor(runs[0].val_loss))
