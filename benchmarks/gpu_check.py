"""Check and time the GPU path on a machine with one NVIDIA GPU, within 10 minutes; writes results/gpu_check.md.

    python benchmarks/gpu_check.py            # the record26 preset, then widths 256, 1024 and 2048
    python benchmarks/gpu_check.py --quick    # a smoke run of this script on a CPU; nothing written
    python benchmarks/gpu_check.py --commit HASH    # where the code is a copy without its repository

Needs no network and nothing but what the package needs, and pytest: the corpus is made from the Python sources that are
installed. Every part runs in a process of its own, so that one that fails or takes too long costs only itself, and the
file is written again after each. Most important first: what the time does not suffice for is reported as left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import RESULTS, ROOT, circumstances

from speedrun_mup.data.manifest import GPT2_BOS, GPT2_VOCAB, write_manifest
from speedrun_mup.data.shards import measure_shard, write_shard

RESULT = RESULTS / "gpu_check.md"
WIDTHS = {256: 11, 1024: 30, 2048: 58}  # and the GiB that each takes
BENCH = ("-m", "speedrun_mup", "bench", "--json")
FIRST_START_GIB = 35  # of width 768 and the tests at the same time
SHORTEST_S = 45  # a part that has less time left is not begun
MEDIAN_TOKENS, MEAN_TOKENS = 403, 690  # of FineWeb's documents
TRAIN_TOKENS, VAL_TOKENS = 8_000_000, 600_000
# What an H100 has to reach with the record26 preset.
TARGETS = (
    ("tokens/s over the whole window schedule", ">=", 530_000),
    ("MFU by 6 N + attention (document mask counted), of 989.4 TFLOP/s", ">=", 0.39),
    ("peak memory, GiB", "<=", 24),
    ("second start to the first step's end, s", "<=", 60),
    ("graphs compiled after warmup", "<=", 0),
)


def python_sources(most: int) -> str:
    """The text of the installed Python files: the standard library, then packages, up to about `most` characters."""
    text, size = [], 0
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*.py")):
            if size < most:
                text.append(path.read_text(errors="replace"))
                size += len(text[-1])
    return "\n".join(text)


def make_corpus(folder: Path, train_tokens: int, val_tokens: int) -> None:
    """Words of Python sources by frequency as token ids: GPT-2's number of tokens, FineWeb's lengths of documents."""
    words = re.findall(r"\s*\w+|\s*[^\w\s]", python_sources(2 * (train_tokens + val_tokens)))  # repeated below
    common = {word: id for id, (word, _) in enumerate(Counter(words).most_common(GPT2_BOS - 1))}
    ids = np.array([common.get(word, GPT2_BOS - 1) for word in words], np.uint16)
    ids = np.resize(ids, train_tokens + val_tokens)
    rng, sigma = np.random.default_rng(0), (2 * np.log(MEAN_TOKENS / MEDIAN_TOKENS)) ** 0.5
    lengths = rng.lognormal(np.log(MEDIAN_TOKENS), sigma, len(ids) // 100).astype(int) + 1
    opens = np.concatenate([[0], lengths.cumsum()])
    ids[opens[opens < len(ids)]] = GPT2_BOS
    ids[train_tokens] = GPT2_BOS
    folder.mkdir(parents=True)
    parts: dict[str, Any] = {}
    for part, tokens in ("train", ids[:train_tokens]), ("val", ids[train_tokens:]):
        write_shard(folder / f"{part}.bin", tokens)
        parts[part] = {f"{part}.bin": measure_shard(folder / f"{part}.bin", GPT2_VOCAB, GPT2_BOS)}
    about = f"{len(set(ids.tolist())):,} kinds of words in the installed Python sources"
    write_manifest(folder, tokenizer="words", vocab_size=GPT2_VOCAB, bos_token=GPT2_BOS, source=about, **parts)


@dataclass
class Check:
    """The parts, their time budget, and the file that grows with them. path: None only prints."""

    path: Path | None
    deadline: float
    folder: Path
    sections: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, title: str, text: str) -> None:
        """Show a section and write the file."""
        with self.lock:
            self.sections.append(f"## {title}\n\n{text}")
            print(f"\n{self.sections[-1]}", flush=True)
            if self.path:
                self.path.parent.mkdir(exist_ok=True)
                self.path.write_text("# The GPU path, checked and timed\n\n" + "\n\n".join(self.sections) + "\n")

    def run(self, title: str, arguments: Sequence[str], most_s: float = 600) -> str | None:
        """What `python arguments` prints; None, and a section that says why, if there is no time or it fails."""
        left = self.deadline - time.monotonic()
        if left < SHORTEST_S:
            self.add(title, f"NOT RUN: {left:.0f} s left")
            return None
        try:
            done = self.start(arguments, min(left, most_s))
        except subprocess.TimeoutExpired as fault:
            self.add(title, f"NOT FINISHED after {fault.timeout:.0f} s")
            return None
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            self.add(title, f"FAILED with exit code {done.returncode}\n\n```\n{tail}\n```")
            return None
        return done.stdout

    def start(self, arguments: Sequence[str], most_s: float, **variables: str) -> subprocess.CompletedProcess[str]:
        """`python arguments` with this check's own caches and these variables. Raises TimeoutExpired."""
        environment = os.environ | {
            "SPEEDRUN_MUP_CACHE": str(self.folder),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compiled"),
            "TRITON_CACHE_DIR": str(self.folder / "triton"),
            **variables,
        }
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=most_s)

    def bench(self, title: str, arguments: Sequence[str]) -> dict[str, Any] | None:
        """`speedrun-mup bench` with these flags: its numbers, also added as a section."""
        out = self.run(title, [*BENCH, *arguments])
        if out is None:
            return None
        found = json.loads(out)
        self.add(title, describe(found))
        return found


