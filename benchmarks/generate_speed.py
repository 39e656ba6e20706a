"""Tokens per second of writing on a CPU against Hugging Face's GPT-2 of the same size with its cache.

    python benchmarks/generate_speed.py            # three widths; writes results/generate_speed.md
    python benchmarks/generate_speed.py --quick    # a smoke run: one width, a few tokens, nothing written

Both write in one process, interleaved, text by text, so what else the machine does falls on both alike. Untrained models: the
weights do not change the work. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from benchmarks.common import circumstances, publish, quantile, seconds, table, with_spread
from benchmarks.opponent import Opponent
from speedrun_mup.config import make_config
from speedrun_mup.core.model import GPT
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.data.tokenizers import ByteTokenizer
from speedrun_mup.sample.sampling import Sampling
from speedrun_mup.sample.writer import Writer
from speedrun_mup.training.model_config import model_config

PROMPT = 32  # tokens
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
        mine, theirs_one = both_seconds(ours), both_seconds(lambda: write_theirs(theirs, prompt, n, written))
        if number:  # the first warms up
            ours_s.append(mine[0])
            theirs_s.append(theirs_one[0])
            cpu_ratios.append(theirs_one[1] / mine[1])
            products_s.append(seconds(products))
    ratios = [b / a for a, b in zip(ours_s, theirs_s)]
    rates = [f"{n * written / quantile(times, 0.5):,.0f}" for times in (ours_s, theirs_s, products_s)]
    share = with_spread([b / a for a, b in zip(ours_s, products_s)])
    return [str(width), str(n), *rates[:2], with_spread(ratios), with_spread(cpu_ratios), rates[2], share]


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
    rows = []
    for width, n in sizes:
        rows.append(race(width, n, *((8, 2) if quick else (128, 7))))
        print(
            f"width {width}, {n} side by side: {rows[-1][4]} times GPT-2's tokens/s, {rows[-1][5]} by CPU time",
            flush=True,
        )
    sections = [
        "# Writing speed on a CPU",
        circumstances(),
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
    ]
    if quick:
        print("\n\n".join(sections))
    else:
        publish("generate_speed", sections)


if __name__ == "__main__":
    main()
