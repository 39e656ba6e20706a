"""The training loop, as a story. `train(cfg)` is the only place that steps an optimizer."""

# T tokens of a micro-batch, N micro-batches of a step over all ranks

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedrun_mup.config import TrainConfig, rules_in_force, to_json
from speedrun_mup.core.attention import Window
from speedrun_mup.core.errors import (
    CollectiveError,
    ConfigError,
    Diverged,
    NonFiniteError,
    OutOfMemory,
    Stopped,
    UserError,
)
from speedrun_mup.core.model import GPT, GPTConfig
from speedrun_mup.core.optimizers import DistAdam, FetchSlice, Muon, ShardedOptimizer, Slice, Tuned, param_groups
from speedrun_mup.core.utils import (
    PARENT_DIED,
    TreeSum,
    World,
    deterministic,
    is_out_of_memory,
    join_world,
    leave_world,
    stop_with_parent,
    told_of_slurm,
)
from speedrun_mup.data.batches import Batch, ValBatches, train_batches
from speedrun_mup.data.corpus import cache_folder, find_corpus
from speedrun_mup.data.shards import Corpus
from speedrun_mup.data.tokenizers import bytes_of_tokens
from speedrun_mup.files import open_to_append, printable, write_whole
from speedrun_mup.interrupts import after_imports
from speedrun_mup.training.checkpoint import CheckpointError, Checkpoints, Loaded, check_match
from speedrun_mup.training.hardware import (
    fit_micro_batch,
    fit_val_chunk,
    half_in_blocks,
    pick_attention,
    pick_compile,
    pick_dtype,
    pick_fp8,
    pick_pack,
    short_waits,
    use_compile_cache,
)
from speedrun_mup.training.numerics import SpikeWatch, Vote, exploded_weights, failed_to_learn, not_finite
from speedrun_mup.training.run_folder import (
    LASTING,
    FolderLock,
    check_resumable,
    checked_state,
    is_longer,
    saved_config,
    told_of_extension,
)
from speedrun_mup.training.schedules import lr_factor, muon_momentum, window_blocks
from speedrun_mup.training.tracking import CONFIG, PROVENANCE, RunLog, lives, provenance, source_sha256

SAVE_ATTEMPTS = 3  # failed saves in a row before the run gives up
BAD_STEPS = 10  # skipped or rolled back before the run gives up

Observer = Callable[[int, GPT, list[Batch]], None]


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. Losses in nats per token; train_s leaves out validation, checkpoints and warmup."""

    folder: Path
    corpus: Corpus
    steps: int
    val_loss: float | None
    train_loss: float | None
    tokens: int
    train_s: float
    finished: bool


def train(cfg: TrainConfig, observe: Observer | None = None, lock: FolderLock | None = None) -> TrainResult:
    """Train, validate and checkpoint as `cfg` says; under torchrun, with all its ranks.

    observe(step, model, micro_batches): called with this rank's micro-batches before every optimizer step. lock: rank 0's
    of the folder to resume, if it holds it already; it is closed at the end.
    Raises a UserError whose text is one line. SIGINT, SIGTERM and SIGUSR1 finish the step, save, and return with
    finished=False; before the first step is done they end this rank at once, with Stopped.
    """
    source_sha256()  # of the code that runs, before anybody can change it
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent()
    world = join_world(cfg.device, cfg.timeout_s, cfg.strict)
    try:
        with stop_signals() as signals, deterministic(cfg.strict), short_waits(world.device):
            run = Run(cfg, world, lock)
            try:
                if run.start < cfg.iterations:
                    run.tell_status("running")
                result = run.train(observe, signals)
            except BaseException as fault:
                stopped = isinstance(fault, StoppedEarly)
                if not stopped:
                    status = "diverged" if isinstance(fault, Diverged) else "failed"
                    run.tell_status(status, f"{type(fault).__name__}: {fault}")
                elif run.start < cfg.iterations:
                    run.tell_status("stopped")
                with suppress(UserError):  # a save that fails now is not what ended the run
                    run.close()
                if stopped:
                    raise Stopped(f"stopped by {fault}, nothing new saved; go on with --resume {run.folder}") from None
                raise
            run.tell_status("finished" if result.finished else "stopped")
            run.close()
            return result
    except StoppedEarly as stopped:
        raise Stopped(f"stopped by {stopped} before there was a run; start the same command again") from None
    finally:
        leave_world()


class StoppedEarly(BaseException):
    """A signal that came while nothing was there to save; no Exception, because compilers take those for their own."""


class StopSignals(list[str]):
    """Names of the signals that asked a run to stop. They wait only where something is to be saved."""

    something_to_save = False


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Collect SIGINT, SIGTERM and SIGUSR1 in a list instead of dying of them; the third ends the process at once.

    While there is nothing to save, the first raises StoppedEarly too: compiling can take minutes. The end of torchrun is in
    the list as well, unless something else came before; it counts once, however often it is told. Outside the main thread
    Python allows no handlers: the list stays empty.
    """
    received = StopSignals()

    def stop_early() -> None:
        if not received.something_to_save:
            raise StoppedEarly(received[0])  # whoever drops this, as a finalizer does, stops after the step

    def on_signal(number: int, frame: Any) -> None:
        name = "the end of torchrun or SIGUSR2" if number == PARENT_DIED else signal.Signals(number).name
        if number == PARENT_DIED and received:
            return
        received.append(name)
        if len(received) == 1:  # a second would interrupt what the first has begun
            after_imports(stop_early, frame)
        if len(received) == 2 and received.something_to_save:
            print(f"{received[-1]} again: still saving; once more quits without", file=sys.stderr)
        if len(received) >= 3:
            os._exit(128 + number)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, PARENT_DIED):
            previous[number] = signal.signal(number, on_signal)
    except ValueError:
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class RollBack(Exception):
    """The numbers went bad at a step: the run is to go on from its last checkpoint, with the data after that step."""

    def __init__(self, step: int):
        self.step = step


