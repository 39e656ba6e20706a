"""One run of a sweep of this package's model: train it in a folder of its own and keep what came of it."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import io
import json
import math
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from speedrun_mup.config import TrainConfig, computed_settings, hashed_settings
from speedrun_mup.core.errors import ConfigError, Diverged, UserError
from speedrun_mup.core.utils import pick_device
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.sweep.any_sweep import AnyRun
from speedrun_mup.sweep.result import SCHEMA, RunResult, or_nan
from speedrun_mup.training.flops import run_flops
from speedrun_mup.training.hardware import pick_dtype
from speedrun_mup.training.run import train
from speedrun_mup.training.tracking import PROVENANCE, read_metrics

TAIL = 0.1  # last fraction of training whose mean loss is `train_loss`


@dataclass(frozen=True)
class RunSpec(AnyRun):
    """One run of this package's model.

    Args:
        cfg: Its settings.
        corpus: Fingerprint of its data; vocab_size: their vocabulary.
    """

    cfg: TrainConfig
    corpus: str
    vocab_size: int

    @functools.cached_property
    def id(self) -> str:
        """16 hex digits, the same wherever it runs: a hash of its arm, what it computes, and the data."""
        what = [SCHEMA, self.arm, self.corpus, hashed_settings(self.cfg)]
        text = json.dumps(what, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cached_property
    def flops(self) -> float:
        """What training it takes."""
        return run_flops(self.cfg, self.vocab_size)

    def run(self, scratch: Path) -> RunResult:
        """See `run_one`."""
        return run_one(self, scratch)


def run_one(spec: RunSpec, scratch: Path) -> RunResult:
    """Make one run in a folder of its own inside `scratch`, which is removed afterwards. Prints nothing.

    Raises what `train` raises, except for divergence, and ConfigError if this machine has other data.
    """
    began = time.perf_counter()
    corpus, _ = find_corpus(spec.cfg.data, spec.cfg.tokenizer)
    if not corpus.is_known_as(spec.corpus):
        raise ConfigError(f"data={spec.cfg.data}: not the corpus that the sweep began with; bring back the same files")
    torch.compiler.reset()  # else the ninth model that a process compiles would run uncompiled, silently
    gc.collect()  # a compiled model is in a cycle, and would keep its memory on the GPU
    folder = scratch / f"{spec.id}-{os.getpid()}"
    loss, bits, reason = math.nan, None, ""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                result = train(replace(spec.cfg, out=str(scratch), name=folder.name))
            except Diverged as fault:
                reason = str(fault)
            else:
                if not result.finished:
                    raise UserError(f"stopped by a signal at step {result.steps}; run the sweep again")
                loss, bits = or_nan(result.val_loss), result.bits_per_byte
        records = [record for record in read_metrics(folder) if record["kind"] == "train"]
        made_with = json.loads((folder / PROVENANCE).read_text().splitlines()[-1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    curve = [math.nan] * (records[-1]["step"] + 1 if records else 0)  # nan stays where a bad step was skipped
    for record in records:
        curve[record["step"]] = round(or_nan(record["loss"]), 6)
    first = next((value for value in curve if math.isfinite(value)), math.nan)
    if not reason and not loss < first:
        reason = f"ended at a loss of {loss:.4f}, began at {first:.4f}"
    schedule = spec.cfg.schedule
    tail = [value for value in curve[-max(1, round(TAIL * spec.cfg.iterations)) :] if math.isfinite(value)]
    return RunResult(
        id=spec.id,
        arm=spec.arm,
        sizes=dict(spec.sizes),
        log2_factor=spec.log2_factor,
        seed=spec.seed,
        loss=loss,
        train_loss=float(np.mean(tail)) if tail and len(curve) == spec.cfg.iterations else math.nan,
        diverged=bool(reason),
        reason=reason,
        curve=curve,
        seconds=time.perf_counter() - began,
        train_s=records[-1]["train_s"] if records else 0.0,
        flops=spec.flops * schedule.tokens_before(len(curve)) / schedule.tokens,
        corpus=spec.corpus,
        vocab_size=spec.vocab_size,
        config=computed_settings(spec.cfg),
        made_with={name: made_with[name] for name in ("speedrun_mup", "revision", "source_sha256", "torch", "platform")}
        | {"device": _device_name(spec.cfg.device), "dtype": _dtype_name(spec.cfg)},
        bits_per_byte=bits,
    )


def _device_name(device: str) -> str:
    kind = pick_device(device).type
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def _dtype_name(cfg: TrainConfig) -> str:
    return str(pick_dtype(cfg, pick_device(cfg.device))).removeprefix("torch.")
