"""Record 26 of the modded-nanogpt speedrun, for any width, even depth >= 6, head dimension and vocabulary.

The architecture is its authors' (Keller Jordan and contributors, github.com/KellerJordan/modded-nanogpt, 2025-07); the
literals of its 12 layers are rules here that give the same 12 layers. Names of modules and parameters are the record's,
so its checkpoints load.

Shapes: T tokens, D width, H heads, C head_dim, V padded vocabulary, L layers. There is no batch dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun_mup.core import mup
from speedrun_mup.core.attention import BACKENDS, Window, document_numbers
from speedrun_mup.core.kernels.fp8 import head_scales
from speedrun_mup.core.model.config import GPTConfig
from speedrun_mup.core.model.layers import Block, Embedding, Linear, rms_norm, rotary_table
from speedrun_mup.core.model.loss import FUSED_LOGIT_BYTES, LOGIT_BUDGET, SOFTCAP_SLOPE, SoftcapCrossEntropy, softcap
from speedrun_mup.core.mup import Init, Role


class GPT(nn.Module):
    """The language model. `model(tokens, targets, window)` is the summed loss; `model.logits(tokens, window)` predicts."""

    def __init__(self, cfg: GPTConfig, seed: int = 0):
        super().__init__()
        self.cfg = cfg
        V, D, L, base = cfg.padded_vocab, cfg.width, cfg.n_layer, cfg.base_width
        self.embed = Embedding(V, D, cfg.embed_dtype)
        self.value_embeds = nn.ModuleList(Embedding(V, D, cfg.embed_dtype) for _ in range(3))
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(L))
        self.lm_head = Linear(D, V)
        self.scalars = nn.Parameter(torch.empty(5 * L))
        mup.declare(self.embed, "weight", Role.INPUT, (V, base), "in out", "embed", init="unit")
        for table in self.value_embeds:
            mup.declare(table, "weight", Role.INPUT, (V, base), "in out", "value_embed", init="unit")
        head = mup.declare(self.lm_head, "weight", Role.OUTPUT, (V, base), "out in", "head", init="zero")
        first = Init(constant=(*[1.0] * L, *[1.0, 0.0] * L, *[0.5, 0.5] * L))
        mup.declare(self, "scalars", Role.SCALAR, (5 * L,), "n", "scalar", init=first)
        forward = cfg.table.forward(head)
        self.logit_scale = forward / (SOFTCAP_SLOPE * math.sqrt(base))
        self.scales = head_scales(D, forward) if cfg.fp8 else None
        self.fused = False
        mup.init_parameters(self, cfg.table, seed)

    def hidden(self, tokens: Tensor, window: Window) -> Tensor:
        """(T,) ids and the long window in blocks -> (T, D), the normed stream that the head reads."""
        return self.stream(tokens, window, rotary_table(len(tokens), self.cfg.head_dim, tokens.device))

    def stream(self, tokens: Tensor, window: Window, table: tuple[Tensor, Tensor]) -> Tensor:
        """`hidden` for a given rotary table: this is what gets compiled, and the table need not be made again each time."""
        cfg, L = self.cfg, self.cfg.n_layer
        skips = self.scalars[: L // 2]
        mixes = self.scalars[L : 3 * L].view(L, 2)
        lambdas = self.scalars[3 * L : 5 * L].view(L, 2)

        doc = document_numbers(tokens, cfg.bos_token)
        backend = BACKENDS[cfg.attention]()
        widest = cfg.widest_window
        masks = {
            True: backend.build_mask(doc, window, cfg.block_size, widest),
            False: backend.build_mask(doc, window // 2, cfg.block_size, widest and widest // 2),
        }

        x = x0 = rms_norm(self.embed(tokens))
        value_embeds = [embed(tokens) for embed in self.value_embeds]
        stack: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            if layer >= L // 2:
                x = x + skips[layer - L // 2] * stack.pop()
            which = cfg.value_embed_of(layer)
            value_embed = None if which is None else value_embeds[which]
            x = block(x, x0, mixes[layer], value_embed, lambdas[layer], masks[cfg.has_long_window(layer)], table)
            if layer < L // 2:
                stack.append(x)
        return rms_norm(x)

    def logits(self, tokens: Tensor, window: Window) -> Tensor:
        """(T,) -> (T, V) float32, soft-capped. All of them at once: for sampling and tests; training never does this.

        T is any length: what fills up the last block comes after all tokens, so no prediction depends on it.
        """
        T, block = len(tokens), self.cfg.block_size
        padded = F.pad(tokens, (0, -(-max(T, 1) // block) * block - T), value=self.cfg.bos_token)
        return softcap(self.lm_head(self.hidden(padded, window)[:T]), self.logit_scale)

    def forward(self, tokens: Tensor, targets: Tensor, window: Window) -> Tensor:
        """(T,) int32 ids and (T,) int64 targets -> the cross-entropy summed over tokens, a float32 scalar."""
        weight: Tensor = self.lm_head.weight  # a Function is told that a parameter needs a gradient even under no_grad
        training = torch.is_grad_enabled()
        return SoftcapCrossEntropy.apply(
            self.hidden(tokens, window),
            weight if training else weight.detach(),
            targets,
            self.logit_scale,
            FUSED_LOGIT_BYTES // self.cfg.embed_dtype.itemsize if self.fused else LOGIT_BUDGET,
            self.scales if training else None,
            self.fused,
        )

    def compile_parts(self) -> None:
        """Compile what gains by it, with static shapes: all that comes before the head, and the loss around its products.

        A window given as a tensor never makes it compile again.
        """
        self.stream = torch.compile(self.stream, dynamic=False)  # type: ignore[method-assign]
        self.fused = True

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Accept the record's own checkpoints: compiled names, and `scalars` padded to a multiple of its 8 ranks."""
        key, own = prefix + "scalars", self.scalars.numel()
        if key in state_dict and own < state_dict[key].numel() < own + 64:
            state_dict[key] = state_dict[key][:own]
        super()._load_from_state_dict(state_dict, prefix, *args)


def strip_compiled(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the "_orig_mod." that torch.compile puts before every name."""
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()}
