"""Models that know nothing of this project, in plain torch: one for each hard part that families of models have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 32


@dataclass(frozen=True)
class GPTConfig:
    """Of a decoder like nanoGPT's."""

    n_embd: int = 64
    n_head: int = 4
    n_layer: int = 2
    block_size: int = 16
    tied: bool = True


class GPTBlock(nn.Module):
    """Fused queries, keys and values; the scale is torch's, 1/sqrt(head size)."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.n_head, self.n_embd = c.n_head, c.n_embd
        self.ln_1, self.ln_2 = nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)
        self.c_attn, self.c_proj = nn.Linear(c.n_embd, 3 * c.n_embd), nn.Linear(c.n_embd, c.n_embd)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(c.n_embd, 4 * c.n_embd), "c_proj": nn.Linear(4 * c.n_embd, c.n_embd)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (
            y.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            for y in self.c_attn(self.ln_1(x)).split(self.n_embd, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.c_proj(y)
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GPT(nn.Module):
    """(B, T) -> (B, T, VOCAB). One std for all widths, and a tied head, as nanoGPT has them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte, self.wpe = nn.Embedding(VOCAB, config.n_embd), nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(config.n_embd), nn.Linear(config.n_embd, VOCAB, bias=False)
        self.apply(self._start)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5)
        if config.tied:
            self.lm_head.weight = self.wte.weight

    def _start(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, VOCAB)."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class GroupedAttention(nn.Module):
    """Separate projections, fewer heads of keys and values, gains on queries and keys."""

    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scaling, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """A router and stacked experts, mixed by the router's softmax."""

    def __init__(self, width: int, hidden: int, experts: int = 4):
        super().__init__()
        self.router = nn.Parameter(torch.randn(experts, width) * 0.02)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * hidden, width) * 0.02)
        self.down_proj = nn.Parameter(torch.randn(experts, width, hidden) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        mix = F.linear(x, self.router).softmax(dim=-1)
        flat = x.flatten(0, 1).expand(len(self.router), -1, -1)
        gate, up = torch.bmm(flat, self.gate_up_proj.mT).chunk(2, dim=-1)
        y = torch.bmm(F.silu(gate) * up, self.down_proj.mT)
        return (y * mix.flatten(0, 1).T.unsqueeze(-1)).sum(0).view_as(x)


class LlamaLike(nn.Module):
    """(B, T) -> (B, T, VOCAB). No positions; experts instead of the MLP on request."""

    def __init__(self, width: int, heads: int = 4, kv_heads: int = 2, layers: int = 2, experts: bool = False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attn_norm": nn.RMSNorm(width),
                    "attn": GroupedAttention(width, heads, kv_heads),
                    "mlp_norm": nn.RMSNorm(width),
                    "mlp": Experts(width, 2 * width) if experts else GatedMLP(width, 2 * width),
                }
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, VOCAB, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, VOCAB)."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer["attn"](layer["attn_norm"](x))
            x = x + layer["mlp"](layer["mlp_norm"](x))
        return self.head(self.norm(x))


def llama_like(width: int, head_dim: int = 16, **options) -> LlamaLike:
    """More heads with width, a fixed number of which are keys and values."""
    return LlamaLike(width, heads=width // head_dim, **options)


def wide_heads(width: int, **options) -> LlamaLike:
    """The same number of heads at every width."""
    return LlamaLike(width, heads=4, kv_heads=4, **options)


class Recurrent(nn.Module):
    """(B, T) -> (B, T, VOCAB) by an LSTM."""

    def __init__(self, width: int, layers: int = 2):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.rnn = nn.LSTM(width, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, VOCAB)."""
        return self.head(self.rnn(self.embed(tokens))[0])


class ResBlock(nn.Module):
    """Two convolutions with batch norm, around which the input is added."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class ResNet(nn.Module):
    """(B, 3, H, W) -> (B, 10), initialised by the fan-out as torchvision's."""

    def __init__(self, width: int, blocks: int = 2):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(ResBlock(width) for _ in range(blocks)))
        self.fc = nn.Linear(width, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 10)."""
        return self.fc(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


def tokens(batch: int = 2, length: int = 8, seed: int = 0) -> Tensor:
    """(batch, length) of a cheap language: steps of 0 to 3."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (batch, length), generator=rng).cumsum(dim=-1) % VOCAB


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of the next token."""
    return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
