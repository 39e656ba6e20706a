"""Forward and backward passes: which micro-batches go through the model together, and what comes out of them."""

# T tokens of a micro-batch, N micro-batches of a step over all ranks

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch
from torch import Tensor

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.device import is_out_of_memory
from speedrun_mup.core.distributed import TreeSum, World
from speedrun_mup.core.model.attention import Window
from speedrun_mup.core.model.loss import targets_ahead
from speedrun_mup.data.batches import Batch, Batches, batches_of
from speedrun_mup.data.shards import Corpus
from speedrun_mup.data.tokenizers import bytes_of_tokens
from speedrun_mup.data.validation import ValBatches
from speedrun_mup.training.build import build_model
from speedrun_mup.training.memory import fit_micro_batch, fit_val_chunk, micro_batches_at_once, translate_oom


class Passes:
    """The model and the data that go through it: gradients of a step, losses of validation.

    Args:
        cfg: the settings; those of sizes may be lowered by `fit`.
        corpus: the data.
        world: this rank takes its share of every step and of validation.
    """

    batches: Batches
    val_batches: ValBatches

    def __init__(self, cfg: TrainConfig, corpus: Corpus, world: World):
        self.corpus, self.world = corpus, world
        self.phase: Callable[[str], AbstractContextManager[Any]] = nullcontext  # a benchmark puts a stopwatch here
        self.configure_batches(cfg)
        self.model, self.compiled, self._choices = build_model(cfg, corpus, world)

    def fit(self) -> TrainConfig:
        """Choose how many micro-batches go side by side, and with --fit-memory all sizes; the settings in force."""
        cfg = self.cfg
        self.at_once = micro_batches_at_once(cfg, self.world.size, self.world.device)
        if cfg.fit_memory:
            self.configure_batches(fit_val_chunk(fit_micro_batch(cfg, self.at_once, self.fits), self.val_fits))
        return self.cfg

    def describe(self) -> str:
        """What was chosen for this device, and why."""
        cfg, steps = self.cfg, [stage.micro_batches for stage in self.schedule.stages]
        shares = ", ".join(dict.fromkeys(f"{min(self.at_once, n // self.world.size)} of {n}" for n in steps))
        return (
            f"{self._choices}; {shares} micro-batches of {cfg.micro_batch_tokens:,} tokens a pass, "
            f"{cfg.val_chunk_tokens:,} in validation"
        )

    def configure_batches(self, cfg: TrainConfig) -> None:
        """Divide steps into micro-batches, and those into passes, as `cfg` says; validation into chunks."""
        self.cfg, self.schedule, self.at_once = cfg, cfg.schedule, cfg.micro_batches_per_forward
        self.batches = batches_of(cfg, self.corpus)
        self.batches.check_ranks(self.world.size)  # raises now, before there is a folder
        if cfg.epochs:
            self.batches.epoch_of(cfg.iterations - 1)  # raises now, not after hours, if the data ends before
        self.val_batches = ValBatches(self.corpus, cfg.val_tokens, cfg.val_chunk_tokens)

    def fits(self, cfg: TrainConfig) -> bool:
        """Whether the passes of the largest step of `cfg`, together with the optimizers' state, fit into every rank's memory.

        It takes two in a row, because the second finds the gradients of the first; a strict sum holds ever more of them. The
        window is the widest of all steps, whichever step has it.
        """
        self.configure_batches(cfg)
        largest, widest = self.schedule.largest_step, self.schedule.widest_step(cfg.iterations - 1)
        with closing(self.batches.stream(largest, self.world.rank, self.world.size)) as stream:
            micro_batches = next(stream)[: None if cfg.deterministic else 2 * self.at_once]
            return self._has_memory_for(lambda: self.accumulate_gradients(micro_batches, widest))

    def val_fits(self, cfg: TrainConfig) -> bool:
        """Whether a validation chunk of `cfg`, together with the optimizers' state, fits into every rank's memory."""
        self.configure_batches(cfg)
        return self._has_memory_for(lambda: self.chunk_loss(0, self.schedule.widest_step(cfg.iterations)))

    def _has_memory_for(self, work: Callable[[], object]) -> bool:
        """Whether every rank can do `work`, together with the optimizers' state."""
        fits = True
        try:
            state = sum(2 * p.numel() * p.element_size() for p in self.model.parameters()) // self.world.size
            reserved = torch.empty(state, dtype=torch.uint8, device=self.world.device)
            work()
            del reserved
        except (RuntimeError, MemoryError) as fault:
            if not is_out_of_memory(fault):
                raise
            fits = False
        self.model.zero_grad(set_to_none=True)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        if not all(self.world.gather_objects(fits)):
            torch.compiler.reset()  # a function keeps the code of 8 sizes; the next ones would run uncompiled
            return False
        return True

    def window(self, step: int) -> Window:
        """The long attention window at `step`, in blocks; a tensor where the graph must not depend on its value."""
        blocks = self.schedule.at(step).window
        if not self.compiled:
            return blocks
        # unlike torch.tensor, does not synchronise
        return torch.full((), blocks, dtype=torch.int32, device=self.world.device)

    def loss_scale(self, step: int) -> float:
        """What the loss summed over a micro-batch is divided by, for the mean over the N micro-batches of the step."""
        now = self.schedule.at(step)
        return now.micro_batches / now.loss_weights[0]

    def sequences(self, batch: Batch, step: int) -> Batch:
        """A micro-batch, cut into sequences of the step's length: a BOS stands where the next one begins, for its first token.

        Where several tokens ahead are predicted, its targets are (T, K).
        """
        inputs, targets = batch
        length = self.schedule.at(step).sequence_tokens
        if length < len(inputs):
            inputs = inputs.clone()
            inputs[length::length] = self.corpus.bos_token
        ahead = len(self.schedule.at(step).loss_weights)
        return inputs, targets if ahead == 1 else targets_ahead(targets, ahead)

    def loss_weights(self, step: int) -> tuple[Tensor, ...]:
        """Weights of the tokens ahead that are predicted at `step`, if there are several: what the model takes last."""
        weights = self.schedule.at(step).loss_weights
        return () if len(weights) == 1 else (torch.tensor(weights, device=self.world.device),)

    def to_device(self, batch: Batch) -> Batch:
        """A batch, on this rank's device; through pinned memory, else the copy would wait for the GPU to be idle.

        Only CUDA does not wait for the copy: MPS may read what is gone by then.
        """
        device, on_cuda = self.world.device, self.world.device.type == "cuda"
        inputs, targets = (tokens.pin_memory() if on_cuda else tokens for tokens in batch)
        return inputs.to(device, non_blocking=on_cuda), targets.to(device, non_blocking=on_cuda)

    def accumulate_gradients(self, micro_batches: list[Batch], step: int) -> Tensor:
        """Backward through this rank's micro-batches; returns their summed loss over all weights, a scalar on the device.

        As in the record, the gradient is that of the loss summed over T tokens and averaged over the N micro-batches,
        on whichever rank. Micro-batches start with a BOS, so several in a row are the same as several in turn.
        """
        if self.cfg.deterministic:
            return self._accumulate_as_tree(micro_batches, step)
        window, scale, total = self.window(step), self.loss_scale(step), torch.zeros((), device=self.world.device)
        weights = self.loss_weights(step)
        for first in range(0, len(micro_batches), self.at_once):
            group = [self.sequences(batch, step) for batch in micro_batches[first : first + self.at_once]]
            inputs, targets = self.to_device((torch.cat([x for x, _ in group]), torch.cat([y for _, y in group])))
            with self.phase("forward"):
                loss = self.model(inputs, targets, window, *weights)
            with self.phase("backward"):
                (loss / scale).backward()
            total += loss.detach()
        return total / weights[0].sum() if weights else total

    def _accumulate_as_tree(self, micro_batches: list[Batch], step: int) -> Tensor:
        """The same, one micro-batch at a time, summed as a tree whose branches do not depend on the number of ranks."""
        window, scale, tree, weights = self.window(step), self.loss_scale(step), TreeSum(), self.loss_weights(step)
        for batch in micro_batches:
            with self.phase("forward"):
                loss = self.model(*self.to_device(self.sequences(batch, step)), window, *weights)
            with self.phase("backward"):
                (loss / scale).backward()
            tree.add([loss.detach(), *(p.grad for p in self.model.parameters() if p.grad is not None)])
            reached = [p for p in self.model.parameters() if p.grad is not None]
            self.model.zero_grad(set_to_none=True)
        loss, *gradients = tree.total()
        for parameter, gradient in zip(reached, gradients, strict=True):
            parameter.grad = gradient
        return loss / weights[0].sum() if weights else loss

    @torch.no_grad()
    def chunk_loss(self, chunk: int, step: int) -> Tensor:
        """Summed loss of a chunk of the validation tokens, (2,) on the device: of all, and without special tokens."""
        inputs, targets = self.to_device(self.val_batches[chunk])
        losses = self.model.losses(inputs, targets, self.window(step))
        return torch.stack([losses.sum(), torch.where(targets == self.corpus.bos_token, 0, losses).sum()])

    def evaluate(self, step: int) -> tuple[float, float | None]:
        """Mean validation loss with the window of `step`, in nats per token, and on rank 0 bits per byte if they are known.

        Ranks share the chunks, which are summed in a fixed order. Bits per byte leave special tokens out, as `evaluate` does.
        """
        losses = torch.zeros(len(self.val_batches), 2, device=self.world.device)
        with translate_oom(self.cfg, step, "validation"):
            for chunk in range(self.world.rank, len(losses), self.world.size):
                losses[chunk] = self.chunk_loss(chunk, step)
        self.world.all_reduce(losses).wait()
        loss, text_loss = (part.contiguous().mean().item() for part in losses.cpu().double().unbind(dim=1))
        bits = len(losses) * text_loss / self.val_bytes / math.log(2) if self.val_bytes else None
        return loss / self.cfg.val_chunk_tokens, bits

    @functools.cached_property
    def val_bytes(self) -> int | None:
        """Bytes of the text of the validation tokens, on rank 0; None if the tokenizer does not know bytes."""
        lengths = bytes_of_tokens(self.corpus) if self.world.is_main else None
        if lengths is None:
            return None
        return sum(int(lengths[self.val_batches[i][1].numpy()].sum()) for i in range(len(self.val_batches)))