class Run:
    """All that a run is made of, built from its config. `train` is the story."""

    def __init__(self, cfg: TrainConfig, world: World, lock: FolderLock | None = None):
        self.cfg, self.world = cfg, world
        self.phase: Callable[[str], AbstractContextManager[Any]] = nullcontext  # a benchmark puts a stopwatch here
        self.corpus, source = prepare_corpus(cfg, world)
        self.use(cfg)
        use_compile_cache(cache_folder() / "compiled")
        with self.telling_of_memory(0, "model"):
            self.compiled, why_compiled = pick_compile(cfg, world.device)
            dtype = pick_dtype(cfg, world.device)
            attention, why_attention = pick_attention(cfg, world.device, dtype, self.compiled)
            fp8, why_head = pick_fp8(cfg, world.device, dtype, self.compiled)
            self.model = GPT(model_config(cfg, self.corpus, attention, dtype, fp8), cfg.seed).to(world.device)
        self.optimizers = build_optimizers(self.model, cfg, world)
        if self.compiled:
            self.model.compile_parts()
            for optimizer in self.optimizers:
                optimizer.compile_parts()
        check_agreement(cfg, self.corpus, world)
        self.pack = pick_pack(cfg, world.size, world.device)
        if cfg.micro_batch == "auto":
            cfg = fit_val_chunk(fit_micro_batch(cfg, self.pack, self.fits), self.val_fits)
            self.use(cfg)

        notes = []
        if cfg.init_from and not cfg.resume:
            notes = self.take_weights(Path(cfg.init_from))
        cfg = self.cfg
        self.folder, self.lock = open_folder(cfg, world, lock)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", world, cfg.keep_last, cfg.keep_every)
        self.checkpoints.clean()
        self.start, self.train_s = 0, 0.0
        self.data_offset = 0  # steps of data that were skipped for good: step s trains on the batch s + data_offset
        self.train_loss: float | None = None
        self.val_loss: float | None = None
        self.spikes = SpikeWatch()
        self.votes: deque[Vote] = deque()  # not acted on yet: so many wait for the device to get there
        self.vote_lag = 1 if world.device.type == "cuda" else 0
        self.stopping, self.failed_saves, self.bad_steps = False, 0, 0
        self.last_grad_norm = math.nan
        self.untrained_loss = math.log(self.model.cfg.padded_vocab)  # the head begins at zero
        if cfg.resume:
            notes = self.resume()
        self.log = open_log(cfg, world, self.folder, self.start)

        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        precision = str(dtype).removeprefix("torch.")
        self.choices = (
            f"device: {world.size} x {world.device.type}, {precision}; {'' if self.compiled else 'not '}compiled "
            f"({why_compiled}); attention {attention} ({why_attention}); head in {'fp8' if fp8 else precision} "
            f"({why_head}); {self.pack} of {cfg.micro_batches} micro-batches of {cfg.micro_batch_tokens:,} tokens a pass, "
            f"{cfg.val_chunk_tokens:,} in validation"
        )
        notes = [
            source,
            f"data order: {self.batches.describe()}",
            *(f"validation: {note}" for note in self.val_batches.notes),
            f"model: width {cfg.width}, {cfg.n_layer} layers, {parameters:,} parameters; "
            f"{cfg.iterations} steps of {cfg.batch_tokens:,} tokens",
            rules_in_force(cfg),
            self.choices,
            *filter(None, [told_of_slurm()]),
            *notes,
        ]
        for note in notes:
            self.log.say(note)

    def train(self, observe: Observer | None = None, signals: StopSignals | None = None) -> TrainResult:
        """Train to the end, or until somebody asks to stop; over again from the last checkpoint for each `RollBack`."""
        signals = StopSignals() if signals is None else signals
        self.warm_up_kernels()
        while True:
            try:
                return self.train_from_start(observe, signals)
            except RollBack as bad:
                self.roll_back(bad.step)

    def train_from_start(self, observe: Observer | None, signals: StopSignals) -> TrainResult:
        """The loop, from step `start`: one more pass than steps, because the last one only validates."""
        cfg, log = self.cfg, self.log
        with closing(self.batches.stream(self.start + self.data_offset, self.world.rank, self.world.size)) as steps:
            for step in range(self.start, cfg.iterations + 1):
                if self.stopping:
                    break
                if step == cfg.iterations:
                    self.batches.confirm()
                    self.val_batches.confirm()
                if step == cfg.iterations or (cfg.val_every and step % cfg.val_every == 0):
                    self.validate(step)
                if step == cfg.iterations:
                    break
                self.tell_of_epoch(step)
                began = time.perf_counter()
                micro_batches = next(steps)
                if observe:
                    observe(step, self.model, micro_batches)
                self.take_step(micro_batches, step, stop=bool(signals))
                signals.something_to_save = True
                self.train_s += time.perf_counter() - began
                save_due = bool(cfg.save_every) and (step + 1) % cfg.save_every == 0
                self.act_on_votes(at_once=save_due or step + 1 == cfg.iterations)
                self.hear_of_saves()
                if step + 1 == cfg.iterations:
                    self.refuse_diverged(step + 1)  # before it is saved
                last = self.stopping or step + 1 == cfg.iterations
                if cfg.save and (last or save_due):
                    self.save(step + 1, last)
        if self.stopping:
            where = f"saved; go on with --resume {self.folder}" if cfg.save else "not saved"
            log.say(f"stopped at step {step} by {'/'.join(signals) or 'another rank'}, {where}")
        return TrainResult(
            self.folder,
            self.corpus,
            step,
            self.val_loss,
            self.train_loss,
            step * cfg.batch_tokens,
            self.train_s,
            finished=step == cfg.iterations and not self.stopping,
        )

    def tell_status(self, status: str, why: str | None = None) -> None:
        """Write status.json, because torchrun hides the exit codes of its ranks.

        status: running, finished, stopped, diverged, failed.
        """
        if self.in_its_folder():
            self.log.tell_status(status, why)

    def in_its_folder(self) -> bool:
        """Have rank 0's log write where the folder is now. False if that is not known, so that another's is left alone."""
        if self.lock:
            try:
                self.log.move(self.lock.find())
            except UserError:
                return False
        return True

    def follow_folder(self) -> None:
        """Go on in the folder under its new name, if somebody renamed it. UserError on all ranks if it is lost."""
        found = self.world.from_main(_attempt(self.lock.find) if self.lock else None)
        if isinstance(found, UserError):
            raise found
        if found != self.folder:
            self.log.move(found)
            self.log.say(f"{printable(self.folder)} was renamed to {printable(found)}; the run goes on there")
            self.folder, self.checkpoints.root = found, found / "checkpoints"

    def take_step(self, micro_batches: list[Batch], step: int, stop: bool = False) -> None:
        """Gradients, a vote on them, and the update. stop: whether this rank was asked to."""
        with self.telling_of_memory(step):
            loss_sum = self.accumulate_gradients(micro_batches, step)
        vote = self.vote(step, loss_sum, stop)
        self.set_schedule(step)
        with self.phase("optimizer"), self.telling_of_memory(step, "update"):
            for optimizer in self.optimizers:
                optimizer.step(vote.good)  # sums gradients over ranks itself; there is no DDP wrapper
            vote.sum_norms(
                (square for optimizer in self.optimizers for square in optimizer.gradient_squares), self.world
            )
            self.model.zero_grad(set_to_none=True)

    def use(self, cfg: TrainConfig) -> None:
        """Divide steps into micro-batches, and those into passes, as `cfg` says; validation into chunks."""
        self.cfg, self.pack = cfg, cfg.pack
        self.batches = train_batches(
            self.corpus, cfg.micro_batch_tokens, cfg.micro_batches, cfg.seed, cfg.epochs, cfg.data_order
        )
        self.batches.share(self.world.size)  # raises now, before there is a folder
        if cfg.epochs:
            self.batches.epoch_of(cfg.iterations - 1)  # raises now, not after hours, if the data ends before
        self.val_batches = ValBatches(self.corpus, cfg.val_tokens, cfg.val_chunk_tokens)

    def fits(self, cfg: TrainConfig) -> bool:
        """Whether a step's passes of `cfg`, beside the optimizers' state, fit into every rank's memory.

        Two in a row tell, because the second finds the gradients of the first; a strict sum holds ever more of them. The
        window is that of the last step, the widest.
        """
        self.use(cfg)
        with closing(self.batches.stream(0, self.world.rank, self.world.size)) as stream:
            micro_batches = next(stream)[: None if cfg.strict else 2 * self.pack]
            return self.has_memory_for(lambda: self.accumulate_gradients(micro_batches, cfg.iterations - 1))

    def val_fits(self, cfg: TrainConfig) -> bool:
        """Whether a validation chunk of `cfg`, beside the optimizers' state, fits into every rank's memory."""
        self.use(cfg)
        return self.has_memory_for(lambda: self.chunk_loss(0, cfg.iterations))

    def has_memory_for(self, work: Callable[[], object]) -> bool:
        """Whether every rank can do `work`, beside the optimizers' state."""
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

    def close(self) -> None:
        """Finish a checkpoint under way, close files and let others into the folder."""
        try:
            self.checkpoints.close()
        finally:
            self.log.close()
            if self.lock:
                self.lock.close()

    def window(self, step: int) -> Window:
        """The long attention window at `step`, in blocks; a tensor where the graph must not depend on its value."""
        blocks = window_blocks(step / self.cfg.iterations, self.cfg.window_tokens, self.cfg.block_size)
        if not self.compiled:
            return blocks
        # unlike torch.tensor, waits for nobody
        return torch.full((), blocks, dtype=torch.int32, device=self.world.device)

    def to_device(self, batch: Batch) -> Batch:
        """A batch, on this rank's device; through pinned memory, else the copy would wait for the GPU to be idle.

        Only CUDA does not wait for the copy: MPS may read what is gone by then.
        """
        device, on_cuda = self.world.device, self.world.device.type == "cuda"
        inputs, targets = (tokens.pin_memory() if on_cuda else tokens for tokens in batch)
        return inputs.to(device, non_blocking=on_cuda), targets.to(device, non_blocking=on_cuda)

    def accumulate_gradients(self, micro_batches: list[Batch], step: int) -> Tensor:
        """Backward through this rank's micro-batches; returns their summed loss, a scalar on the device.

        As in the record, the gradient is that of the loss summed over T tokens and averaged over the N micro-batches,
        whoever computes them. Micro-batches start with a BOS, so several in a row are the same as several in turn.
        """
        if self.cfg.strict:
            return self.accumulate_gradients_as_tree(micro_batches, step)
        window, total = self.window(step), torch.zeros((), device=self.world.device)
        for first in range(0, len(micro_batches), self.pack):
            group = micro_batches[first : first + self.pack]
            inputs, targets = self.to_device((torch.cat([x for x, _ in group]), torch.cat([y for _, y in group])))
            with self.phase("forward"):
                loss = self.model(inputs, targets, window)
            with self.phase("backward"):
                (loss / self.cfg.micro_batches).backward()
            total += loss.detach()
        return total

    @contextmanager
    def telling_of_memory(self, step: int, work: str = "passes") -> Iterator[None]:
        """Turn running out of memory into an OutOfMemory that says what took how much, and what would take less.

        work: model, passes, update or validation.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as fault:
            if not is_out_of_memory(fault):
                raise
            text = (str(fault).splitlines() or ["MemoryError"])[0]
            said = text.partition(". GPU ")[0].rpartition("] ")[2]
            needed, advice = self.memory_advice(work)
            raise OutOfMemory(f"step {step}: no memory for {needed} ({said}); try {advice}") from None

    def memory_advice(self, work: str) -> tuple[str, str]:
        """What `work` takes at once, and settings that let it take less."""
        cfg = self.cfg
        if work == "model":
            return "the weights", "a smaller --width"
        if work == "update":
            return "the optimizers' step", "a smaller --width, or more GPUs, which share the optimizers' state"
        validation = work == "validation"
        size = cfg.val_chunk_tokens if validation else cfg.micro_batch_tokens
        smaller = half_in_blocks(size, cfg.block_size)
        if not smaller:
            advice = "a smaller --width"
        elif validation:
            advice = f"--val-chunk-tokens {smaller}"
        else:
            advice = f"--micro-batch-tokens {smaller} --micro-batches {cfg.batch_tokens // smaller}"
        if not validation and self.pack > 1:
            advice = f"--pack {self.pack // 2}, or {advice}"
        return f"{f'validation on {size:,}' if validation else f'{self.pack} x {size:,}'} tokens at once", advice

    def accumulate_gradients_as_tree(self, micro_batches: list[Batch], step: int) -> Tensor:
        """The same, one micro-batch at a time, summed as a tree whose branches do not depend on the number of ranks."""
        window, tree = self.window(step), TreeSum()
        for batch in micro_batches:
            with self.phase("forward"):
                loss = self.model(*self.to_device(batch), window)
            with self.phase("backward"):
                (loss / self.cfg.micro_batches).backward()
            tree.add([loss.detach(), *(p.grad for p in self.model.parameters() if p.grad is not None)])
            reached = [p for p in self.model.parameters() if p.grad is not None]
            self.model.zero_grad(set_to_none=True)
        loss, *gradients = tree.total()
        for parameter, gradient in zip(reached, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def vote(self, step: int, loss_sum: Tensor, stop: bool) -> Vote:
        """Ask all ranks whether the loss and every gradient are finite, and whether anyone was asked to stop.

        Comes before the optimizers: one NaN in one entry would make Muon's whole update NaN. After a bad step no later
        one changes anything either, unless the policy is to skip, until the host has heard of it.
        """
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        vote = Vote(step, gradients, loss_sum, stop, self.world)
        if self.votes and self.cfg.on_nonfinite != "skip":
            vote.good &= self.votes[-1].good
        self.votes.append(vote)
        return vote

    def act_on_votes(self, at_once: bool = True) -> None:
        """Log losses, set `stopping` and handle bad steps; on CUDA a step late, unless `at_once`, so that no step waits."""
        lag = 0 if at_once else self.vote_lag
        while len(self.votes) > lag:
            vote = self.votes.popleft()
            began = time.perf_counter()
            verdict = vote.read()
            self.train_s += time.perf_counter() - began  # a GPU still works on that step
            if verdict.stop:
                self.stopping = True
                lag = 0
            if verdict.bad:
                self.handle_bad_step(vote)
            else:
                self.log_step(vote.step, verdict.loss / self.cfg.batch_tokens, verdict.grad_norm)

    def log_step(self, step: int, loss: float, grad_norm: float) -> None:
        """Record a step that counted. lr: the hidden matrices' at base width, the others keep their ratios to it."""
        cfg, tokens = self.cfg, (step + 1) * self.cfg.batch_tokens
        self.train_loss, self.last_grad_norm = loss, grad_norm
        rates = {"lr": cfg.matrix_lr * cfg.lr_scale * self.lr_factor(step), "grad_norm": grad_norm}
        self.log.train({"kind": "train", "step": step, "loss": loss, "tokens": tokens, "train_s": self.train_s} | rates)
        if spike := self.spikes.see(loss):
            self.log.say(f"warning: step {step}: {spike}")

    def handle_bad_step(self, vote: Vote) -> None:
        """Dump the step whose update was withheld, and do as `on_nonfinite` says. NonFiniteError after BAD_STEPS of them.

        Raises NonFiniteError to stop, RollBack to roll back, on all ranks.
        """
        evidence = self.world.gather_objects(vote.evidence())
        named = {rank: not_finite(values) for rank, values in enumerate(evidence)}
        where = "; ".join(f"rank {rank}: {', '.join(names[:3])}" for rank, names in named.items() if names)
        what = f"step {vote.step}: not finite on {where}"
        if self.in_its_folder():
            self.log.dump(f"bad-step-{vote.step:08d}.json", self.describe_bad_step(vote.step, evidence))
        self.bad_steps += 1
        if self.cfg.on_nonfinite == "stop" or self.bad_steps > BAD_STEPS:
            raise NonFiniteError(
                f"{what}; the weights are those before the step, {self.folder} holds a dump. Lower --lr-scale, look at "
                "the data, or see --on-nonfinite"
            )
        self.log.say(f"warning: {what}; {'rolling back' if self.cfg.on_nonfinite == 'rollback' else 'step skipped'}")
        if self.cfg.on_nonfinite == "rollback":
            raise RollBack(vote.step)

    def describe_bad_step(self, step: int, evidence: list[dict[str, float]]) -> dict[str, Any]:
        """Where the step's tokens came from, and every rank's loss and gradient norms."""
        first = (step + self.data_offset) * self.cfg.micro_batches
        share = self.batches.share(self.world.size)
        return {
            "step": step,
            "data_step": step + self.data_offset,
            "ranks": [
                {
                    "micro_batches": [
                        dict(zip(("shard", "first_token"), self.batches.place(first + rank * share + i)))
                        for i in range(share)
                    ],
                    "loss": values["the loss"],
                    "gradient_norms": {name: value for name, value in values.items() if name != "the loss"},
                }
                for rank, values in enumerate(evidence)
            ],
        }

    def roll_back(self, bad_step: int) -> None:
        """Load the newest checkpoint, and go on from there with the data that follows `bad_step`'s."""
        self.votes.clear()
        self.model.zero_grad(set_to_none=True)
        self.hear_of_saves(wait=True)
        self.follow_folder()
        used, train_s = bad_step + 1 + self.data_offset, self.train_s
        found = self.checkpoints.newest(self.log.say)
        if found is None:
            raise NonFiniteError(f"step {bad_step}: no checkpoint to roll back to; set --save-every, or skip the step")
        self.load(found)
        self.data_offset, self.train_s = used - self.start, train_s
        self.log.rewind(self.start, train_s)
        self.log.say(f"rolled back to {found}; its data and that up to step {bad_step}'s are left out")

    def validate(self, step: int) -> None:
        """Evaluate the weights before `step`, and record what comes out."""
        self.act_on_votes()
        self.refuse_exploded(step)
        self.val_loss = self.evaluate(step)
        bits = {"bits_per_byte": self.val_loss * self.tokens_per_byte / math.log(2) if self.tokens_per_byte else None}
        self.log.val({"kind": "val", "step": step, "loss": self.val_loss, "train_s": self.train_s} | bits)
        if not math.isfinite(self.val_loss):
            raise NonFiniteError(
                f"step {step}: the validation loss is {self.val_loss}; lower --lr-scale, or see the data"
            )

    def refuse_exploded(self, step: int) -> None:
        """Raise Diverged if a weight is beyond any sane size after `step` steps."""
        if said := exploded_weights(dict(self.model.named_parameters())):
            raise Diverged(self.told_of_divergence(step, said))

    def told_of_divergence(self, step: int, said: str) -> str:
        """What to do about it."""
        there = max((path.name for path in self.checkpoints.root.glob("step-*")), default="")
        kept = f"checkpoints up to {there} are kept" if there else "there is no checkpoint"
        return f"step {step}: diverged: {said}; {kept}. Lower --lr-scale (it was {self.cfg.lr_scale:g})"

    def refuse_diverged(self, step: int) -> None:
        """Raise Diverged if a run that is at its end is worse than untrained."""
        self.refuse_exploded(step)
        if said := self.failure_to_learn(step):
            raise Diverged(self.told_of_divergence(step, said))

    def failure_to_learn(self, step: int) -> str:
        """What there is to say, after `step` steps, about losses above that of the untrained model."""
        return failed_to_learn(self.spikes.history, self.untrained_loss, step, self.last_grad_norm)

    @functools.cached_property
    def tokens_per_byte(self) -> float | None:
        """Validation tokens for each byte of their text; None if the tokenizer does not tell bytes.

        BOS tokens have no bytes, and their loss counts all the same.
        """
        lengths = bytes_of_tokens(self.corpus) if self.world.is_main else None
        if lengths is None:
            return None
        size = sum(int(lengths[self.val_batches[i][1].numpy()].sum()) for i in range(len(self.val_batches)))
        return len(self.val_batches) * self.cfg.val_chunk_tokens / size if size else None

    def lr_factor(self, step: int) -> float:
        """What the schedule leaves of the learning rates at `step`."""
        return lr_factor(step / self.cfg.iterations, self.cfg.cooldown, self.cfg.lr_floor)

    def tell_of_epoch(self, step: int) -> None:
        """Say so where the data repeats."""
        data_step = step + self.data_offset
        epoch = self.batches.epoch_of(data_step)
        if data_step and epoch > self.batches.epoch_of(data_step - 1):
            self.log.say(f"step {step}: the data repeats from here, epoch {epoch + 1}")

    def set_schedule(self, step: int) -> None:
        """Learning rates and Muon's momentum for this step."""
        cfg = self.cfg
        factor = self.lr_factor(step)
        momentum = muon_momentum(step, cfg.momentum_warmup, cfg.momentum_start, cfg.momentum)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
                if "momentum" in group:
                    group["momentum"] = momentum

    @torch.no_grad()
    def chunk_loss(self, chunk: int, step: int) -> Tensor:
        """Summed loss of a chunk of the validation tokens, a scalar on the device."""
        loss: Tensor = self.model(*self.to_device(self.val_batches[chunk]), self.window(step))
        return loss

    def evaluate(self, step: int) -> float:
        """Mean validation loss with the window of `step`. Ranks share the chunks, which are summed in a fixed order."""
        losses = torch.zeros(len(self.val_batches), device=self.world.device)
        with self.telling_of_memory(step, "validation"):
            for chunk in range(self.world.rank, len(losses), self.world.size):
                losses[chunk] = self.chunk_loss(chunk, step)
        self.world.all_reduce(losses).wait()
        return losses.cpu().double().mean().item() / self.cfg.val_chunk_tokens

    def warm_up_kernels(self) -> None:
        """Run a few steps to compile and warm every kernel, then put weights and optimizer states back, from host memory."""
        if not self.cfg.kernel_warmup:
            return
        began = time.perf_counter()
        weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.model.named_parameters()}
        kept = [(optimizer.steps_taken, _on_host(optimizer.slices())) for optimizer in self.optimizers]
        stream = self.batches.stream(0, self.world.rank, self.world.size)
        for _ in range(self.cfg.kernel_warmup):
            with self.telling_of_memory(self.start):
                self.accumulate_gradients(next(stream), step=0)
            with self.telling_of_memory(self.start, "update"):
                for optimizer in self.optimizers:
                    optimizer.step()
            self.model.zero_grad(set_to_none=True)
        stream.close()
        with self.telling_of_memory(self.start, "validation"):
            self.chunk_loss(0, step=0)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        for optimizer, (steps_taken, slices) in zip(self.optimizers, kept, strict=True):
            optimizer.load_slices(_own_slices(slices), steps_taken)
        took = time.perf_counter() - began
        self.log.say(f"kernel warmup: {self.cfg.kernel_warmup} steps in {took:.1f} s, not part of the train time")

    def save(self, step: int, last: bool) -> None:
        """Checkpoint after `step` steps. A failed save costs a warning; the last one, or SAVE_ATTEMPTS, cost the run.

        Weights that exploded are not saved, so that the last good checkpoint stays; nor is, unless it is to stop, a run
        that is worse than untrained, though it may recover.
        """
        self.refuse_exploded(step)
        said = "" if last else self.failure_to_learn(step)
        if said:
            self.log.say(f"warning: step {step}: {said}; not saved, so that the checkpoint before stays")
            return
        slices = {key: part for optimizer in self.optimizers for key, part in optimizer.slices().items()}
        state = {
            "step": step,
            "train_s": self.train_s,
            "data_offset": self.data_offset,
            "val_loss": self.val_loss,
            "losses": self.spikes.history,
            "optimizer_steps": {type(optimizer).__name__: optimizer.steps_taken for optimizer in self.optimizers},
            "corpus": self.corpus.fingerprint,
            "config": dataclasses.asdict(self.cfg),
        }
        self.hear_of_saves(wait=True)
        self.follow_folder()
        with self.tolerating_failed_saves(last):
            self.checkpoints.save(step, self.model.state_dict(), slices, state, wait=last)

    def hear_of_saves(self, wait: bool = False) -> None:
        """Learn how a save in the background ended, if it has; wait: until it has."""
        with self.tolerating_failed_saves():
            if self.checkpoints.poll(wait):
                self.failed_saves = 0

    @contextmanager
    def tolerating_failed_saves(self, last: bool = False) -> Iterator[None]:
        """Turn a CheckpointError into a warning, unless it is the last save or the SAVE_ATTEMPTS-th failure in a row."""
        try:
            yield
        except CheckpointError as fault:
            self.failed_saves += 1
            if last or self.failed_saves >= SAVE_ATTEMPTS:
                raise
            self.log.say(f"warning: {fault}; training goes on")

    def resume(self) -> list[str]:
        """Continue from the newest intact checkpoint, if the folder has one; returns what there is to say about it."""
        notes = _told_of_other_code(self.folder) if self.world.is_main else []
        path = self.checkpoints.newest(notes.append)
        if path is None:
            saved = saved_config(self.folder)
            before = {"config": dataclasses.asdict(saved), "corpus": self.corpus.fingerprint}
            check_resumable(self.cfg, self.corpus, before, self.folder)
            weights = self.take_weights(Path(saved.init_from)) if saved.init_from else []
            return [*notes, f"{self.folder} has no checkpoint yet; starting at step 0", *weights]
        notes += self.load(path)
        done = "; already complete" if self.start == self.cfg.iterations else ""
        return [*notes, f"resumed from {path}, step {self.start} of {self.cfg.iterations}{done}"]

    def load(self, path: Path) -> list[str]:
        """Take model, optimizers and position from a checkpoint of this run; returns what changes with it.

        Nothing changes if it does not fit. With --dtype auto, the type may be another one on this device.
        """
        loaded = self.checkpoints.load(path)
        state = checked_state(STATE_BEFORE | loaded.state, path)
        check_resumable(self.cfg, self.corpus, state, path)
        own, notes = self.model.state_dict(), list[str]()
        model = loaded.model
        if self.cfg.dtype == "auto" and (types := _other_type(model, own)):
            notes.append(f"--dtype auto: this device takes {types}, so from here on numbers are rounded otherwise")
            model = {name: tensor.to(own[name].dtype) if name in own else tensor for name, tensor in model.items()}
        check_match(model, own)
        self.model.load_state_dict(model)
        for optimizer in self.optimizers:
            optimizer.load_slices(loaded.slice, state["optimizer_steps"][type(optimizer).__name__])
        self.start, self.train_s, self.data_offset = state["step"], state["train_s"], state["data_offset"]
        self.val_loss = state["val_loss"]
        self.spikes = SpikeWatch(state["losses"])
        before = state["config"]["iterations"]
        if is_longer(before, self.cfg.iterations):
            notes.append(told_of_extension(before, self.cfg, self.start))
        return notes

    def take_weights(self, source: Path) -> list[str]:
        """Begin with the weights in `source`, the folder of a run or of a checkpoint; returns a line about it."""
        notes: list[str] = []
        path = source
        if not re.fullmatch(r"step-\d+", source.name):
            root = Checkpoints(source / "checkpoints", self.world)
            found = root.newest(notes.append)
            root.close()
            if found is None:
                raise CheckpointError(
                    f"--init-from {source}: no checkpoint there; give a run's folder or a step-N in it"
                )
            path = found
        faults = self.world.gather_objects(_attempt(lambda: self.start_from(Loaded(path), path)))
        if fault := next((fault for fault in faults if fault), None):
            raise fault
        self.cfg = dataclasses.replace(self.cfg, init_from=str(path.absolute()))
        return [*notes, f"starting at step 0 with the weights of {path}"]

    def start_from(self, loaded: Loaded, path: Path) -> None:
        """Take the weights of `loaded`. CheckpointError if they are another model's, or mean another function here."""
        own = self.model.state_dict()
        shapes = {name: (tuple(loaded.model[name].shape) if name in loaded.model else None) for name in own}
        differ = [name for name, tensor in own.items() if shapes[name] != tuple(tensor.shape)]
        differ += [name for name in loaded.model if name not in own]
        if differ:
            first = differ[0]
            raise CheckpointError(
                f"--init-from {path}: another model, {len(differ)} of its parameters do not fit; {first} is "
                f"{shapes.get(first) or 'missing or unexpected'}, not {tuple(own[first].shape) if first in own else 'known'};"
                " give the same --width, --n-layer and tokens"
            )
        saved = loaded.state["config"].items()
        theirs = TrainConfig(**{key: value for key, value in saved if key in TrainConfig.__dataclass_fields__})
        with torch.device("meta"):
            scale = GPT(model_config(theirs, self.corpus, "dense", torch.float32)).logit_scale
        if theirs.head_dim != self.cfg.head_dim or not math.isclose(scale, self.model.logit_scale):
            raise CheckpointError(
                f"--init-from {path}: the same weights give other predictions with these settings; keep its --parametrization "
                f"{theirs.parametrization} --base-width {theirs.base_width or theirs.width} --head-dim {theirs.head_dim}"
            )
        self.model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in loaded.model.items()})


