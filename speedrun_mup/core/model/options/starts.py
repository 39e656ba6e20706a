"""First values of hidden matrices other than record 26's, whose last matrix of each branch begins at zero."""

from __future__ import annotations

from dataclasses import replace

from speedrun_mup.core.model.gpt import GPTConfig
from speedrun_mup.core.mup import Init

# Of modded-nanogpt's track 3 with MuonH and AdamH, whose matrices keep their norm: normal, by fan-in.
_TRACK3 = 0.33**0.5
HIDDEN_INITS = {
    "track3": (
        ("attn.c_proj.weight", Init(1.25 * _TRACK3, by_fan_in=True)),
        ("mlp.c_fc.weight", Init(1.5 * _TRACK3, by_fan_in=True)),
        ("mlp.c_proj.weight", Init(3.0 * _TRACK3, by_fan_in=True)),
    )
}


def set_hidden_init(cfg: GPTConfig, name: str) -> GPTConfig:
    """`cfg` whose hidden matrices begin as in `name`, one of HIDDEN_INITS; queries, keys and values as in record 26."""
    return replace(cfg, starts=(*cfg.starts, *HIDDEN_INITS[name]))
