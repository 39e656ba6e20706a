"""How fast a model writes here: time to the first token, tokens/s for one sample and for several, cost of a token by length."""

# n samples side by side

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch

from speedrun_mup.bench import wait_for
from speedrun_mup.config import TrainConfig
from speedrun_mup.core.device import pick_device
from speedrun_mup.core.model import GPT
from speedrun_mup.core.model.cache import Decoder
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.files import strict_json
from speedrun_mup.sample.sampling import Sampling
from speedrun_mup.sample.writer import draw
from speedrun_mup.training.hardware import pick_dtype
from speedrun_mup.training.model_config import model_config

PROMPTS = (1, 512)  # tokens
SAMPLES = (1, 8)
WRITTEN = 64  # tokens of each sample that are timed
WINDOWS = (1, 8)  # how much text is before a token, in long windows


@dataclass(frozen=True)
class GenerationResult:
    """What a benchmark of writing found.

    first_token_ms: by the tokens of the prompt, reading it included. tokens_per_s: of all samples together, by their number.
    token_ms: of one more token, by the tokens before it. cache_mib: keys and values of one sample, however long.
    """

    device: str
    dtype: str
    parameters: int
    first_token_ms: dict[int, float]
    tokens_per_s: dict[int, float]
    token_ms: dict[int, float]
    cache_mib: float

    def to_json(self) -> str:
        """Strict JSON."""
        return strict_json(asdict(self), indent=1)

    def summary(self) -> str:
        """For a terminal."""
        first = ", ".join(f"{ms:.1f} ms after a prompt of {tokens:,}" for tokens, ms in self.first_token_ms.items())
        rates = ", ".join(f"{rate:,.0f} tokens/s for {n}" for n, rate in self.tokens_per_s.items())
        costs = ", ".join(f"{ms:.2f} ms after {tokens:,} tokens" for tokens, ms in self.token_ms.items())
        return "\n".join(
            [
                f"{self.device}, {self.dtype}; {self.parameters:,} parameters",
                f"first token: {first}",
                f"samples side by side: {rates}",
                f"one more token: {costs}",
                f"keys and values: {self.cache_mib:.2f} MiB a sample",
            ]
        )


def bench_generation(cfg: TrainConfig) -> GenerationResult:
    """Measure a model of these settings, untrained, with the window of the end of training; times are medians."""
    device, corpus = pick_device(cfg.device), find_corpus(cfg.data, cfg.tokenizer)[0]
    dtype = pick_dtype(cfg, device)
    model = GPT(model_config(cfg, corpus, "blocked", dtype), cfg.seed).to(device)
    window = cfg.schedule.widest_window

    def write(decoder: Decoder, n: int, count: int, read: int) -> tuple[float, list[float]]:
        """Seconds until the first token, after reading a prompt; and of each of the others."""
        random = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, corpus.vocab_size, (1, read), generator=random)
        marks = [time.perf_counter()]
        logits = decoder(prompt)
        decoder.take([0] * n)
        logits = logits.expand(n, -1)
        for _ in range(count):
            uniform = torch.rand(n, generator=random, dtype=torch.float64)
            tokens = draw(logits[:, : corpus.vocab_size].cpu(), Sampling(), uniform)
            marks.append(time.perf_counter())
            logits = decoder(tokens[:, None])
        wait_for(device)
        laps = [end - begin for begin, end in pairwise(marks)]
        return laps[0], laps[1:]

    for _ in range(2):  # what a first call loads
        write(Decoder(model, window), 1, 4, 8)
    long = window * cfg.block_size
    first = {n: statistics.median(write(Decoder(model, window), 1, 1, n)[0] for _ in range(5)) for n in PROMPTS}
    rates = {n: n / statistics.median(write(Decoder(model, window), n, WRITTEN, 32)[1]) for n in SAMPLES}
    costs = {n * long: statistics.median(write(Decoder(model, window), 1, WRITTEN, n * long)[1]) for n in WINDOWS}
    decoder = Decoder(model, window)
    decoder(torch.zeros(1, 1, dtype=torch.int64))
    return GenerationResult(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        first_token_ms={n: 1e3 * s for n, s in first.items()},
        tokens_per_s=rates,
        token_ms={n: 1e3 * s for n, s in costs.items()},
        cache_mib=decoder.memory / 2**20,
    )
