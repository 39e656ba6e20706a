"""How fast text becomes shards and shards become batches, each against its ceiling.

    python benchmarks/data_speed.py            # writes results/data_speed.md
    python benchmarks/data_speed.py --quick    # a smoke run on little text, nothing written

Tokenising: `tokenize_text`, from a .jsonl file to finished, hashed shards, against the tokenizer library alone on the same
texts as strings in memory, in as many threads; interleaved. Loading: a loop that does nothing but take the next step's
batches, and what taking them costs the laptop preset's training loop, as a share of its steps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.common import circumstances, publish, quantile, seconds, table, with_spread
from speedrun_mup.config import make_config
from speedrun_mup.data.batches import Batch, TrainBatches
from speedrun_mup.data.corpus import embedded_corpus
from speedrun_mup.data.manifest import open_corpus
from speedrun_mup.data.shards import read_shard, write_shard
from speedrun_mup.data.tokenize_text import TextSettings, tokenize_text
from speedrun_mup.data.tokenizers import BpeTokenizer, Tokenizer, find_tokenizer, gpt2_tokenizer, load_tokenizer
from speedrun_mup.training import train

THREADS = os.cpu_count() or 1
BLOCK = 64  # documents that one call of the library's threads takes
COPIES = 4  # of the texts, so that starting up is a small part of it, as it is of a real corpus


def library_texts(chars: int) -> list[str]:
    """The first `chars` characters of Python's library, in documents of about 3,400."""
    corpus = embedded_corpus()
    passages = load_tokenizer(corpus).decode(read_shard(corpus.train[0])[:chars].tolist()).split("<|bos|>")[1:]
    return ["".join(passages[i : i + 4]) for i in range(0, len(passages), 4)]


def encode_alone(tokenizer: Tokenizer, texts: list[str], pool: ThreadPoolExecutor, shared: bool = False) -> int:
    """Tokens of `texts`, by nothing but the library's call in the threads of `pool`; they are counted and dropped.

    shared: by one object for all threads instead of one for each, which a thread keeps for the next call.
    """
    blocks = [texts[i : i + BLOCK] for i in range(0, len(texts), BLOCK)]
    of_all = tokenizer._encoding if isinstance(tokenizer, BpeTokenizer) else None

    def count(block: list[str]) -> int:
        if not isinstance(tokenizer, BpeTokenizer):
            return sum(len(np.frombuffer(text.encode(), np.uint8)) for text in block)
        encoding = of_all if shared else tokenizer._encoding
        return sum(len(encoding.encode_to_numpy(text, disallowed_special=())) for text in block)

    return sum(pool.map(count, blocks))


def race(name: str, tokenizer: str, texts: list[str], rounds: int) -> list[str]:
    """Tokenizer, million tokens, the three speeds, ours over both others in pairs, rounds."""
    encoder, ours_s, alone_s, shared_s = find_tokenizer(tokenizer), [], [], []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(THREADS) as pool:
        source = Path(folder, "text.jsonl")
        texts = COPIES * texts
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokens = encode_alone(encoder, texts, pool)
        for turn in range(rounds):
            out, settings = Path(folder, f"out{turn}"), TextSettings(tokenizer=tokenizer)
            ours_s.append(seconds(lambda: tokenize_text([str(source)], out, settings, THREADS)))  # noqa: B023
            alone_s.append(seconds(lambda: encode_alone(encoder, texts, pool)))
            shared_s.append(seconds(lambda: encode_alone(encoder, texts, pool, shared=True)))
    rates = [f"{tokens / quantile(times, 0.5) / 1e6:.2f}" for times in (ours_s, alone_s, shared_s)]
    ratios = [with_spread([other / ours for ours, other in zip(ours_s, others)]) for others in (alone_s, shared_s)]
    return [name, f"{tokens / 1e6:.1f}", *rates, *ratios, str(rounds)]