# What a checkpoint of version 0.1.0 does not tell.
STATE_BEFORE: dict[str, Any] = {"data_offset": 0, "losses": []}


def _other_type(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Which type a tensor has instead of which, if one of them has another; else nothing."""
    for name in found.keys() & expected.keys():
        now, before = (str(tensors[name].dtype).removeprefix("torch.") for tensors in (expected, found))
        if now != before:
            return f"{now} instead of {before}"
    return ""


def _told_of_other_code(folder: Path) -> list[str]:
    """A line if the last life of the run in `folder` had other code than this one."""
    before, now = next((life.get("source_sha256") for life in lives(folder)[-1:]), None), source_sha256()
    if before in (None, now):
        return []
    return [
        f"the code changed since this run's last life: its hash was {printable(before)[:12]}, is {now[:12]}; going on"
    ]


def _own_slices(slices: dict[str, Slice]) -> FetchSlice:
    """A source for `load_slices` that gives back just what `slices` held on this rank."""
    return lambda key, begin, end: slices[key].tensor


def _on_host(slices: dict[str, Slice]) -> dict[str, Slice]:
    return {key: dataclasses.replace(part, tensor=part.tensor.to("cpu", copy=True)) for key, part in slices.items()}


def prepare_corpus(cfg: TrainConfig, world: World) -> tuple[Corpus, str]:
    """The corpus that `cfg` names and a line about it. Rank 0 comes first, because it may have to write the corpus."""

    def find() -> tuple[Corpus, str]:
        try:
            return find_corpus(cfg.data, cfg.tokenizer)
        except UserError as fault:
            if cfg.resume:
                raise type(fault)(f"{fault}; if the data moved, add --data and their new place") from None
            raise

    found = world.from_main(_attempt(find) if world.is_main else None)
    if isinstance(found, UserError):
        raise found
    return found


def model_config(cfg: TrainConfig, corpus: Corpus, attention: str, dtype: torch.dtype, fp8: bool = False) -> GPTConfig:
    """The model that `cfg` describes, for the vocabulary of `corpus`."""
    return GPTConfig(
        vocab_size=corpus.vocab_size,
        bos_token=corpus.bos_token,
        n_layer=cfg.n_layer,
        width=cfg.width,
        base_width=cfg.base_width or cfg.width,
        head_dim=cfg.head_dim,
        block_size=cfg.block_size,
        parametrization=cfg.parametrization,
        embed_dtype=dtype,
        attention=attention,
        fp8=fp8,
        widest_window=window_blocks(1.0, cfg.window_tokens, cfg.block_size),
    )


def tuned_values(cfg: TrainConfig) -> dict[str, Tuned]:
    """What each parameter group was tuned to at base width."""

    def tuned(lr: float, optimizer: str = "adam", eps: float = cfg.adam_eps) -> Tuned:
        return Tuned(optimizer, lr * cfg.lr_scale, cfg.weight_decay, eps)

    return {
        "embed": tuned(cfg.embed_lr),
        "value_embed": tuned(cfg.embed_lr),
        "matrix": tuned(cfg.matrix_lr, cfg.hidden_optimizer),
        "head": tuned(cfg.head_lr),
        "scalar": tuned(cfg.scalar_lr, eps=cfg.scalar_eps),
    }


def build_optimizers(model: GPT, cfg: TrainConfig, world: World) -> list[ShardedOptimizer]:
    """DistAdam and, unless Adam has the hidden matrices too, Muon."""
    groups = param_groups(model, model.cfg.table, tuned_values(cfg))
    optimizers: list[ShardedOptimizer] = [DistAdam(groups["adam"], world, betas=(cfg.adam_beta1, cfg.adam_beta2))]
    if "muon" in groups:
        optimizers.append(Muon(groups["muon"], world, momentum=cfg.momentum))
    return optimizers


def check_agreement(cfg: TrainConfig, corpus: Corpus, world: World) -> None:
    """CollectiveError unless all ranks have the same settings, data and versions."""
    mine = {"torch": torch.__version__, "corpus": corpus.fingerprint, **dataclasses.asdict(cfg)}
    for rank, theirs in enumerate(world.gather_objects(mine)):
        differ = [key for key in mine if theirs.get(key) != mine[key]]
        if differ:
            raise CollectiveError(
                f"ranks {world.rank} and {rank} differ in {', '.join(differ)}; start all with one command"
            )


def open_folder(cfg: TrainConfig, world: World, lock: FolderLock | None = None) -> tuple[Path, FolderLock | None]:
    """Make (or, to resume, reopen) the run's folder. Rank 0 holds its lock, from before if it is given."""

    def open_it() -> Path:
        nonlocal lock
        if lock:
            return lock.find()
        moment = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}"
        made = f"{cfg.parametrization}-w{cfg.width}-s{cfg.seed}-{moment}"
        folder = Path(cfg.resume) if cfg.resume else Path(cfg.out) / (cfg.name or made)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(folder)
        except OSError as fault:
            raise _cannot_write(cfg, folder, fault) from None
        if not cfg.resume and os.path.lexists(folder / CONFIG):
            raise ConfigError(f"{folder} already holds a run; --resume {folder} goes on, --name starts another")
        return folder

    outcome = world.from_main(_attempt(open_it) if world.is_main else None)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome, lock


