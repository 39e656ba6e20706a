"""Does the coordinate check tell right models of other families from wrong ones? Ten of each, three seeds.

    python benchmarks/foreign_models.py                  # with transformers; writes results/foreign_models.md
    python benchmarks/foreign_models.py --only lstm      # cases of this name, nothing written
    python benchmarks/foreign_models.py --seeds 1

Right models are what mup.adapt makes of them. Each wrong one is wrong in one thing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim import Optimizer  # noqa: E402

from benchmarks.common import circumstances, publish, table  # noqa: E402
from speedrun_mup.coord_check import CoordCheck, Subject, foreign_coord_check  # noqa: E402
from speedrun_mup.coord_check.foreign import hugging_face_loss, random_walks  # noqa: E402
from speedrun_mup.core import mup  # noqa: E402
from speedrun_mup.core.mup.anymodel.forward import drop_factors  # noqa: E402
from tests.helpers.foreign_models import GPT, VOCAB, GPTConfig, Recurrent, ResNet, loss_of  # noqa: E402

WIDTHS = (32, 64, 128, 256)
BASE, LR = 32, 3e-3
Built = tuple[nn.Module, Optimizer]
Change = Callable[[nn.Module], None]


def hugging_face(family: str, width: int, wide_heads: bool = False, **sizes: Any) -> nn.Module:
    """A tiny causal language model of transformers: more heads with width, or wider ones."""
    import transformers

    heads = {"num_attention_heads": 2 if wide_heads else width // 16}
    common: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": width, "num_hidden_layers": 2, "pad_token_id": 0}
    common |= {"bos_token_id": 1, "eos_token_id": 2}
    if family == "GPT2":
        common |= heads | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    elif family == "Mamba":
        common |= {"state_size": 4}
    else:
        common |= heads | {"intermediate_size": 2 * width}
    config = getattr(transformers, f"{family}Config")(**common | sizes)
    return getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)


HF = {
    "llama": partial(hugging_face, "Llama", num_key_value_heads=2),
    "qwen3": partial(hugging_face, "Qwen3", num_key_value_heads=2, head_dim=16),
    "mistral": partial(hugging_face, "Mistral", num_key_value_heads=2),
    "gpt-neox": partial(hugging_face, "GPTNeoX"),
    "gpt2": partial(hugging_face, "GPT2"),
    "gemma": partial(hugging_face, "Gemma", num_key_value_heads=1, head_dim=16),
    "mamba": partial(hugging_face, "Mamba"),
    "mixtral": partial(hugging_face, "Mixtral", num_key_value_heads=2, num_local_experts=4),
}


def nano(width: int, wide_heads: bool = False) -> nn.Module:
    """A decoder like nanoGPT's."""
    return GPT(GPTConfig(n_embd=width, n_head=2 if wide_heads else width // 16))


OWN: dict[str, Callable[..., nn.Module]] = {"nanogpt": nano, "lstm": Recurrent, "resnet": ResNet}
PLAIN = HF | OWN


def nothing(model: nn.Module) -> None:
    """Change nothing."""


def right(plain: Callable[[int], nn.Module], width: int, then: Change = nothing, **options: Any) -> Built:
    """A model in muP over BASE; `then` breaks something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mup.adapt(plain(width), BASE, build=plain, **options)
    then(model)
    return model, mup.optimizer(model, lr=LR)


def flat_rates(plain: Callable[[int], nn.Module], width: int) -> Built:
    """The rates of plain AdamW: an exponent of 0 instead of -1 for hidden matrices."""
    model, _ = right(plain, width)
    return model, torch.optim.AdamW(model.parameters(), lr=LR)


def half_rates(plain: Callable[[int], nn.Module], width: int) -> Built:
    """Hidden rates that fall with the root of the width."""
    model, optimizer = right(plain, width)
    for group in optimizer.param_groups:
        group["lr"] = LR * (group["lr"] / LR) ** 0.5
    return model, optimizer


def torch_scale(model: nn.Module) -> None:
    """Scores at 1 / sqrt(head size), whatever adapt did."""
    for module in model.modules():
        name, original, _ = vars(module).get("mup_scale", (None, None, None))
        if name:
            setattr(module, name, original)
        drop_factors(module)


def no_multiplier(power: float, model: nn.Module) -> None:
    """A readout without width**power of its 1 / width."""
    for module in model.modules():
        if isinstance(module, mup.MuReadout):
            module.output_mult = module.width_mult() ** power


def drop_all_factors(model: nn.Module) -> None:
    """Without the factor that undoes an embedding times sqrt(width)."""
    for module in model.modules():
        drop_factors(module)


WRONG: dict[str, tuple[str, Callable[[int], Built]]] = {
    "llama": ("hidden rates constant: plain AdamW", partial(flat_rates, PLAIN["llama"])),
    "qwen3": ("its own start kept: one std for all widths", partial(right, PLAIN["qwen3"], init="keep")),
    "mistral": (
        "keys and values grouped wrongly: rates of an input",
        partial(right, PLAIN["mistral"], roles={"*.[kv]_proj.weight": "input: - out"}),
    ),
    "gpt-neox": (
        "heads widen at 1 / sqrt(head size)",
        partial(right, partial(PLAIN["gpt-neox"], wide_heads=True), then=torch_scale),
    ),
    "gpt2": ("tied head without its multiplier", partial(right, PLAIN["gpt2"], then=partial(no_multiplier, 1.0))),
    "gemma": ("embedding times sqrt(width), not undone", partial(right, PLAIN["gemma"], then=drop_all_factors)),
    "mamba": ("hidden rates fall with the root only", partial(half_rates, PLAIN["mamba"])),
    "mixtral": (
        "the router's rates are those of an input",
        partial(right, PLAIN["mixtral"], roles={"*.gate.weight": "input: - out"}),
    ),
    "nanogpt": ("heads widen at torch's scale", partial(right, partial(nano, wide_heads=True), then=torch_scale)),
    "lstm": ("its own start kept: 1 / sqrt(width) everywhere", partial(right, Recurrent, init="keep")),
    "resnet": ("readout divided by the root only", partial(right, ResNet, then=partial(no_multiplier, 0.5))),
}
RIGHT = {name: ("", partial(right, plain)) for name, plain in PLAIN.items()}
RIGHT |= {
    "gpt-neox, wide heads": ("", partial(right, partial(PLAIN["gpt-neox"], wide_heads=True))),
    "nanogpt, wide heads": ("", partial(right, partial(nano, wide_heads=True))),
}


def images(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random images, labelled by a random linear teacher."""
    rng = torch.Generator().manual_seed(seed)
    teacher = torch.randn(3 * 6 * 6, 10, generator=rng)
    for _ in itertools.count():
        x = torch.randn(64, 3, 6, 6, generator=rng)
        yield x, (x.flatten(1) @ teacher).argmax(dim=1)


def image_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the class."""
    return F.cross_entropy(model(batch[0]), batch[1])


def check(name: str, build: Callable[[int], Built], seed: int, **options: Any) -> CoordCheck:
    """The check of one case."""
    family = name.split(",")[0]
    if family == "resnet":
        data, loss = images(seed), image_loss
    else:
        data, loss = random_walks(VOCAB, seed=seed), hugging_face_loss if family in HF else loss_of
    subject = Subject(build, data, loss, name=name)
    return foreign_coord_check(subject, **{"widths": WIDTHS, "seed": 1000 * seed, "progress": False} | options)


def farthest(result: CoordCheck) -> str:
    """The judged slope that is farthest from what it should be."""
    judged = [row for row in result.arm.rows if row.verdict]

    row = max(judged, key=lambda row: abs(row.deviation - result.thresholds.lean))
    return f"{row.deviation:+.2f} {row.quantity} of {row.kind}"


def main() -> int:
    """Print the table, and publish it if it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases with this text in their name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kind", choices=("right", "wrong"), help="only these")
    parser.add_argument("--verbose", action="store_true", help="print each check whole")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [("right", name, *case) for name, case in RIGHT.items()] + [
        ("wrong", name, *case) for name, case in WRONG.items()
    ]
    rows, called, total = [], 0, 0
    for kind, name, what, build in cases:
        if arguments.only not in name or arguments.kind not in (None, kind):
            continue
        began, results = time.process_time(), []
        for seed in range(arguments.seeds):
            results.append(check(name, build, seed))
            if arguments.verbose:
                print(results[-1].summary())
        verdicts = [str(result.verdict) for result in results]
        expected = "PASS" if kind == "right" else "FAIL"
        called, total = called + verdicts.count(expected), total + len(verdicts)
        seconds = (time.process_time() - began) / len(results)
        row = [kind, name, what, " ".join(verdicts), farthest(results[0]), f"{seconds:.0f} s"]
        print(" | ".join(row), flush=True)
        rows.append(row)
    print(f"{called} of {total} called rightly")
    if not (arguments.only or arguments.kind) and arguments.seeds == 3:
        head = ["", "model", "wrong in", "verdicts of three seeds", "farthest slope", "CPU time"]
        publish("foreign_models", [circumstances(), table(head, rows), f"{called} of {total} called rightly."])
    return 0 if called == total else 1


if __name__ == "__main__":
    raise SystemExit(main())
