"""Checkpoints that are whole or absent: one folder per step, every byte under a SHA-256, committed by one rename.

    step-00001234/model.safetensors                 all parameters, written by rank 0
    step-00001234/optim-0003-of-0008.safetensors    what rank 3 of 8 held of the optimizer, as flat ranges
    step-00001234/state.json                        step counts, data position and other small facts
    step-00001234/manifest.json                     sizes and SHA-256 of the others, who holds which range; with its own hash

A save fills `.tmp-step-00001234` on all ranks, gathers what was written (the only "all written" signal), writes the
manifest, syncs, renames and syncs again; older checkpoints go away by a rename to `.trash-*` first. So a process may
die at any instruction, and a folder called step-N is complete. There is no file that names the latest: a reader scans,
verifies, and falls back. Reading executes no code: safetensors and strict JSON only, in which floats round-trip
exactly, because Python writes the shortest text that reads back as the same float.

All ranks must see the same folder. Rename is atomic on local disks and NFS, not on object stores.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from speedrun_mup.config import TrainConfig, config_of
from speedrun_mup.core.errors import ConfigError, in_a_line
from speedrun_mup.core.model.record import SCALARS, ranges_of_scalars
from speedrun_mup.core.optimizers import Slice
from speedrun_mup.core.utils import World
from speedrun_mup.files import open_regular, printable, sync_folder
from speedrun_mup.training.checkpoint_manifest import (
    MANIFEST,
    MODEL,
    SCHEMA,
    STATE,
    CheckpointError,
    DamagedCheckpoint,
    Manifest,
    Range,
    describe_fault,
    json_bytes,
    json_with_digest,
    merge_slices,
    optim_name,
    os_faults,
    this_version,
    verify,
)
from speedrun_mup.training.safetensors_writer import Content, write_file

T = TypeVar("T")
Gather = Callable[[Any], list[Any]]  # every rank's value, on every rank


class Checkpoints:
    """The checkpoints of one run, in `root`, the `keep_last` newest and every `milestone_every`-th step (0: none).

    All methods are collective except `load`: every rank calls them at the same step. A failed save raises
    CheckpointError on all ranks, and earlier checkpoints are untouched; the caller may continue training.
    """

    def __init__(self, root: Path, world: World, keep_last: int = 2, milestone_every: int = 0):
        if keep_last < 2:
            raise ConfigError(f"keep_last={keep_last} could leave no intact checkpoint; use 2 or more")
        self.root, self.world, self.keep_last, self.milestone_every = root, world, keep_last, milestone_every
        self._intact: set[Path] = set()  # verified or written by this process
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._aside: World | None = None  # for the writer thread

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optim: Mapping[str, Slice],
        state: dict[str, Any],
        wait: bool = True,
    ) -> Path:
        """Write step `step` and return its folder; a complete one of the same step is kept as it is.

        optim: this rank's ranges, keyed "parameter/state"; over all ranks they must tile each state without overlap.
        model, state: the same on all ranks. state: plain JSON (None, bool, int, finite float, str, list, dict).
        wait: False returns once everything is copied to memory, and `poll` shows when it is on the disk. Waits for the
        save before it first; if that one failed, raises its fault instead of saving.
        """
        self.poll(wait=True)
        state_text = json_bytes(state)
        if json.loads(state_text) != state:
            raise ValueError("checkpoint state must be plain JSON: text keys, lists instead of tuples")
        held = {key: part for key, part in optim.items() if part.end > part.begin}
        ranges = {key: (part.begin, part.end) for key, part in held.items()}
        tensors = {key: _on_cpu(part.tensor, copy=not wait) for key, part in held.items()}
        files: dict[str, Content] = {optim_name(self.world.rank, self.world.size): tensors}
        if self.world.is_main:
            files[MODEL] = {name: _on_cpu(tensor, copy=not wait) for name, tensor in model.items()}
            files[STATE] = state_text
        if wait:
            return self._write(step, files, ranges, self.world.gather_objects)
        self._aside = self._aside or self.world.aside()
        self._pending = self._writer.submit(self._write, step, files, ranges, self._aside.gather_objects)
        return self._folder(step)

    def poll(self, wait: bool = False) -> Path | None:
        """The folder of a background save that has become durable since the last call; raises if that save failed.

        Call it every step: all ranks learn of it at the same step. wait: block until the save is over.
        """
        if self._pending is None:
            return None
        if not wait and not all(self.world.gather_objects(self._pending.done())):
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def close(self) -> Path | None:
        """Finish a background save as `poll(wait=True)` does, and end the writer thread. Call it before leave_world."""
        try:
            return self.poll(wait=True)
        finally:
            self._writer.shutdown()

    def clean(self) -> None:
        """Remove what a killed process left behind. Call it once at start, when no other run writes here.

        Raises CheckpointError if a link stands in place of the folder: what lies there may be another run's.
        """

        def remove() -> None:
            self._refuse_link()
            for leftover in [*self.root.glob(".tmp-step-*"), *self.root.glob(".trash-step-*")]:
                _remove(leftover)

        _all_ranks(self.world.gather_objects, lambda: remove() if self.world.is_main else None)

    def newest(self, report: Callable[[str], None]) -> Path | None:
        """The newest intact checkpoint, or None if the folder has none at all.

        Rank 0 verifies every hash, reports each damaged one in a line, and chooses for all. Raises CheckpointError if
        all are damaged, one was written by a newer version, or a rank does not see the chosen one.
        """
        gather = self.world.gather_objects
        chosen = _all_ranks(gather, lambda: self._choose(report) if self.world.is_main else None)[0]
        if chosen is None:
            return None
        step, digest = chosen
        path = self._folder(step)

        def check_same() -> None:
            if Manifest.read(path).digest != digest:
                raise CheckpointError(f"{path} is not the one that rank 0 sees; all ranks must share one disk")

        _all_ranks(gather, check_same)
        return path

    def load(self, path: Path) -> Loaded:
        """Read the checkpoint in `path`; see `Loaded`."""
        return Loaded(path)

    def _folder(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def _choose(self, report: Callable[[str], None]) -> tuple[int, str] | None:
        """The newest intact step and its digest."""
        steps, faults = _newest_first(self.root), list[str]()
        for step in steps:
            path = self._folder(step)
            try:
                manifest = verify(path)
            except DamagedCheckpoint as fault:
                faults.append(str(fault))
                report(f"skipping a damaged checkpoint: {fault}")
            else:
                self._intact.add(path)
                return step, manifest.digest
        if steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self.root} is intact (the newest: {faults[0]}); "
                "restore one, or move them to train again"
            )
        return None

    def _write(self, step: int, files: dict[str, Content], ranges: dict[str, Range], gather: Gather) -> Path:
        """The commit protocol, on all ranks. Every gather is also a barrier."""
        final, main = self._folder(step), self.world.is_main
        temp = self.root / f".tmp-{final.name}"
        needed = sum(gather(sum(_size(content) for content in files.values())))
        try:
            if _all_ranks(gather, lambda: main and self._prepare(final, temp))[0]:
                return final
            written = _all_ranks(gather, lambda: [(name, *write_file(temp / name, files[name])) for name in files])
            holders = gather(ranges)
            _all_ranks(gather, lambda: self._commit(step, temp, written, holders) if main else None)
        except CheckpointError as fault:
            if main:
                shutil.rmtree(temp, ignore_errors=True)  # what cannot be removed now is removed by clean()
            raise CheckpointError(
                f"step {step} is not saved: {fault}. It needs {needed:,} bytes, {_free(self.root)} are free; "
                f"earlier checkpoints are untouched"
            ) from fault
        _all_ranks(gather, lambda: self._purge(step) if main else None)
        return final

    def _prepare(self, final: Path, temp: Path) -> bool:
        """Make an empty `temp`. True if `final` is there already, and intact; a damaged one goes away."""
        if os.path.lexists(final):
            try:
                verify(final)
                return True
            except DamagedCheckpoint:
                _discard(final)
        if os.path.lexists(temp):
            _remove(temp)
        self._refuse_link()
        temp.mkdir(parents=True)
        return False

    def _refuse_link(self) -> None:
        if self.root.is_symlink():
            raise CheckpointError(f"{printable(self.root)} is a symbolic link; put the folder itself in its place")

    def _commit(
        self,
        step: int,
        temp: Path,
        written: list[list[tuple[str, int, str]]],
        holders: list[dict[str, Range]],
    ) -> None:
        """Seal `temp` and give it its final name. Nothing is saved before the last fsync has returned."""
        body = {
            "schema": SCHEMA,
            "written_by": this_version(),
            "step": step,
            "ranks": self.world.size,
            "files": {name: {"size": size, "sha256": sha256} for rank in written for name, size, sha256 in rank},
            "slices": merge_slices(holders),
        }
        write_file(temp / MANIFEST, json_with_digest(body))
        sync_folder(temp)
        os.rename(temp, self._folder(step))
        sync_folder(self.root)
        self._intact.add(self._folder(step))

    def _purge(self, saved: int) -> None:
        """Remove what is older than `saved`, except milestones and enough intact ones to make `keep_last` with it."""
        wanted = self.keep_last - 1
        for step in (step for step in _newest_first(self.root) if step < saved):
            path = self._folder(step)
            if wanted and self._is_intact(path):
                wanted -= 1
            elif not self.milestone_every or step % self.milestone_every:
                try:
                    _discard(path)
                except OSError as fault:
                    raise CheckpointError(
                        f"step {saved} is saved, but {path} stays: {describe_fault(fault)}"
                    ) from fault

    def _is_intact(self, path: Path) -> bool:
        if path not in self._intact:
            try:
                verify(path)
            except DamagedCheckpoint:
                return False
            self._intact.add(path)
        return True


class Loaded:
    """A checkpoint, read back: `model` (name -> tensor), `state`, and `slice` for any range of the optimizer.

    optim_sizes: elements of each "parameter/state". What the first edition wrote has today's names here. Tensors are on the
    CPU. The hash is checked on the very bytes that are parsed; optimizer files are read when first asked for, and held.
    Raises DamagedCheckpoint, or CheckpointError if a newer version wrote it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._manifest = Manifest.read(path)
        self.step = self._manifest.step
        self.state: dict[str, Any] = self._json(STATE)
        self.model: dict[str, Tensor] = self._tensors(MODEL)
        self.optim_sizes = {key: parts[-1][2] for key, parts in self._manifest.slices.items()}
        self._optim: dict[int, dict[str, Tensor]] = {}
        self._inside: dict[str, tuple[str, int]] = {}  # a state that is part of another, and where it begins there
        flat = self.model.get(SCALARS)  # of the first edition
        if flat is not None and flat.ndim == 1 and len(flat) % 5 == 0:
            self._divide(SCALARS, ranges_of_scalars(len(flat) // 5))

    @functools.cached_property
    def cfg(self) -> TrainConfig:
        """The settings of the run that wrote it, by their present names."""
        return config_of(self.state["config"])

    def slice(self, key: str, begin: int, end: int) -> Tensor:
        """The flat range [begin, end) of "parameter/state", (end - begin,), whichever rank wrote it."""
        size = self.optim_sizes.get(key)
        if size is None or not 0 <= begin <= end <= size:
            have = "nothing of that name" if size is None else f"{size} elements"
            raise CheckpointError(f"{self.path}: [{begin}, {end}) of {key} is asked for, but it has {have}")
        key, offset = self._inside.get(key, (key, 0))
        begin, end = begin + offset, end + offset
        parts = self._manifest.slices[key]
        if begin == end:
            return self._part(parts[0][0], key)[:0].clone()
        return torch.cat(
            [self._part(rank, key)[max(begin, lo) - lo : end - lo] for rank, lo, hi in parts if lo < end and begin < hi]
        )

    def _divide(self, name: str, parts: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        """Show the flat parameter `name` as several, {name: (where it begins, shape)}, and its states likewise."""
        flat = self.model.pop(name)
        states = [key for key in self.optim_sizes if key.startswith(f"{name}/")]
        for part, (begin, shape) in parts.items():
            size = math.prod(shape)
            self.model[part] = flat[begin : begin + size].view(shape)
            for key in states:
                self._inside[part + key.removeprefix(name)] = key, begin
                self.optim_sizes[part + key.removeprefix(name)] = size
        for key in states:
            del self.optim_sizes[key]

    def _part(self, rank: int, key: str) -> Tensor:
        if rank not in self._optim:
            self._optim[rank] = self._tensors(optim_name(rank, self._manifest.ranks))
        tensor = self._optim[rank].get(key)
        size = next(hi - lo for owner, lo, hi in self._manifest.slices[key] if owner == rank)
        if tensor is None or tensor.shape != (size,):
            raise DamagedCheckpoint(
                f"{printable(self.path)}: rank {rank} does not hold {size} elements of {printable(key)}"
            )
        return tensor

    def _bytes(self, name: str) -> bytes:
        path = self.path / name
        with os_faults(path, DamagedCheckpoint), open_regular(path) as file:
            data = file.read(self._manifest.files[name][0] + 1)  # no more than would be right
        self._manifest.check(path, len(data), hashlib.sha256(data).hexdigest())
        return data

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads(self._bytes(name))
            if not isinstance(content, dict):
                raise TypeError("not an object")
            return content
        except (ValueError, TypeError, RecursionError) as fault:
            raise DamagedCheckpoint(f"{printable(self.path / name)}: {printable(in_a_line(fault))}") from fault

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return safetensors.torch.load(self._bytes(name))
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as fault:  # a header of strange types
            raise DamagedCheckpoint(f"{printable(self.path / name)}: {printable(in_a_line(fault))}") from fault


def list_checkpoints(root: Path) -> list[tuple[Path, str | None]]:
    """Every checkpoint in `root`, the newest first, with what is wrong with it. Reads every byte and changes none."""
    found: list[tuple[Path, str | None]] = []
    for step in _newest_first(root):
        path = root / f"step-{step:08d}"
        try:
            verify(path)
            found.append((path, None))
        except CheckpointError as fault:
            found.append((path, str(fault)))
    return found


def check_match(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError, listing the keys, unless names, shapes and dtypes of `found` are those of `expected`."""
    faults = [f"{key} is missing" for key in expected if key not in found]
    faults += [f"{key} is unexpected" for key in found if key not in expected]
    for key in expected:
        if key in found and _describe(found[key]) != _describe(expected[key]):
            faults.append(f"{key} is {_describe(found[key])}, not {_describe(expected[key])}")
    if faults:
        shown = "; ".join(faults[:8]) + ("; ..." if len(faults) > 8 else "")
        raise CheckpointError(f"the checkpoint belongs to another model, {len(faults)} keys differ: {shown}")


def _newest_first(root: Path) -> list[int]:
    matches = [re.fullmatch(r"step-(\d{8,})", path.name) for path in root.glob("step-*")]
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def _all_ranks(gather: Gather, work: Callable[[], T]) -> list[T]:
    """Do `work` on this rank and return every rank's result. CheckpointError on all ranks if it failed on any."""
    result: T | None = None
    fault: Exception | None = None
    try:
        result = work()
    except Exception as error:  # any: a rank that left alone would make the others wait for it
        fault = error
    outcomes = gather((result, fault and describe_fault(fault)))
    faults = {rank: text for rank, (_, text) in enumerate(outcomes) if text}
    if faults:
        alone = len(outcomes) == 1
        raise CheckpointError(
            "; ".join(text if alone else f"rank {r}: {text}" for r, text in faults.items())
        ) from fault
    return [result for result, _ in outcomes]


def _on_cpu(tensor: Tensor, copy: bool) -> Tensor:
    return tensor.detach().to("cpu", copy=copy).contiguous()


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else sum(tensor.nbytes for tensor in content.values())


def _discard(folder: Path) -> None:
    """Delete, but first take the name away: a folder half deleted must not look like a checkpoint."""
    trash = folder.with_name(f".trash-{folder.name}")
    if os.path.lexists(trash):
        _remove(trash)
    os.rename(folder, trash)
    _remove(trash)


def _remove(path: Path) -> None:
    """Delete a folder and what is in it; of a link, the link only."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "unknown"
