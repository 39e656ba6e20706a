"""The coordinate check of this project's GPT, with a control for every rule that could be wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from speedrun_mup.config import TrainConfig, make_config
from speedrun_mup.coord_check.check import Control, CoordCheckError, coord_check
from speedrun_mup.coord_check.observe import Record
from speedrun_mup.coord_check.results import CHECKED_AXES, CoordCheck
from speedrun_mup.core.model import GPT
from speedrun_mup.core.model.attention import Dense
from speedrun_mup.core.mup import DepthRole, Parametrization, Role, Update
from speedrun_mup.core.optimizers import OPTIMIZERS
from speedrun_mup.core.utils import World
from speedrun_mup.data.batches import train_batches
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.param_groups import given_to
from speedrun_mup.scaling import depth_of
from speedrun_mup.training.build import build_optimizers
from speedrun_mup.training.model_config import model_config

# Rule table, the kind of update whose rule for hidden matrices it breaks, whose updates must be seen to go how.
_GPT_CONTROLS = (
    ("muon-over-m", Update.SPECTRAL, Role.HIDDEN, -1.0),
    ("muon-sqrt-m", Update.SPECTRAL, Role.HIDDEN, 0.5),
    ("adam-constant", Update.ENTRYWISE, Role.HIDDEN, 1.0),
    ("muonh-sqrt-m", Update.RELATIVE_SPECTRAL, Role.HIDDEN, 0.5),
    ("adamh-constant", Update.RELATIVE_ENTRYWISE, Role.HIDDEN, 0.5),
    ("head-sqrt", None, Role.OUTPUT, 0.5),
)


def gpt_controls(cfg: TrainConfig) -> Iterator[tuple[TrainConfig, Role, float]]:
    """Settings with one rule wrong, whose updates must be seen to go how: of every rule that is in use.

    Where the hidden matrices have a spectral update, Adam's rule is in use too, for the others; its control gives them
    to Adam.
    """
    given_to_adam = given_to("adam") | {"orthogonalizer": None}
    kind = OPTIMIZERS[cfg.groups["matrix"].optimizer].kind
    for name, breaks, role, slope in _GPT_CONTROLS:
        wrong = replace(cfg, parametrization=name)
        if breaks in (None, kind):
            yield wrong, role, slope
        elif breaks is Update.ENTRYWISE:
            yield replace(wrong, **given_to_adam), role, slope


# What is wrong with a depth rule, whose updates must then be off by how much per doubling of the layers.
_DEPTH_CONTROLS: tuple[tuple[str, dict[str, Any], DepthRole, float], ...] = (
    ("no-depth-rule", {"depth_rule": "none"}, DepthRole.WRITES, 1.0),
    ("branch-per-sqrt", {"depth_branch_exponent": -0.5, "depth_lr_exponent": 0.0}, DepthRole.WRITES, 0.5),
    ("branch-too-small", {"depth_branch_exponent": -1.5, "depth_lr_exponent": 0.0}, DepthRole.WRITES, -0.5),
    ("inner-rates-grow", {"depth_branch_exponent": -1.5, "depth_lr_exponent": 0.5}, DepthRole.BRANCH, 0.5),
)


def depth_controls(cfg: TrainConfig) -> Iterator[tuple[str, TrainConfig, DepthRole, float]]:
    """Names and settings with one exponent of the depth rule wrong, whose updates must be seen to go how."""
    right: dict[str, Any] = {"depth_rule": "completep", "depth_branch_exponent": None, "depth_lr_exponent": None}
    for name, wrong, role, slope in _DEPTH_CONTROLS:
        yield name, replace(cfg, **right | wrong), role, slope


def gpt_coord_check(
    cfg: TrainConfig | None = None,
    widths: Sequence[int] = (64, 128, 256, 512),
    *,
    axis: str = "width",
    table: Parametrization | None = None,
    steps: int = 6,
    seeds: int = 1,
    tokens: int = 512,
    controls: bool = True,
    progress: bool = True,
) -> CoordCheck:
    """Check the GPT as `cfg` (default: the laptop preset) trains it, at all `widths` instead of its own.

    Learning rates follow the square root of `tokens`, so that the few, small steps of a check stay where the loss is not
    yet saturated. Along depth the width is the one that they were tuned at, and a depth rule has to be in force.

    Args:
        cfg: settings of the model, the optimizers and the data (auto: the embedded corpus).
        widths: as for coord_check; numbers of layers along depth.
        axis: "width" or "n_layer", what is scaled.
        table: a rule table of your own instead of cfg.parametrization.
        steps: updates, at least 4.
        seeds: models per width.
        tokens: of a step; no fewer than the widest width, or Muon's updates cannot have full rank.
        controls: whether to run the controls; without them the check can fail, but not pass.
        progress: whether to show a progress bar.

    Raises:
        CoordCheckError: for widths, steps, seeds or tokens that cannot give a verdict.
        ConfigError: for data that cannot be read.
    """
    cfg = cfg or make_config("laptop", {"parametrization": "mup"})
    widest = max(widths) if axis == "width" else cfg.tuned_width
    if tokens < widest:
        raise CoordCheckError(f"tokens={tokens} is less than the widest width, {widest}; take as many or more")
    depth = depth_of(cfg)
    if axis == "n_layer" and not depth["base_layers"]:
        raise CoordCheckError("n_layer has no base: give the layers that the rates were tuned at, --base-layers")
    corpus, _ = find_corpus("embedded" if cfg.data == "auto" else cfg.data, cfg.tokenizer)
    window = min(cfg.window_tokens, tokens) // cfg.block_size
    lr_scale = cfg.lr_scale * math.sqrt(tokens / cfg.schedule.at(0).tokens)
    cfg = replace(cfg, width=widest, base_width=cfg.tuned_width, lr_scale=lr_scale, kernel_warmup=0)

    def recipe(cfg: TrainConfig, table: Parametrization | None = None) -> dict[str, Any]:
        of_size: dict[int, Any] = {size: replace(cfg, **cast(Any, {axis: size})) for size in widths}
        shapes = {size: model_config(sized, corpus, "dense", torch.float32) for size, sized in of_size.items()}
        if table is not None:
            shapes = {width: replace(shape, parametrization=table) for width, shape in shapes.items()}
        return {
            "build_model": lambda width: GPT(shapes[width], cfg.seed + torch.initial_seed()),
            "optimizer": lambda model: build_optimizers(model, cfg, World()),
        }

    wrongs = depth_controls(cfg) if axis == "n_layer" else ((it[0].parametrization, *it) for it in gpt_controls(cfg))
    arms = [Control(name, **recipe(wrong), role=role, slope=slope) for name, wrong, role, slope in wrongs if controls]
    based = f", {depth['depth_rule'].name} from {depth['base_layers']} layers" if axis == "n_layer" else ""
    batches = train_batches(corpus, tokens, 1, cfg.seed, order=cfg.data_order)
    return coord_check(
        widths=widths,
        data=map(batches.micro_batch, itertools.count()),
        loss=lambda model, batch: model(*batch, window),
        **recipe(cfg, table),
        controls=arms,
        steps=steps,
        seeds=seeds,
        taps=_tap_scores if axis == "width" else _tap_stream,
        output_scale=_logit_scale,
        name=f"GPT, {table.name if table else cfg.parametrization}, {cfg.groups['matrix'].optimizer}{based}",
        progress=progress,
        axis=CHECKED_AXES[axis],
    )


class _TappedAttention(Dense):
    """The reference attention, which gives `record` its scores."""

    def __init__(self, name: str, record: Record):
        self.name, self.record = name, record

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """q, k, v (T, H, C) -> (T, H, C)."""
        if not torch.is_grad_enabled():  # looks are taken without
            self.record(self.name, torch.einsum("qhc,khc->hqk", q, k)[:, mask] * scale)
        return super().attend(q, k, v, mask, scale)


def _logit_scale(model: Any) -> dict[str, float]:
    """What a GPT multiplies the product of its head by."""
    return {"lm_head.weight": model.logit_scale}


def _tap_scores(model: Any, record: Record) -> None:
    """Have every attention layer of a GPT record what goes into its softmax."""
    for layer, block in enumerate(model.blocks):
        if block.attn is not None:
            block.attn.backend = _TappedAttention(f"blocks.{layer}.attn.scores", record)


def _tap_stream(model: Any, record: Record) -> None:
    """Have a GPT record the share of the stream behind its last layer that is not along x0: what the layers added."""

    def look(blocks: Any, inputs: Any, stream: Tensor) -> None:
        x0 = inputs[0]
        along = (stream * x0).sum(-1, keepdim=True) / x0.square().sum(-1, keepdim=True) * x0
        record("stream", (stream - along) / stream.square().mean(-1, keepdim=True).sqrt(), "stream")

    model.blocks.register_forward_hook(look)
    _tap_scores(model, record)