def drain(T: int, N: int, tokens: int, seconds_each: float) -> list[str]:
    """Batch, and million tokens per second that the stream delivers to a loop that does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        for part, size in ("train", tokens), ("val", 1000):
            ids = np.random.default_rng(0).integers(0, 50256, size)
            ids[::700] = 50256
            write_shard(Path(folder, f"fineweb_{part}_000000.bin"), ids)
        batches = TrainBatches(open_corpus(Path(folder)), T, N, seed=0)
        batches.usage()  # a run indexes a shard once
        with contextlib.closing(batches.stream(0, 0, 1)) as stream:
            next(stream)
            rates = []
            for _ in range(9):
                steps, began = 0, time.perf_counter()
                while time.perf_counter() - began < seconds_each:
                    next(stream)
                    steps += 1
                rates.append(steps * N * T / (time.perf_counter() - began) / 1e6)
    return [f"{N} x {T:,}", with_spread(rates, 0)]


@dataclass
class Waits:
    """A stopwatch around the training loop's `next`: seconds it waited, and from one call to the next."""

    waited_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)

    def watch(self, batches: Generator[list[Batch], None, None]) -> Generator[list[Batch], None, None]:
        """Pass `batches` on."""
        last = None
        while True:
            began = time.perf_counter()
            if last is not None:
                self.step_s.append(began - last)
            last = began
            step = next(batches)
            self.waited_s.append(time.perf_counter() - began)
            yield step

    def shares(self) -> list[float]:
        """Of every step after the first few, which share of it was waiting."""
        return [waited / step for waited, step in zip(self.waited_s, self.step_s)][3:]


def train_watched(steps: int) -> Waits:
    """Train the laptop preset with a stopwatch around its batches."""
    waits, plain = Waits(), TrainBatches.stream
    TrainBatches.stream = lambda self, *args, **more: waits.watch(plain(self, *args, **more))  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            quiet = {"val_every": 0, "val_tokens": 4096, "save": False, "progress": False, "out": folder}
            train(make_config("laptop", quiet | {"data": "embedded", "device": "cpu", "iterations": steps}))
    finally:
        TrainBatches.stream = plain  # type: ignore[method-assign]
    return waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little text, few rounds, no result file")
    quick = parser.parse_args().quick
    texts, rounds = library_texts(300_000 if quick else 10_000_000), 2 if quick else 7
    with tempfile.TemporaryDirectory() as folder:
        BpeTokenizer.train(texts, 1024 if quick else 4096).save(Path(folder))
        trained = str(Path(folder, "tokenizer.json"))
        races = [race("byte", "byte", texts, rounds), race("trained", trained, texts, rounds)]
        gpt2_tokenizer().save(Path(folder))
        races.append(race("gpt2", trained, texts, rounds))
    size, each_s = (2_000_000, 0.1) if quick else (100_000_000, 2.0)
    drains = [drain(T, N, size, each_s) for T, N in ((256, 8), (2048, 8), (49_152, 8))]
    waits = train_watched(10 if quick else 60)
    sections = [
        "# Speed of the data path on a CPU",
        circumstances(),
        "## Text to shards",
        f"{len(texts):,} documents of Python source, {COPIES} times, {THREADS} threads. Ours: a .jsonl file read, parsed, "
        "hashed, encoded, written, read back and hashed again. Alone: the tokenizer library's own call on strings in memory, "
        "tokens dropped, with one of its objects for each thread; shared: with one for all. Bytes have no library: alone is "
        "text.encode(). "
        "Ratios of speeds (1: ours costs nothing): median and middle 80 % of paired rounds.",
        table(
            [
                "tokenizer",
                "million tokens",
                "ours, M tokens/s",
                "alone",
                "shared",
                "ours / alone",
                "ours / shared",
                "rounds",
            ],
            races,
        ),
        "## Shards to batches",
        "A loop that takes batch after batch from the stream, whose thread reads ahead, as inputs and targets ready for the "
        f"model; one shard of {size:,} tokens in the page cache. Million tokens per second, median and middle 80 %.",
        table(["micro-batches of a step", "M tokens/s"], drains),
        f"The laptop preset waits for its batches {with_spread([1e3 * s for s in waits.waited_s[3:]], 3)} ms a step, which is "
        f"{with_spread([100 * share for share in waits.shares()], 3)} % of the step ({len(waits.shares())} steps).",
    ]
    if quick:
        print("\n\n".join(sections))
    else:
        publish("data_speed", sections)


if __name__ == "__main__":
    main()