def describe(found: dict[str, Any]) -> str:
    """A benchmark's numbers as Markdown."""
    facts = [
        f"`speedrun-mup bench`, {found['device']}, torch {found['torch']}, vocabulary {found['vocab']:,}",
        found["chosen"],
        f"{found['tokens_per_s']:,.0f} tokens/s over {found['steps']} steps that cover the window schedule; first step "
        f"{found['step_ms'][0]:.1f} ms, last {found['step_ms'][-1]:.1f} ms",
        "ms of a step: " + ", ".join(f"{name} {ms:.1f}" for name, ms in found["phases_ms"].items()),
        "MFLOP per token: " + ", ".join(f"{name} {flops / 1e6:.1f}" for name, flops in found["flops"].items()),
        "TFLOP/s: " + ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in found["achieved_flops"].items()),
        "MFU: " + (", ".join(f"{name} {share:.1%}" for name, share in (found["mfu"] or {}).items()) or "no data sheet"),
        "measured ceilings: "
        + ", ".join(
            f"{name} {rate / 1e9:,.0f} GB/s" if name == "copy" else f"{name} {rate / 1e12:.1f} TFLOP/s"
            for name, rate in found["measured"].items()
        ),
        "peak memory, GiB: " + ", ".join(f"{name} {gib:.2f}" for name, gib in found["peak_memory_gib"].items()),
        f"start to the first step's end {found['start_s']:.1f} s, warmup {found['warmup_s']:.1f} s; "
        f"{found['graphs_in_warmup']} graphs in warmup, {found['graphs_after']} afterwards",
    ]
    text = "\n".join(f"- {fact}" for fact in facts)
    if found["profile"]:
        rows = [
            f"| {row['name'][:80].replace('|', ' ')} | {row['calls']} | {row['ms']:.2f} | {row['share']:.1%} |"
            for row in found["profile"]
        ]
        text += "\n\n| kernel | calls | ms | share |\n| --- | --- | --- | --- |\n" + "\n".join(rows)
    return text


