"""What the benchmarks share: the machine's description, statistics and the Markdown result file."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def quantile(values: Sequence[float], q: float) -> float:
    """By linear interpolation."""
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def with_spread(values: Sequence[float], digits: int = 2) -> str:
    """The median and the range of the middle 80 %."""
    median, low, high = (f"{quantile(values, q):,.{digits}f}" for q in (0.5, 0.1, 0.9))
    return f"{median} ({low} to {high})"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def circumstances(copy_of: str | None = None, when: str = "at the end") -> str:
    """Command, commit, hardware, versions and the load now, as a Markdown list.

    copy_of: the commit, where git does not know it. when: what "now" is in the benchmark.
    """
    command = " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]])
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if "transformers" in sys.modules:
        versions += f", transformers {version('transformers')}"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    facts = [
        f"command: `{command}`",
        f"commit: {copy_of or commit()}",
        f"hardware: {cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        f"software: {versions}",
        f"load average {when}: {load} (of 1, 5 and 15 minutes; this benchmark alone makes about one per thread)",
    ]
    return "\n".join(f"- {fact}" for fact in facts)


@cache
def commit() -> str:
    """The commit, as it was when first asked for, and whether the package differed from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout

    if not (ROOT / ".git").exists():
        return "not known, this is a copy without its repository"
    dirty = any(line[3:].startswith("speedrun_mup/") for line in git("status", "--porcelain").splitlines())
    return git("rev-parse", "HEAD").strip() + (" with uncommitted changes to the package" if dirty else "")


def cpu_name() -> str:
    """The CPU's model name, as Linux reports it, or what Python knows."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def publish(name: str, sections: Sequence[str]) -> None:
    """Print the sections and write them to results/<name>.md."""
    text = "\n\n".join(sections) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
