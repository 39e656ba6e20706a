"""Each fast form on an NVIDIA GPU against its plain one, at record 26's sizes; the two are interleaved in one process.

    python benchmarks/gpu_kernels.py

Prints a Markdown table of milliseconds (medians) and how far apart the results are; gpu_check.py runs it as one of its parts.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import table

from speedrun_mup.bench import Stopwatch
from speedrun_mup.core.kernels.fp8 import E5M2, head_scales, quantize, transposed
from speedrun_mup.core.model import (
    ATTENTION_SCALE,
    FUSED_LOGIT_BYTES,
    LOGIT_BUDGET,
    SOFTCAP_SLOPE,
    SoftcapCrossEntropy,
)
from speedrun_mup.core.model.attention import BACKENDS, document_numbers
from speedrun_mup.core.optimizers import orthogonalization

T, D, V, C, BLOCK = 49_152, 768, 50_304, 128, 128
REPEATS = 8
CUDA = torch.device("cuda")

Pair = tuple[str, Callable[[], Tensor], str, Callable[[], Tensor]]


def newton_schulz_pairs() -> Iterator[Pair]:
    """Half of each symmetric product, mirrored, against the whole of it."""
    whole = orthogonalization.symmetric_products_pay

    def plain(x: Tensor) -> Tensor:
        orthogonalization.symmetric_products_pay = lambda x: False
        try:
            return orthogonalization.newton_schulz(x)
        finally:
            orthogonalization.symmetric_products_pay = whole

    for n, rows, columns in ((44, D, D), (24, D, 4 * D), (8, 2048, 2048)):
        x = torch.randn(n, rows, columns, device=CUDA, dtype=torch.bfloat16)
        what = f"Newton-Schulz of {n} x ({rows}, {columns})"
        yield what, lambda x=x: orthogonalization.newton_schulz(x), "whole products", lambda x=x: plain(x)


def transpose_pairs() -> Iterator[Pair]:
    """The turned gradient of a chunk of logits, in bytes."""
    g = quantize(torch.randn(16_384, V, device=CUDA, dtype=torch.bfloat16), 1.0, E5M2)
    yield "transposed (16,384, V) of bytes", lambda: transposed(g), "torch's", lambda: g.T.contiguous()


def head_pairs() -> Iterator[Pair]:
    """Head, cap and cross-entropy, forward and backward: fused with FP8 matmuls, against bfloat16 and unfused."""
    x = torch.nn.functional.rms_norm(torch.randn(T, D, device=CUDA), (D,)).bfloat16().requires_grad_()
    w = (0.02 * torch.randn(V, D, device=CUDA)).requires_grad_()
    targets = torch.randint(V, (T,), device=CUDA)
    scale = 1 / (SOFTCAP_SLOPE * D**0.5)

    def head(budget: int, fp8: bool, fused: bool) -> Tensor:
        x.grad = w.grad = None
        scales = head_scales(D, 1.0) if fp8 else None
        SoftcapCrossEntropy.apply(x, w, targets, scale, budget, scales, fused).backward()
        return x.grad

    yield (
        "head and loss, 8 bits, fused",
        lambda: head(FUSED_LOGIT_BYTES // 2, True, True),
        "bfloat16, fused",
        lambda: head(FUSED_LOGIT_BYTES // 2, False, True),
    )
    yield (
        "head and loss, bfloat16, fused",
        lambda: head(FUSED_LOGIT_BYTES // 2, False, True),
        "bfloat16, chunks of 64 MiB, eager",
        lambda: head(LOGIT_BUDGET, False, False),
    )


def attention_pairs() -> Iterator[Pair]:
    """FlexAttention against blocks through scaled_dot_product_attention, forward and backward, documents of 600 tokens."""
    doc = document_numbers(torch.arange(T, device=CUDA).remainder(600), 0)
    q, k, v, grad = (torch.randn(T, D // C, C, device=CUDA, dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def attend(name: str, window: Tensor | int) -> Tensor:
        backend = BACKENDS[name]()
        return backend.attend(q, k, v, backend.build_mask(doc, window, BLOCK), ATTENTION_SCALE)

    flex = torch.compile(lambda window: attend("flex", window), dynamic=False)
    for window in (3, 14):
        reach = torch.full((), window, dtype=torch.int32, device=CUDA)
        yield (
            f"FlexAttention, window of {window} blocks",
            lambda reach=reach: torch.autograd.grad(flex(reach), leaves, grad)[0],
            "blocked attention",
            lambda window=window: torch.autograd.grad(attend("blocked", window), leaves, grad)[0],
        )


def compare(fast: Callable[[], Tensor], plain: Callable[[], Tensor]) -> tuple[float, float, float]:
    """Milliseconds of either, taking turns, and the norm of their difference over that of the plain result."""
    watches = [Stopwatch(CUDA), Stopwatch(CUDA)]
    for _ in range(REPEATS + 2):
        for watch, work in zip(watches, (fast, plain), strict=True):
            with watch("other"):
                work()
    a, b = (statistics.median(lap["other"] for lap in watch.laps()[2:]) for watch in watches)
    got, expected = (work().float() for work in (fast, plain))
    return a, b, ((got - expected).norm() / expected.norm()).item()


def main() -> int:
    if not torch.cuda.is_available():
        print("error: benchmarks/gpu_kernels.py needs an NVIDIA GPU")
        return 2
    rows = []
    for pairs in (newton_schulz_pairs, transpose_pairs, head_pairs, attention_pairs):
        for what, fast, instead, plain in pairs():
            a, b, apart = compare(fast, plain)
            rows.append((what, f"{a:.2f}", instead, f"{b:.2f}", f"{b / a:.2f}", f"{apart:.1e}"))
        torch.cuda.empty_cache()
    print(table(("fast form", "ms", "plain form", "ms", "ratio", "apart"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
