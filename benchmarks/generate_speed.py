"""Tokens per second of writing on a CPU against Hugging Face's GPT-2 of the same size with its cache; cost of a token by length.

    python benchmarks/generate_speed.py            # three widths; writes results/generate_speed.md
    python benchmarks/generate_speed.py --quick    # a smoke run: one width, a few tokens, nothing written

Both write in one process, interleaved, text by text, each first in turn, so what else the machine does falls on both alike.
Untrained models: the weights do not change the work. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2LMHeadModel

from benchmarks.common import circumstances, publish, quantile, seconds, table, with_spread
from benchmarks.opponent import Opponent
from speedrun_mup.config import TrainConfig, make_config
from speedrun_mup.core.model import GPT
from speedrun_mup.core.model.cache import Decoder
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.data.shards import Corpus
from speedrun_mup.data.tokenizers import ByteTokenizer
from speedrun_mup.sample.sampling import Sampling
from speedrun_mup.sample.writer import Writer
from speedrun_mup.training.model_config import model_config

PROMPT = 32  # tokens
LENGTHS = (128, 2048, 8192)  # of text before a token, for its cost
WIDE = 256  # of the models whose cost by length is measured
SETTINGS = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}


class Endless(ByteTokenizer):
    """Bytes without BOS, so that no text ends early."""

    vocab_size = 256


def race(width: int, n: int, written: int, rounds: int) -> list[str]:
    """Width, samples side by side, both models' tokens per second, the paired ratio, and ours against its ceiling."""
    cfg = make_config("laptop", {"width": width, "base_width": 64})
    corpus = find_corpus("embedded")[0]
    model = GPT(model_config(cfg, corpus, "blocked"), seed=0)
    writer = Writer(model, Endless(), cfg.schedule.widest_window)
    theirs = Opponent(cfg, corpus, steps=100).model.eval()
    theirs.generation_config.eos_token_id = None
    prompt = torch.randint(0, 256, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    matrices = [p.detach().flatten(end_dim=-2) for name, p in model.named_parameters() if is_product(name, p)]
    rows = {size: torch.randn(n, size) for size in {matrix.size(1) for matrix in matrices}}

    def ours() -> None:
        count = sum(1 for _ in writer.tokens([prompt[0].tolist()] * n, Sampling(max_new_tokens=written, **SETTINGS)))
        if count != written:
            raise SystemExit(f"ours wrote {count} tokens, not {written}")

    @torch.inference_mode()
    def products() -> None:
        for _ in range(written):
            for matrix in matrices:
                rows[matrix.size(1)] @ matrix.T

    ours_s, theirs_s, products_s, cpu_ratios = [], [], [], []
    for number in range(rounds + 1):
        mine, their = in_turn([ours, lambda: write_theirs(theirs, prompt, n, written)], number)
        if number:  # the first warms up
            ours_s.append(mine[0])
            theirs_s.append(their[0])
            cpu_ratios.append(their[1] / mine[1])
            products_s.append(seconds(products))
    ratios = [b / a for a, b in zip(ours_s, theirs_s)]
    rates = [f"{n * written / quantile(times, 0.5):,.0f}" for times in (ours_s, theirs_s, products_s)]
    share = with_spread([b / a for a, b in zip(ours_s, products_s)])
    return [str(width), str(n), *rates[:2], with_spread(ratios), with_spread(cpu_ratios), rates[2], share]


def cost_by_length(width: int, written: int, rounds: int, lengths: Sequence[int]) -> list[list[str]]:
    """For each length: it, ms of a token and the paired ratio to the shortest, ours and GPT-2's."""
    cfg = make_config("laptop", {"width": width, "base_width": 64, "micro_batch_tokens": max(lengths) + 64})
    corpus = find_corpus("embedded")[0]
    model = GPT(model_config(cfg, corpus, "blocked"), seed=0)
    works = [
        work for length in lengths for work in (next_of_ours(model, cfg, length), next_of_theirs(cfg, corpus, length))
    ]
    found: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        for times, (wall, _) in zip(found, in_turn([lambda w=work: w(written) for work in works], number)):
            if number:
                times.append(1e3 * wall / written)
    rows = []
    for place, length in enumerate(lengths):
        cells = [f"{length:,}"]
        for shortest, times in zip(found[:2], found[2 * place : 2 * place + 2]):
            cells += [f"{quantile(times, 0.5):.2f}", with_spread([b / a for a, b in zip(shortest, times)])]
        rows.append(cells)
    return rows


def next_of_ours(model: GPT, cfg: TrainConfig, length: int) -> Callable[[int], None]:
    """Writes so many tokens after a text of `length`, each time after the same one."""
    decoder = Decoder(model, cfg.schedule.widest_window)
    decoder(torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0)))

    def write(count: int) -> None:
        decoder.lengths, decoder.places = torch.tensor([length]), []
        for _ in range(count):
            decoder(torch.zeros(1, 1, dtype=torch.int64)).argmax(dim=-1)

    return write