def verdicts(found: dict[str, Any] | None) -> str:
    """Each target with what was measured; a target that was not measured has failed."""
    measured: list[float | None] = [None] * len(TARGETS)
    if found:
        mfu, memory = (found["mfu"] or {}).get("masked"), max(found["peak_memory_gib"].values())
        measured = [found["tokens_per_s"], mfu, memory, found["start_s"], found["graphs_after"]]
    rows = []
    for (what, sign, target), value in zip(TARGETS, measured, strict=True):
        good = value is not None and (value >= target if sign == ">=" else value <= target)
        shown = "not measured" if value is None else f"{value:,.3f}"
        rows.append(f"| {what} | {sign} {target:,} | {shown} | {'pass' if good else 'FAIL'} |")
    return "| width 768 | target | measured | |\n| --- | --- | --- | --- |\n" + "\n".join(rows)


def gpu_gib() -> float:
    """The first GPU's memory; 0 without one."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def gpu_and_driver() -> str:
    """What nvidia-smi says, or that it is not there."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().replace("\n", "; ")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.7, help="time budget; %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny models on a CPU, no result file")
    parser.add_argument("--commit", help="of the code, if git does not know it here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        deadline = time.monotonic() + 60 * arguments.minutes
        check = Check(None if arguments.quick else RESULT, deadline, folder)
        check.add("Where", f"{circumstances(arguments.commit, 'at the start')}\n- GPU: {gpu_and_driver()}")
        corpus = folder / "words"
        shrink, steps, widths, base, room = [], 28, WIDTHS, 768, gpu_gib() - FIRST_START_GIB
        if arguments.quick:
            make_corpus(corpus, 20_000, 3000)
            shrink = (
                "--device cpu --n-layer 6 --head-dim 16 --block-size 32 --window-tokens 96 --micro-batch-tokens 128"
            )
            shrink = f"{shrink} --micro-batches 2 --val-chunk-tokens 128 --val-tokens 128".split()
            steps, widths, base, room = 4, {32: 0}, 16, 0.0
        else:
            make_corpus(corpus, TRAIN_TOKENS, VAL_TOKENS)
        plain = ["--preset", "record26", "--data", str(corpus), *shrink]
        small = ["--width", "16"] if arguments.quick else []
        short = ["--steps", str(steps // 4)]
        scaled = {
            width: [*plain, "--mup", "--base-width", str(base), "--width", str(width), *short] for width in widths
        }
        scaled[max(widths)] += ["--steps", "4"]  # seconds each
        with ThreadPoolExecutor() as beside:  # all compile for most of their time, which is not judged
            for width, gib in widths.items():
                if gib <= room:  # fills the cache of compiled code; what fails here fails again in its own part
                    room -= gib
                    once = [*BENCH, *scaled[width], "--steps", "1"]
                    beside.submit(check.start, once, 150, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
            tests = ["-m", "pytest", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "tests"]
            tested = beside.submit(check.run, "Tests against the references", tests, 200)
            check.bench("Width 768, first start, while the tests run", [*plain, *small, *short])
            if (out := tested.result()) is not None:
                last = out.strip().splitlines()[-1]
                check.add("Tests against the references", last if "passed" in last else f"FAIL: none ran: {last}")
        second = check.bench("Width 768, second start", [*plain, *small, "--steps", str(steps), "--profile"])
        check.add("Targets", verdicts(second))
        if not arguments.quick:
            out = check.run("Fast forms against plain ones", ["benchmarks/gpu_kernels.py"], most_s=90)
            if out is not None:
                check.add("Fast forms against plain ones", out.strip())
        for width in widths:
            check.bench(f"Width {width}, muP", scaled[width])
        check.bench("Width 768, head in bfloat16", [*plain, *small, *short, "--no-fp8"])
        failed = any(word in section for section in check.sections for word in ("FAIL", "NOT RUN", "NOT FINISHED"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
