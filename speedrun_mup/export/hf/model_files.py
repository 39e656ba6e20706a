"""What transformers needs of a model: its settings and its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import SOFTCAP, GPTConfig, Head, ModelShape
from speedrun_mup.core.model.options.gates import SparseGate
from speedrun_mup.training.load import LoadedRun
from speedrun_mup.training.safetensors_writer import write_file

SHARD_BYTES = 5 * 10**9  # of a file of weights, as transformers has it
CODE = ("configuration_speedrun", "modeling_speedrun")


def model_settings(run: LoadedRun, fold: bool) -> dict[str, Any]:
    """What config.json holds. ConfigError for a technique that the exported code does not have."""
    cfg, head = run.model.cfg, run.model.lm_head
    gate = gate_channels(cfg)
    half = max(run.window // 2, 1)
    windows = [run.window if cfg.has_long_window(layer) else half for layer in range(cfg.n_layer)]
    return {
        "architectures": ["SpeedrunForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE[0]}.SpeedrunConfig",
            "AutoModelForCausalLM": f"{CODE[1]}.SpeedrunForCausalLM",
        },
        "model_type": "speedrun_mup",
        "dtype": "float32",
        "vocab_size": cfg.padded_vocab,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.width // cfg.head_dim,
        "head_dim": cfg.head_dim,
        "intermediate_size": run.model.get_parameter("blocks.0.mlp.c_fc.weight").size(0),
        "block_size": cfg.block_size,
        "attention_windows": [None if n == cfg.layer_without_attention else each for n, each in enumerate(windows)],
        "value_embeddings": [cfg.value_embed_of(layer) for layer in range(cfg.n_layer)],
        "attention_scale": cfg.attn.scale,
        "attention_gate": gate,
        "logit_cap": SOFTCAP,
        "logit_scale": 1.0 if fold else head.scale,
        "max_position_embeddings": run.config.micro_batch_tokens,
        "tie_word_embeddings": False,
        "use_cache": True,
        **special_tokens(cfg),
    }


def gate_channels(cfg: GPTConfig) -> int:
    """Channels of the attention gate, 0 without one. ConfigError if the model is otherwise not record 26's."""
    plain = GPTConfig()
    gates = [option for option in cfg.attn.options if type(option) is SparseGate]
    others = [option for option in cfg.attn.options if type(option) is not SparseGate] + gates[1:]
    changed = [getattr(cfg, part) for part in ("inputs", "values", "wiring", "head")]
    changed = [
        each for each, own in zip(changed, (plain.inputs, plain.values, plain.wiring, plain.head)) if each != own
    ]
    if replace(cfg.attn, scale=plain.attn.scale, options=()) != plain.attn:
        changed.append(cfg.attn)
    named = [str(each) for each in [*changed, *others]]
    if named:
        raise ConfigError(
            f"this model cannot be exported to hf: the code that is written has nothing like {', '.join(named)}; "
            "export its weights, --to pt or dcp"
        )
    return gates[0].channels if gates else 0


def special_tokens(cfg: ModelShape) -> dict[str, int]:
    """A document ends where the next one would begin, and what is no text is masked: one token serves for all."""
    return {name: cfg.bos_token for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def generation_settings(cfg: ModelShape) -> dict[str, Any]:
    """What generation_config.json holds: no token of the padded vocabulary is ever drawn."""
    return {**special_tokens(cfg), "suppress_tokens": [*range(cfg.vocab_size, cfg.padded_vocab)]}


def weights_of(run: LoadedRun, fold: bool) -> dict[str, Tensor]:
    """The parameters by the names that they have here too, float32. fold: the head's scale is in its weights."""
    weights = {name: tensor.detach().float().contiguous() for name, tensor in run.model.state_dict().items()}
    head: Head = run.model.lm_head
    return weights | ({"lm_head.weight": weights["lm_head.weight"] * head.scale} if fold else {})


def write_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """model.safetensors, or several of at most SHARD_BYTES each and an index, as transformers names them."""
    shards = list(_shards(weights))
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0])
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard)
    place = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": place}
    write_file(folder / "model.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())


def _shards(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors in their order, as many as fit, at least one."""
    shard: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard
