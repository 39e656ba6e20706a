"""Record 26 of the modded-nanogpt speedrun, for any width, depth of 2 or more, head dimension and vocabulary.

The architecture is its authors' (Keller Jordan and contributors, github.com/KellerJordan/modded-nanogpt, 2025-07); the
literals of its 12 layers are rules here that give the same 12 layers. Names of modules and parameters are the record's,
so its checkpoints load.

A model has five parts, each built by a frozen config of its own: token inputs, values, attention, wiring and head. A
technique is another config of a part, or an option in it; one that is absent costs nothing.

Shapes: T tokens, D width, V padded vocabulary, L layers. There is no batch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun_mup.core import mup
from speedrun_mup.core.model.attention import BACKENDS, AttentionConfig, Context, Window, document_numbers
from speedrun_mup.core.model.head import HeadConfig
from speedrun_mup.core.model.inputs import TokenInputsConfig
from speedrun_mup.core.model.layers import rms_norm, rotary_table
from speedrun_mup.core.model.record import SCALARS, unpack_scalars
from speedrun_mup.core.model.shape import ModelShape
from speedrun_mup.core.model.values import ValuesConfig
from speedrun_mup.core.model.wiring import UNetConfig


@dataclass(frozen=True)
class GPTConfig(ModelShape):
    """A model: its shape, and what each of its five parts is. The defaults are the record's.

    starts: what names of parameters end in, and how those begin in place of what their modules declare.
    """

    inputs: TokenInputsConfig = TokenInputsConfig()
    values: ValuesConfig = ValuesConfig()
    attn: AttentionConfig = AttentionConfig()
    wiring: UNetConfig = UNetConfig()
    head: HeadConfig = HeadConfig()
    starts: tuple[tuple[str, mup.Init], ...] = ()


class GPT(nn.Module):
    """The language model. `model(tokens, targets, window)` is the summed loss; `model.logits(tokens, window)` predicts."""

    def __init__(self, cfg: GPTConfig, seed: int = 0):
        super().__init__()
        self.cfg = cfg
        self.embed = cfg.inputs.build(cfg)
        self.value_embeds = cfg.values.build(cfg)
        self.blocks = cfg.wiring.build(cfg, lambda layer: cfg.attn.build(cfg, layer, cfg.values.mixer(cfg, layer)))
        self.lm_head = cfg.head.build(cfg)
        mup.set_depth(self, cfg.m_depth)
        mup.set_init(self, dict(cfg.starts))
        mup.init_parameters(self, cfg.rules, seed)

    @property
    def logit_scale(self) -> float:
        """What the head's products are multiplied by before the soft cap."""
        return self.lm_head.scale

    def hidden(self, tokens: Tensor, window: Window) -> Tensor:
        """(T,) ids and the long window in blocks -> (T, D), the normed stream that the head reads."""
        return self.stream(tokens, window, rotary_table(len(tokens), self.cfg.head_dim, tokens.device))

    def stream(self, tokens: Tensor, window: Window, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """`hidden` for a given rotary table: this is what gets compiled, and the table need not be made again each time."""
        return self.read(tokens, self.masks(document_numbers(tokens, self.cfg.bos_token), window), cos_sin)

    def read(self, tokens: Tensor, masks: tuple[Any, Any], cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """`stream` for given masks of the short and the long window."""
        x0 = self.embed(tokens)
        context = Context(masks, cos_sin, self.value_embeds(tokens))
        return rms_norm(self.blocks(x0, context))

    def masks(self, doc: Tensor, window: Window) -> tuple[Any, Any]:
        """(T,) document numbers -> masks for layers with the short and with the long window (record 20)."""
        backend, block, widest = BACKENDS[self.cfg.attention](), self.cfg.block_size, self.cfg.widest_window
        long = backend.build_mask(doc, window, block, widest)
        return backend.build_mask(doc, window // 2, block, widest and widest // 2), long

    def logits(self, tokens: Tensor, window: Window) -> Tensor:
        """(T,) -> (T, V) float32, soft-capped. All of them at once: for sampling and tests; training never does this.

        T is any length: what fills up the last block comes after all tokens, so no prediction depends on it.
        """
        T, block = len(tokens), self.cfg.block_size
        padded = F.pad(tokens, (0, -(-max(T, 1) // block) * block - T), value=self.cfg.bos_token)
        return self.lm_head.logits(self.hidden(padded, window)[:T])

    @torch.no_grad()
    def losses(self, tokens: Tensor, targets: Tensor, window: Window) -> Tensor:
        """(T,) int32 ids and (T,) int64 targets -> the cross-entropy of every token, (T,) float32, without gradients."""
        return self.lm_head.losses(self.hidden(tokens, window), targets)

    def forward(self, tokens: Tensor, targets: Tensor, window: Window, weights: Tensor | None = None) -> Tensor:
        """(T,) int32 ids and (T,) int64 targets -> the cross-entropy summed over tokens, a float32 scalar.

        weights: (K,), of K targets of each token, which are (T, K) then; -1 is none.
        """
        more = () if weights is None else (weights,)
        return self.lm_head.loss(self.hidden(tokens, window), targets, *more)

    def compile(self) -> None:
        """Compile what gains by it, with static shapes: all that comes before the head, and the loss around its products.

        A window given as a tensor never makes it compile again.
        """
        self.stream = torch.compile(self.stream, dynamic=False)  # type: ignore[method-assign]
        self.lm_head.fused = True

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Accept the flat scalars of the record's own checkpoints and of the first edition's."""
        flat, errors = state_dict.pop(prefix + SCALARS, None), args[-1]
        if flat is not None:
            try:
                named = unpack_scalars(flat, self.cfg.n_layer)
                state_dict.update({prefix + name: tensor for name, tensor in named.items()})
            except ValueError as fault:
                errors.append(f"size mismatch for {prefix}{fault}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def declarations(cfg: GPTConfig) -> GPT:
    """The model on the meta device: what its parts declare, in milliseconds and without weights."""
    with torch.device("meta"):
        return GPT(cfg)
