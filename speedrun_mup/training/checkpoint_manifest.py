"""What the folder of a checkpoint must hold: sizes and SHA-256 of its files, who wrote which range; how it is verified."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedrun_mup import __version__
from speedrun_mup.core.errors import UserError, in_a_line
from speedrun_mup.files import open_regular, printable, read_bytes

SCHEMA = 1
MODEL, STATE, MANIFEST = "model.safetensors", "state.json", "manifest.json"

Range = tuple[int, int]  # [begin, end)
Part = tuple[int, int, int]  # (rank, begin, end)


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or used."""

    exit_code = 4


class DamagedCheckpoint(CheckpointError):
    """A folder that is not what a finished save left behind: something is missing, cut or changed."""


@dataclass(frozen=True)
class Manifest:
    """What a folder must hold. files: name -> (size, SHA-256). slices: key -> (rank, begin, end), tiling [0, size)."""

    step: int
    ranks: int
    files: dict[str, tuple[int, str]]
    slices: dict[str, list[Part]]
    digest: str

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Parse and check the manifest's own digest. Raises DamagedCheckpoint, or CheckpointError for a newer schema."""
        path = folder / MANIFEST
        with os_faults(path, DamagedCheckpoint):
            data = read_bytes(path)
        try:
            body = json.loads(data)
            digest = body.pop("sha256")
            if json_with_digest(body) != data:
                raise ValueError("its own SHA-256 is wrong")
            if _count(body["schema"]) > SCHEMA:
                raise CheckpointError(
                    f"{path}: written by {body['written_by']} in schema {body['schema']}, "
                    f"this is {this_version()} with schema {SCHEMA}; update to read it"
                )
            files = {name: (_count(entry["size"]), entry["sha256"]) for name, entry in body["files"].items()}
            slices = {key: _parts(parts, _count(body["ranks"])) for key, parts in body["slices"].items()}
            optim = [optim_name(rank, body["ranks"]) for rank in range(len(files) - 2)]
            if sorted(files) != sorted([MODEL, STATE, *optim]) or len(optim) != body["ranks"]:
                raise ValueError(f"the files are not those of {body['ranks']} ranks")
            return cls(_count(body["step"]), body["ranks"], files, slices, digest)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as fault:
            raise DamagedCheckpoint(f"{printable(path)}: {printable(describe_fault(fault))}") from fault

    def check(self, path: Path, size: int, sha256: str) -> None:
        """Raise DamagedCheckpoint unless the file of that name is to have that size and hash."""
        right_size, right_sha256 = self.files[path.name]
        if size != right_size:
            raise DamagedCheckpoint(f"{path}: has {size} bytes instead of {right_size}")
        if sha256 != right_sha256:
            raise DamagedCheckpoint(f"{path}: its SHA-256 is not the one in the manifest")


def _count(value: Any) -> int:
    """A whole number from a stranger's JSON. ValueError for anything else."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value


def _parts(parts: Any, ranks: int) -> list[Part]:
    """(rank, begin, end) of each part of one state, which tile it. ValueError for anything else."""
    checked = [(_count(rank), _count(begin), _count(end)) for rank, begin, end in parts]
    ends = [0, *(end for _, _, end in checked)]
    owners = {rank for rank, _, _ in checked if rank < ranks}
    if not checked or len(owners) < len(checked) or any(b != e or b > f for (_, b, f), e in zip(checked, ends)):
        raise ValueError("its ranges do not follow each other")
    return checked


def verify(folder: Path) -> Manifest:
    """The manifest, after every file was hashed (in parallel). Raises as `Manifest.read` does."""
    if folder.is_symlink():
        raise DamagedCheckpoint(f"{printable(folder)}: is a symbolic link, not a folder")
    manifest = Manifest.read(folder)
    if folder.name != f"step-{manifest.step:08d}":
        raise DamagedCheckpoint(f"{printable(folder)}: holds step {manifest.step}")

    def check(name: str) -> None:
        path = folder / name
        with os_faults(path, DamagedCheckpoint), open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            right = size == manifest.files[name][0]
            sha256 = hashlib.file_digest(file, "sha256").hexdigest() if right else ""
        manifest.check(path, size, sha256)

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, manifest.files))
    return manifest


def merge_slices(holders: list[dict[str, Range]]) -> dict[str, list[Part]]:
    """Who holds which range of each key, in order of the ranges. Raises CheckpointError for a gap or an overlap."""
    slices: dict[str, list[Part]] = {}
    for rank, ranges in enumerate(holders):
        for key, (begin, end) in ranges.items():
            slices.setdefault(key, []).append((rank, begin, end))
    for key, parts in slices.items():
        parts.sort(key=lambda part: part[1])
        if [begin for _, begin, _ in parts] != [0, *(end for _, _, end in parts[:-1])]:
            raise CheckpointError(f"the ranges (rank, begin, end) {parts} of {key} leave a gap or overlap")
    return slices


def json_bytes(value: Any) -> bytes:
    """Strict JSON with sorted keys; floats read back as they are."""
    return json.dumps(value, allow_nan=False, indent=1, sort_keys=True).encode()


def json_with_digest(body: dict[str, Any]) -> bytes:
    """JSON of `body` and the SHA-256 of itself. Reading compares all bytes with it, so no flipped bit goes unseen."""
    return json_bytes({**body, "sha256": hashlib.sha256(json_bytes(body)).hexdigest()})


def optim_name(rank: int, ranks: int) -> str:
    """The file of what one rank held of the optimizers."""
    return f"optim-{rank:04d}-of-{ranks:04d}.safetensors"


def this_version() -> str:
    """Who writes, for a manifest."""
    return f"speedrun-mup {__version__}"


@contextmanager
def os_faults(path: Path, kind: type[CheckpointError], advice: str = "") -> Iterator[None]:
    """Turn an OSError into a `kind` that names the file, and ends with `advice`."""
    try:
        yield
    except OSError as fault:
        fault.filename = fault.filename or str(path)
        raise kind(describe_fault(fault) + (f"; {advice}" if advice else "")) from fault


def describe_fault(fault: Exception) -> str:
    """A fault in one line, with the file if it is one of the disk."""
    if isinstance(fault, OSError) and fault.errno:
        where = f"{fault.filename}: " if fault.filename else ""
        return f"{where}{errno.errorcode[fault.errno]} ({fault.strerror})"
    return str(fault) if isinstance(fault, CheckpointError) else in_a_line(fault)
