"""Presets: recipes that are known to work, as values of settings, with what they cost and the loss to expect of them.

A recipe names what differs from the defaults of TrainConfig, which are record 26 as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A complete set of settings and what it costs: hardware, minutes, and the loss to expect from which tokens.

    base_width: the width that its learning rates were tuned at, for runs with muP.
    """

    about: str
    base_width: int
    tokenizer: str
    expected_loss: float
    settings: Mapping[str, Any]


PRESETS: dict[str, Preset] = {
    "laptop": Preset(
        "width 128, 6 layers, bytes of Python source; 2 CPU cores, about a minute",
        64,
        "byte",
        1.63,
        {
            "width": 128,
            "n_layer": 6,
            "head_dim": 32,
            "block_size": 64,
            "window_tokens": 256,
            "iterations": 200,
            "micro_batch_tokens": 256,
            "micro_batches": 8,
            "scalar_eps": 1e-3,
            "momentum": 0.85,
            "data_order": "shuffled",
            "val_tokens": 131_072,
            "val_chunk_tokens": 4096,
            "val_every": 50,
            "kernel_warmup": 0,
            "compile": False,  # over in 10 s on an H100, where compiling takes longer
        },
    ),
    "record26": Preset(
        "record 26 as published, width 768, 12 layers, FineWeb; 8xH100, about 3 minutes, validation loss 3.28",
        768,
        "gpt2",
        3.28,
        {},
    ),
}