def next_of_theirs(cfg: TrainConfig, corpus: Corpus, length: int) -> Callable[[int], None]:
    """The same with GPT-2 and its cache."""
    model, cache = Opponent(cfg, corpus, steps=100).model.eval(), DynamicCache()
    prompt = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def write(count: int) -> None:
        cache.crop(length)
        for _ in range(count):
            model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True).logits.argmax(dim=-1)

    return write


def in_turn(works: Sequence[Callable[[], object]], number: int) -> list[tuple[float, float]]:
    """`both_seconds` of each, begun with another one each time."""
    order = [(number + place) % len(works) for place in range(len(works))]
    found = {place: both_seconds(works[place]) for place in order}
    return [found[place] for place in range(len(works))]


def both_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time and CPU time of one call; on a busy machine the second tells more."""
    began = time.process_time()
    return seconds(work), time.process_time() - began


def is_product(name: str, parameter: Tensor) -> bool:
    """Whether a token is multiplied with all of this parameter."""
    return name.endswith(("c_fc.weight", "c_proj.weight", "lm_head.weight")) or parameter.ndim == 3


@torch.inference_mode()
def write_theirs(model: GPT2LMHeadModel, prompt: Tensor, n: int, written: int) -> None:
    """The same with GPT-2's own `generate`."""
    done = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        num_return_sequences=n,
        max_new_tokens=written,
        use_cache=True,
        pad_token_id=256,
        **SETTINGS,
    )
    if done.shape != (n, PROMPT + written):
        raise SystemExit(f"GPT-2 wrote {tuple(done.shape)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one width, a few tokens, no result file")
    quick = parser.parse_args().quick
    sizes = [(64, 1)] if quick else [(width, n) for width in (64, 128, 256) for n in (1, 8)]
    began = circumstances(when="at the start")
    rows = []
    for width, n in sizes:
        rows.append(race(width, n, *((8, 2) if quick else (128, 10))))
        print(
            f"width {width}, {n} side by side: {rows[-1][4]} times GPT-2's tokens/s, {rows[-1][5]} by CPU time",
            flush=True,
        )
    costs = cost_by_length(*((64, 2, 2, (32, 128)) if quick else (WIDE, 32, 10, LENGTHS)))
    sections = [
        "# Writing speed on a CPU",
        f"{began}\n- {circumstances().splitlines()[-1].removeprefix('- ')}",
        "Tokens per second of samples of 128 tokens after a prompt of 32, reading it included. Both: 6 layers, heads of 32, "
        "bytes, float32, keys and values in a cache, temperature 0.8, top-k 50, top-p 0.95. GPT-2: Hugging Face's `generate`, "
        "scaled dot product attention. Ours: the window of 256 tokens of the end of training. Ratio of speeds (above 1: ours "
        "is faster): median and middle 80 % of paired texts, of wall time and of CPU time, which other work on the machine moves "
        "less. Ceiling: the products with our weight matrices alone; share: of "
        "it that we reach.",
        table(
            [
                "width",
                "side by side",
                "ours, tokens/s",
                "GPT-2, tokens/s",
                "ratio",
                "of CPU time",
                "ceiling, tokens/s",
                "share",
            ],
            rows,
        ),
        f"The cost of one more token, by the text before it: width {WIDE}, one sample, the likeliest token. GPT-2 has "
        "positions for all of it. Ratio: to the shortest, paired, median and middle 80 %. Ours keeps 256 tokens in its long "
        "window and 128 in the others, whatever the length.",
        table(["tokens before", "ours, ms", "ratio", "GPT-2, ms", "ratio"], costs),
    ]
    if quick:
        print("\n\n".join(sections))
    else:
        publish("generate_speed", sections)


if __name__ == "__main__":
    main()
