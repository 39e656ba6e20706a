"""The opponent: Hugging Face's GPT-2 with torch's AdamW. Needs the extra `bench`."""

# T tokens of a micro-batch, N micro-batches of a step

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from speedrun_mup.config import TrainConfig
from speedrun_mup.data.batches import Batch
from speedrun_mup.data.shards import Corpus

WARMUP = 0.05  # of all steps: the learning rate rises linearly, then falls linearly to zero


class Opponent:
    """Hugging Face's GPT-2 with torch's AdamW: the usual way to train a model of this size.

    Layers, width, heads, vocabulary and tokens per step are those of `cfg`; a micro-batch is one sequence, so the
    context is T. No dropout, scaled_dot_product_attention, betas 0.9 and 0.95, weight decay 0.1 on matrices, gradients
    clipped to norm 1, linear warmup and decay over `steps`.
    """

    def __init__(self, cfg: TrainConfig, corpus: Corpus, steps: int, lr: float = 1e-3, seed: int = 0):
        torch.manual_seed(seed)
        shape = GPT2Config(
            vocab_size=corpus.vocab_size,
            n_positions=cfg.micro_batch_tokens,
            n_embd=cfg.width,
            n_layer=cfg.n_layer,
            n_head=cfg.width // cfg.head_dim,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=corpus.bos_token,
            eos_token_id=corpus.bos_token,
            attn_implementation="sdpa",
        )
        self.model = GPT2LMHeadModel(shape)
        parameters = list(self.model.parameters())
        decayed = [{"params": [p for p in parameters if p.ndim > 1]}]
        plain = [{"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(decayed + plain, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: triangle(step, steps))

    def loss(self, batches: Sequence[Batch]) -> Tensor:
        """Mean cross-entropy of equally long sequences in one forward pass."""
        inputs, targets = (torch.stack(tokens) for tokens in zip(*batches))
        return F.cross_entropy(self.model(inputs).logits.flatten(0, 1), targets.flatten())

    def step(self, batches: Sequence[Batch]) -> None:
        """One training step on a whole batch."""
        self.loss(batches).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


def triangle(step: int, steps: int) -> float:
    """Learning rate factor: linear warmup over the first 5 % of `steps`, then linear decay to zero."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / (steps - warmup))
