"""What a run is built of: its corpus, the model on its device, and the optimizers."""

from __future__ import annotations

from typing import Any, NamedTuple

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.distributed import World
from speedrun_mup.core.errors import UserError
from speedrun_mup.core.model import GPT
from speedrun_mup.core.optimizers import OPTIMIZERS, GroupHyperparams, ShardedOptimizer, param_groups
from speedrun_mup.data.corpus import cache_folder, find_corpus
from speedrun_mup.data.shards import Corpus
from speedrun_mup.param_groups import hyperparams_of
from speedrun_mup.scaling import run_scaling
from speedrun_mup.techniques import with_techniques
from speedrun_mup.training.hardware import pick_attention, pick_compile, pick_dtype, pick_fp8, use_compile_cache
from speedrun_mup.training.memory import translate_oom
from speedrun_mup.training.model_config import model_config


def prepare_corpus(cfg: TrainConfig, world: World) -> tuple[Corpus, str]:
    """The corpus that `cfg` names and a line about it. Rank 0 comes first, because it may have to write the corpus."""

    def find() -> tuple[Corpus, str]:
        try:
            return find_corpus(cfg.data, cfg.tokenizer)
        except UserError as fault:
            if cfg.resume:
                raise type(fault)(f"{fault}; if the data moved, add --data and their new place") from None
            raise

    return world.on_main(find)


class BuiltModel(NamedTuple):
    """A model on its device, whether it is compiled, and a line about what was chosen for the device and why."""

    model: GPT
    compiled: bool
    choices: str


def build_model(cfg: TrainConfig, corpus: Corpus, world: World) -> BuiltModel:
    """The model with its first weights. Raises OutOfMemory; ConfigError for what this device cannot do."""
    use_compile_cache(cache_folder() / "compiled")
    with translate_oom(cfg, 0, "model"):
        compiled, why_compiled = pick_compile(cfg, world.device)
        dtype = pick_dtype(cfg, world.device)
        attention, why_attention = pick_attention(cfg, world.device, dtype, compiled)
        fp8, why_head = pick_fp8(cfg, world.device, dtype, compiled)
        model = GPT(model_config(cfg, corpus, attention, dtype, fp8), cfg.seed).to(world.device)
    if compiled:
        model.compile()
    precision = str(dtype).removeprefix("torch.")
    choices = (
        f"device: {world.size} x {world.device.type}, {precision}; {'' if compiled else 'not '}compiled ({why_compiled}); "
        f"attention {attention} ({why_attention}); head in {'fp8' if fp8 else precision} ({why_head})"
    )
    return BuiltModel(model, compiled, choices)


def tuned_values(cfg: TrainConfig) -> dict[str, GroupHyperparams]:
    """What each parameter group was tuned to at base width."""
    common: dict[str, Any] = {"momentum": cfg.momentum, "orthogonalizer": cfg.orthogonalizer}
    tuned = {name: GroupHyperparams(**values._asdict(), **common) for name, values in hyperparams_of(cfg).items()}
    return with_techniques("optimizers", tuned, cfg)


def build_optimizers(model: GPT, cfg: TrainConfig, world: World, compiled: bool = False) -> list[ShardedOptimizer]:
    """One for each name of an optimizer in `tuned_values`."""
    groups = param_groups(model, model.cfg.rules, tuned_values(cfg), run_scaling(cfg))
    optimizers = [OPTIMIZERS[name](of_it, world) for name, of_it in groups.items()]
    for optimizer in optimizers if compiled else ():
        optimizer.compile_parts()
    return optimizers
