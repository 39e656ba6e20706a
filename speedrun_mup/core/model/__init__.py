"""Record 26 of the modded-nanogpt speedrun, for any width, even depth >= 6, head dimension and vocabulary.

The architecture is its authors' (Keller Jordan and contributors, github.com/KellerJordan/modded-nanogpt, 2025-07); the
literals of its 12 layers are rules here that give the same 12 layers. Names of modules and parameters are the record's,
so its checkpoints load.

Shapes: T tokens, D width, H heads, C head_dim, V padded vocabulary, L layers. There is no batch dimension.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun_mup.core import mup
from speedrun_mup.core.attention import BACKENDS, Window, document_numbers
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.kernels.fp8 import E5M2, Scales, head_scales, mm, mm_backward, quantize
from speedrun_mup.core.mup import Role
from speedrun_mup.core.seeds import generator

RMS_EPS = torch.finfo(torch.float32).eps  # what torch uses for bf16 inputs too since January 2025
ATTENTION_SCALE = 0.12  # record 26's constant; with QK norm the largest score is 0.12 * head_dim
SOFTCAP, SOFTCAP_SLOPE = 30.0, 7.5  # logits = 30 * sigmoid(z / (7.5 * sqrt(width)))
LOGIT_BUDGET = 2**24  # logits held at a time by the chunked loss: 64 MiB in float32
FUSED_LOGIT_BYTES = 2**31  # of them where none is written in float32: 16,384 rows of the record's head in bfloat16
VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model, its base width and its parametrization.

    vocab_size: of the tokenizer; padded up to a multiple of 128 inside. base_width: the width that the learning rates
    were tuned at. bos_token: opens a document. parametrization: a name in mup.PARAMETRIZATIONS or a table of your own.
    fp8: train the head with 8-bit products; it predicts and validates without them, as in the record. widest_window: in
    blocks, what a window that is given as a tensor may come to (None: the whole sequence).
    Raises ConfigError for an impossible shape.
    """

    vocab_size: int = 50257
    bos_token: int = 50256
    n_layer: int = 12
    width: int = 768
    base_width: int = 768
    head_dim: int = 128
    block_size: int = 128
    parametrization: str | mup.Parametrization = "record26"
    embed_dtype: torch.dtype = torch.float32
    attention: str = "blocked"
    fp8: bool = False
    widest_window: int | None = None

    def __post_init__(self) -> None:
        if self.head_dim < 4 or self.head_dim % 4:
            raise ConfigError(f"head_dim={self.head_dim} must be a multiple of 4 (half of its pairs rotate)")
        for name in ("width", "base_width"):
            value = getattr(self, name)
            if value < self.head_dim or value % self.head_dim:
                near = max(value // self.head_dim, 1) * self.head_dim
                raise ConfigError(
                    f"{name}={value} is not a multiple of head_dim={self.head_dim}; try {near} or {near + self.head_dim}"
                )
        if self.n_layer < 6 or self.n_layer % 2:
            raise ConfigError(
                f"n_layer={self.n_layer} must be even and at least 6 (three value embeddings on each side)"
            )
        if not 0 <= self.bos_token < self.vocab_size:
            raise ConfigError(f"bos_token={self.bos_token} is outside the vocabulary of {self.vocab_size}")

    @property
    def padded_vocab(self) -> int:
        """V: the vocabulary rounded up to a multiple of 128. The padding takes part in the softmax, as in the record."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def table(self) -> mup.Parametrization:
        """The rule table in force."""
        if isinstance(self.parametrization, mup.Parametrization):
            return self.parametrization
        if self.parametrization not in mup.PARAMETRIZATIONS:
            raise ConfigError(
                f"parametrization={self.parametrization!r} is unknown; choose {', '.join(mup.PARAMETRIZATIONS)}"
            )
        return mup.PARAMETRIZATIONS[self.parametrization]

    @property
    def layer_without_attention(self) -> int:
        """The second layer of the decoder half has an MLP only: layer 7 of 12."""
        return self.n_layer // 2 + 1

    def has_long_window(self, layer: int) -> bool:
        """Every fourth layer from either end, mirrored in the middle: 0, 4, 7 and 11 of 12."""
        from_end = layer if layer < self.n_layer // 2 else self.n_layer - 1 - layer
        return from_end % 4 == 0

    def value_embed_of(self, layer: int) -> int | None:
        """Which of the three value embeddings a layer adds: 012...012."""
        last_three = layer - (self.n_layer - 3)
        return layer if layer < 3 else last_three if last_three >= 0 else None


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32; several times faster than autograd's on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / x.size(-1) + RMS_EPS).rsqrt()
        y = x * scale  # float32
        # Torch 2.11 compiles a Function that ends with a conversion to the same type to zero gradients.
        if y.dtype is not x.dtype:
            y = y.type_as(x)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """scale * (g - y * mean(g * y))."""
        (grad,), (y, scale) = grads, ctx.saved_tensors
        along = (grad * y).mean(dim=-1, keepdim=True, dtype=torch.float32)
        return (torch.addcmul(grad.float(), y.float(), along, value=-1) * scale).type_as(grad)


def rms_norm(x: Tensor) -> Tensor:
    """Divide (..., D) by the root mean square of its last dimension; no gain. The reference is F.rms_norm."""
    return RMSNorm.apply(x)


class ReluSquared(torch.autograd.Function):
    """relu(x)^2 with one saved tensor and two passes in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        r = x.relu()
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """2 relu(x) g."""
        return (grads[0] * ctx.saved_tensors[0]).mul_(2)


class Linear(nn.Module):
    """A matrix (d_out, d_in) without bias, cast to the activation's type at use.

    The batch of one keeps torch's compiler from folding a sum that follows into the product: that costs a copy of the
    summand, where the norm that comes next can add it on its way.
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        """(T, d_in) -> (T, d_out)."""
        return F.linear(x[None], self.weight.type_as(x))[0]


class Embedding(nn.Module):
    """A table (V, D)."""

    def __init__(self, vocab: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """(T,) ids -> (T, D)."""
        return F.embedding(tokens, self.weight)


@functools.lru_cache(maxsize=2)  # of a run's training and of its validation
@torch.inference_mode(False)  # else one that validation made first could not be used in training
def rotary_table(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and signed sin, (T, 1, C) float32. The slower half of the pairs does not rotate at all (half-truncated RoPE)."""
    rotating = head_dim // 4
    frequency = (1 / 1024) ** torch.linspace(0, 1, rotating, device=device)
    frequency = torch.cat([frequency, frequency.new_zeros(head_dim // 2 - rotating)])
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, -sin], dim=-1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of (T, H, C) in float32; pairs are (i, i + C / 2)."""
    cos, sin = table
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.size(-1) // 2, dims=-1), sin).type_as(x)


class Attention(nn.Module):
    """Causal attention with QK norm, rotary positions and an optional value embedding."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        D, base = cfg.width, cfg.base_width
        self.head_dim = cfg.head_dim
        self.backend = BACKENDS[cfg.attention]()
        self.qkv_w = nn.Parameter(torch.empty(3, D, D))
        self.c_proj = Linear(D, D)
        mup.declare(self, "qkv_w", Role.HIDDEN, (3, base, base), "stack out in", "matrix")
        mup.declare(self.c_proj, "weight", Role.HIDDEN, (base, base), "out in", "matrix")

    def forward(
        self, x: Tensor, value_embed: Tensor | None, lambdas: Tensor, mask: Any, table: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x, value_embed (T, D), lambdas (2,) -> (T, D)."""
        T = len(x)
        qkv = F.linear(x, self.qkv_w.flatten(end_dim=1).type_as(x)).view(T, -1, self.head_dim)  # (T, 3H, C)
        H = qkv.size(1) // 3
        qk, v = qkv.split([2 * H, H], dim=1)
        q, k = rms_norm(rotate(qk, table)).chunk(2, dim=1)  # turning keeps the norm, so this is the record's order too
        v = lambdas[0] * v
        if value_embed is not None:
            v = v + lambdas[1] * value_embed.view_as(v)
        y = self.backend.attend(q, k, v, mask, ATTENTION_SCALE)
        return self.c_proj(y.reshape(T, -1))


class MLP(nn.Module):
    """Four times wider inside, with a squared ReLU (So et al., Primer, arXiv 2109.08668)."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        D, base = cfg.width, cfg.base_width
        self.c_fc = Linear(D, 4 * D)
        self.c_proj = Linear(4 * D, D)
        mup.declare(self.c_fc, "weight", Role.HIDDEN, (4 * base, base), "out in", "matrix")
        mup.declare(self.c_proj, "weight", Role.HIDDEN, (base, 4 * base), "out in", "matrix")

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.c_proj(ReluSquared.apply(self.c_fc(x)))


class Block(nn.Module):
    """One layer: mix with the embedding, attend (in all layers but one), then the MLP."""

    def __init__(self, cfg: GPTConfig, layer: int):
        super().__init__()
        self.attn = None if layer == cfg.layer_without_attention else Attention(cfg)
        self.mlp = MLP(cfg)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        mix: Tensor,
        value_embed: Tensor | None,
        lambdas: Tensor,
        mask: Any,
        table: tuple[Tensor, Tensor],
    ) -> Tensor:
        """x and x0, the normed embedding, (T, D); mix and lambdas (2,) -> (T, D)."""
        x = mix[0] * x + mix[1] * x0
        if self.attn is not None:
            x = x + self.attn(rms_norm(x), value_embed, lambdas, mask, table)
        return x + self.mlp(rms_norm(x))


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
        mup.declare(self.embed, "weight", Role.INPUT, (V, base), "in out", "embed")
        for table in self.value_embeds:
            mup.declare(table, "weight", Role.INPUT, (V, base), "in out", "value_embed")
        head = mup.declare(self.lm_head, "weight", Role.OUTPUT, (V, base), "out in", "head")
        mup.declare(self, "scalars", Role.SCALAR, (5 * L,), "n", "scalar")
        forward = head.factors(cfg.table, "adam").forward
        self.logit_scale = forward / (SOFTCAP_SLOPE * math.sqrt(base))
        self.scales = head_scales(D, forward) if cfg.fp8 else None
        self.fused = False
        self.init_weights(seed)

    def init_std(self, name: str, spec: mup.ParamSpec) -> float:
        """Standard deviation of a parameter's first values; 0 where they are constant."""
        factor = spec.factors(self.cfg.table, "adam").init
        if spec.role is Role.INPUT:
            return factor
        if name.endswith(("attn.qkv_w", "mlp.c_fc.weight")):
            return 0.5 * spec.base_fan_in**-0.5 * factor
        return 0.0  # projections back into the stream, and the head, start at zero

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter from `seed` and its own name: the same bits on every device and rank. Skips meta tensors."""
        for name, parameter, spec in mup.named_specs(self):
            if parameter.is_meta:
                continue
            std, rng = self.init_std(name, spec), generator(seed, "init", name)
            values = torch.zeros(parameter.shape)
            if spec.role is Role.INPUT:
                values.normal_(std=std, generator=rng)
            elif spec.role is Role.SCALAR:
                L = self.cfg.n_layer
                values = torch.tensor([1.0] * L + [1.0, 0.0] * L + [0.5, 0.5] * L)
            elif std:
                bound = math.sqrt(3) * std
                values.uniform_(-bound, bound, generator=rng)
            parameter.copy_(values)

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


def softcap(z: Tensor, scale: float) -> Tensor:
    """30 * sigmoid(z * scale) in float32: equal to 15 * tanh(z * scale / 2) up to a constant that the softmax ignores."""
    return SOFTCAP * torch.sigmoid(z.float() * scale)


def softcap_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
    """The reference of `SoftcapCrossEntropy`: all logits at once, gradients by autograd."""
    return F.cross_entropy(softcap(F.linear(x, weight.type_as(x)), scale), targets, reduction="sum")


def loss_and_gradient(
    z: Tensor, targets: Tensor, scale: float, wanted: bool, grad_s: float | None
) -> tuple[Tensor, Tensor | None]:
    """Losses (R,) of a head's raw output z (R, V) and, if wanted, their gradient: z's type, or e5m2 divided by grad_s.

    As few operations for each of the T x V entries as there can be, for a compiler to fuse into two passes: on a GPU they,
    and not memory, are what the time goes into. Capped logits are below 30, so no maximum is subtracted; a gradient is
    below a quarter of the cap's slope, at most 448 in units of `head_scales`, so `quantize` would find nothing to clamp.
    """
    gate = torch.sigmoid(z.float() * scale)
    likely = torch.exp2(gate * (SOFTCAP * math.log2(math.e)))
    total = likely.sum(dim=-1)
    target_gate = torch.sigmoid(z.gather(1, targets[:, None])[:, 0].float() * scale)
    losses = total.log() - SOFTCAP * target_gate
    if not wanted:
        return losses, None
    slope = SOFTCAP * scale if grad_s is None else SOFTCAP * scale / grad_s
    hit = torch.arange(z.size(1), device=z.device) == targets[:, None]
    share = likely * total.reciprocal()[:, None]
    grad = torch.where(hit, share - 1, share) * (gate - gate * gate) * slope
    return losses, grad.to(z.dtype if grad_s is None else E5M2)


def loss_and_gradient_in_place(
    z: Tensor, targets: Tensor, scale: float, wanted: bool, grad_s: float | None
) -> tuple[Tensor, Tensor | None]:
    """The same in fewer passes and less memory, for where nothing fuses."""
    gate = z.float().mul_(scale).sigmoid_()
    likely = (gate * SOFTCAP).exp_()
    total = likely.sum(dim=-1, keepdim=True)
    target = targets[:, None]
    losses = (total.log() - gate.gather(1, target) * SOFTCAP)[:, 0]
    if not wanted:
        return losses, None
    grad = likely.div_(total)
    grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
    grad.mul_(gate).mul_(gate.neg_().add_(1).mul_(SOFTCAP * scale))
    return losses, grad.type_as(z) if grad_s is None else quantize(grad, grad_s, E5M2)


@functools.cache
def _fused_loss_and_gradient() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(loss_and_gradient, dynamic=False)


class SoftcapCrossEntropy(torch.autograd.Function):
    """Head, softcap and summed cross-entropy over chunks of rows, so that (T, V) logits never exist.

    The gradient is computed beside the loss, while a chunk's logits are there, so nothing is computed twice. fp8: scales
    of 8-bit products; fused: compile what is around the products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        budget: int,
        fp8: Scales | None = None,
        fused: bool = False,
    ) -> Tensor:
        """x (T, D), weight (V, D), targets (T,), scale on the logits, logits to hold at a time -> float32 scalar."""
        w = weight if fp8 else weight.type_as(x)
        rows = 1 << (max(1, budget // len(w)).bit_length() - 1)  # a power of two, so that chunks are alike
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_w: Tensor | None = None
        both = _fused_loss_and_gradient() if fused else loss_and_gradient_in_place
        for begin in range(0, len(x), rows):
            chunk = slice(begin, begin + rows)
            z, *stored = mm(x[chunk], w, *fp8) if fp8 else (F.linear(x[chunk], w),)
            losses[chunk], grad = both(z, targets[chunk], scale, needs_x or needs_w, fp8.grad if fp8 else None)
            if grad is None:
                continue
            by_x, by_w = mm_backward(grad, *stored, *fp8) if fp8 else (grad @ w, grad.T @ x[chunk])
            if grad_x is not None:
                grad_x[chunk] = by_x
            if needs_w:
                grad_w = by_w.float() if grad_w is None else grad_w.add_(by_w)
        if needs_w and grad_w is None:  # no rows
            grad_w = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(grad_x, grad_w)
        ctx.weight_dtype = weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """Scale the gradients that forward left."""
        grad_x, grad_w = ctx.saved_tensors
        (grad,) = grad_outputs
        return (
            None if grad_x is None else grad_x * grad.type_as(grad_x),
            None if grad_w is None else (grad_w * grad).to(ctx.weight_dtype),
            *[None] * 5,
        )