def open_log(cfg: TrainConfig, world: World, folder: Path, start: int) -> RunLog:
    """The log of a run in `folder` from step `start`; then its provenance and config.json, with which a run exists.

    A resumed run's config.json is told what the resume changed for good.
    """

    def open_it() -> RunLog:
        log = RunLog(folder, cfg.iterations, start, world.is_main, cfg.progress, cfg.track, dataclasses.asdict(cfg))
        if not world.is_main:
            return log
        before = saved_config(folder) if cfg.resume else None
        now = dataclasses.replace(before, **{name: getattr(cfg, name) for name in LASTING}) if before else cfg
        changed = {name: [getattr(before, name), getattr(now, name)] for name in LASTING if before and before != now}
        life = provenance(sys.argv) | {
            "from_step": start,
            "changed": {k: v for k, v in changed.items() if v[0] != v[1]},
        }
        try:
            with open_to_append(folder / PROVENANCE) as file:
                file.write(json.dumps(life) + "\n")
        except OSError as fault:
            raise _cannot_write(cfg, folder, fault) from None
        if now != before:
            write_whole(folder / CONFIG, to_json(now) + "\n", "choose another folder with --out")
        return log

    log = _attempt(open_it)
    fault = world.from_main(log if isinstance(log, UserError) else None)
    if fault:
        raise fault
    return log


def _cannot_write(cfg: TrainConfig, folder: Path, fault: OSError) -> ConfigError:
    where = printable(fault.filename or folder)
    advice = "go on in a copy of its folder, with --resume" if cfg.resume else "choose another with --out"
    return ConfigError(f"{where} cannot be written ({fault.strerror}); {advice}")


def _attempt(work: Callable[[], Any]) -> Any:
    """The result of `work`, or its UserError as a value: rank 0's outcome, for all ranks to hear of."""
    try:
        return work()
    except UserError as fault:
        return fault
