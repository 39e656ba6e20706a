"""What the benchmarks share: the opponent, the machine's description, statistics and the Markdown result file."""

# T tokens of a micro-batch, N micro-batches of a step

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from speedrun_mup.config import TrainConfig
from speedrun_mup.data import Batch
from speedrun_mup.shards import Corpus

RESULTS = Path(__file__).parent / "results"
WARMUP = 0.05  # of the opponent's steps: its learning rate rises linearly, then falls linearly to zero


class Opponent:
    """Hugging Face's GPT-2 with torch's AdamW: the usual way to train a model of this size.

    Layers, width, heads, vocabulary and tokens per step are those of `cfg`; a micro-batch is one sequence, so the
    context is T. No dropout, scaled_dot_product_attention, betas 0.9 and 0.95, weight decay 0.1 on matrices, gradients
    clipped to norm 1, linear warmup and decay over `steps`.
    """

    def __init__(self, cfg: TrainConfig, corpus: Corpus, steps: int, lr: float = 1e-3, seed: int = 0):
        torch.manual_seed(seed)
        shape = GPT2Config(
            vocab_size=corpus.vocab_size,
            n_positions=cfg.micro_batch_tokens,
            n_embd=cfg.width,
            n_layer=cfg.n_layer,
            n_head=cfg.width // cfg.head_dim,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=corpus.bos_token,
            eos_token_id=corpus.bos_token,
            attn_implementation="sdpa",
        )
        self.model = GPT2LMHeadModel(shape)
        parameters = list(self.model.parameters())
        decayed = [{"params": [p for p in parameters if p.ndim > 1]}]
        plain = [{"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(decayed + plain, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: triangle(step, steps))

    def loss(self, batches: Sequence[Batch]) -> Tensor:
        """Mean cross-entropy of equally long sequences in one forward pass."""
        inputs, targets = (torch.stack(tokens) for tokens in zip(*batches))
        return F.cross_entropy(self.model(inputs).logits.flatten(0, 1), targets.flatten())

    def step(self, batches: Sequence[Batch]) -> None:
        """One training step on a whole batch."""
        self.loss(batches).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


def triangle(step: int, steps: int) -> float:
    """Learning rate factor: linear warmup over the first 5 % of `steps`, then linear decay to zero."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / (steps - warmup))


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


def circumstances() -> str:
    """Command, commit, hardware, versions and load, as a Markdown list."""
    root = Path(__file__).parent.parent
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    dirty = any(line[3:].startswith("speedrun_mup/") for line in changed.splitlines())
    command = " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(root)), *sys.argv[1:]])
    versions = f"torch {torch.__version__}, transformers {_version('transformers')}, Python {platform.python_version()}"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    facts = [
        f"command: `{command}`",
        f"commit: {commit}" + (" with uncommitted changes to the package" if dirty else ""),
        f"hardware: {cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        f"software: {versions}",
        f"load average at the end: {load} (of 1, 5 and 15 minutes; this benchmark alone makes about one per thread)",
    ]
    return "\n".join(f"- {fact}" for fact in facts)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


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
