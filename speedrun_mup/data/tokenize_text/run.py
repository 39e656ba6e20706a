"""The whole way from text to a folder of shards: begun, resumed, finished, moved to where it was asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speedrun_mup.core.errors import ConfigError, UserError
from speedrun_mup.data.manifest import open_corpus, write_manifest
from speedrun_mup.data.shards import MANIFEST, TOKENIZER_FILE, UNFINISHED, Corpus, sole_writer
from speedrun_mup.data.sources import STDIN, find_sources
from speedrun_mup.data.tokenize_text.encode import read_text
from speedrun_mup.data.tokenize_text.job import PARTS, Job, TextSettings, other_corpus
from speedrun_mup.data.tokenize_text.progress import PROGRESS, SOURCES, Progress
from speedrun_mup.data.tokenize_text.shard_writer import write_shards
from speedrun_mup.data.tokenize_text.split import NothingToKeep, describe, split_parts
from speedrun_mup.data.tokenize_text.tokenizer import ready_tokenizer, trained_tokenizer
from speedrun_mup.data.tokenizers import Tokenizer
from speedrun_mup.files import printable, read_json, sync_folder, write_whole

MOST_WORKERS = 1024
_NOT_FOREIGN = ("lost+found",)  # what an empty folder may hold, in addition to hidden files


def tokenize_text(
    paths: Sequence[str],
    out: Path,
    settings: TextSettings,
    workers: int | None = None,
    progress: bool = False,
    skip_bad: bool = False,
) -> Corpus:
    """Write the documents of `paths` into `out` as a corpus. Resumes where a killed process stopped.

    Returns at once if `out` already holds just this, which is unknown of standard input: it needs a new `out`.

    Args:
        paths: files, folders, "-" for standard input, hf://OWNER/NAME/CONFIG.
        out: a folder that is empty or not there yet; a mount point, the working folder and a link to a folder will do.
        settings: what decides on the shards.
        workers: threads; None is one per core.
        progress: show bars.
        skip_bad: name and count documents that cannot be read or encoded, and leave them out, instead of raising.

    Raises:
        ConfigError, SourceError, ShardError: what is done is kept.
    """
    workers = os.cpu_count() or 1 if workers is None else workers
    if not 1 <= workers <= MOST_WORKERS:
        raise ConfigError(f"workers={workers} must be at least 1, and at most {MOST_WORKERS}")
    found = find_sources(paths, out, skip_bad, settings.suffixes)
    sources = found.sources
    if found.left_out:
        print(f"left out: {found.told()}")
    job = Job(tuple(paths), tuple(sources), settings, found.left_out.total(), workers, progress, skip_bad)
    if (done := _done_before(out, job)) is not None:
        return done
    if (former := Path(f"{out}.unfinished") / PROGRESS).exists():
        print(f"{printable(former.parent)} was begun by an earlier version, and cannot be resumed; delete it")
    made = not out.exists()
    tokenizer = ready_tokenizer(sources, settings)
    with sole_writer(out / UNFINISHED):
        if (done := _done_before(out, job)) is not None:  # by a process that ended just now
            return done
        try:
            if not (out / UNFINISHED / MANIFEST).exists():
                _write_corpus(job, out / UNFINISHED, tokenizer)
            corpus = _move_out(out)
        except NothingToKeep as fault:
            shutil.rmtree(out / UNFINISHED)
            if made:
                with contextlib.suppress(OSError):
                    out.rmdir()
            raise fault.reason from None
    return corpus


def _done_before(out: Path, job: Job) -> Corpus | None:
    """The corpus that was asked for, if `out` holds it. ConfigError if `out` cannot be written or holds something else."""
    unfinished = out / UNFINISHED
    try:
        if "\0" in str(out):
            raise ValueError("a name with a null byte")
        if unfinished.is_symlink():
            raise ConfigError(f"{printable(unfinished)} is a link; delete it")
        begun = unfinished.exists()
        if any(source.name == STDIN for source in job.sources):
            for there in out / MANIFEST, unfinished / PROGRESS:
                if there.exists():
                    raise ConfigError(
                        f"{printable(there)} exists, and standard input cannot be resumed; choose a new --out"
                    )
        if (out / MANIFEST).exists():
            corpus = open_corpus(out)
            if corpus.recipe != job.recipe:
                raise other_corpus(out) if corpus.order else _older(out)
            if begun:
                shutil.rmtree(unfinished, ignore_errors=True)
            return corpus
        if (unfinished / MANIFEST).exists():
            if _manifest(unfinished)["recipe"] != job.recipe:
                raise other_corpus(out)
        elif out.is_symlink() and not out.exists():
            raise ConfigError(f"{printable(out)} is a link to nothing; choose another --out")
        elif out.exists():
            foreign = [] if not out.is_dir() else sorted(set(os.listdir(out)) - set(_NOT_FOREIGN))
            foreign = [name for name in foreign if not name.startswith(".")]
            if foreign or not out.is_dir():
                what = f" (there is {printable(foreign[0], 60)})" if foreign else ""
                raise ConfigError(f"{printable(out)} is not empty{what}; choose another --out, or delete it")
    except (OSError, ValueError) as fault:
        raise ConfigError(
            f"{printable(out)}: cannot write: {getattr(fault, 'strerror', None) or fault}; choose another --out"
        ) from None
    return None


def _manifest(directory: Path) -> dict[str, Any]:
    """What the manifest of a corpus says that waits to be moved."""
    advice = f"delete {printable(directory)} and start again"
    manifest = read_json(directory / MANIFEST, advice)
    parts = [manifest.get(part) for part in PARTS] if isinstance(manifest, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(manifest.get("recipe"), str):
        raise ConfigError(f"{printable(directory / MANIFEST)} is not a manifest; {advice}")
    return manifest


def _move_out(out: Path) -> Corpus:
    """Move what is whole from the folder of the unfinished into `out`, the manifest last."""
    unfinished = out / UNFINISHED
    manifest = _manifest(unfinished)
    for name in [*(name for part in PARTS for name in manifest[part]), TOKENIZER_FILE]:
        if Path(name).name == name and (unfinished / name).exists():
            (unfinished / name).replace(out / name)
    sync_folder(out)
    (unfinished / MANIFEST).replace(out / MANIFEST)
    sync_folder(out)
    shutil.rmtree(unfinished, ignore_errors=True)
    return open_corpus(out)


def _older(directory: Path) -> ConfigError:
    return ConfigError(
        f"{printable(directory)} holds a corpus of another kind or of an earlier version; train on it as it is, choose "
        "another --out, or delete it"
    )


def _write_corpus(job: Job, directory: Path, tokenizer: Tokenizer | None) -> None:
    """Everything but moving it out: read, sort, and write shards and manifest."""
    work = Progress.restore(directory, job)
    if tokenizer:
        tokenizer.save(directory)
    else:
        tokenizer = trained_tokenizer(job, work)
    work.save()
    write_whole(directory / SOURCES, json.dumps([dataclasses.astuple(source) for source in job.sources]))
    try:
        if not work.is_read:
            read_text(job, work, tokenizer)
        for part, pieces in split_parts(job, work).items():
            write_shards(job, work, part, pieces, tokenizer)
    except BaseException:
        with contextlib.suppress(OSError, UserError):  # what stopped the work is what matters
            work.save()
        raise
    write_manifest(
        directory,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        bos_token=tokenizer.bos_token,
        source=describe(job.sources),
        recipe=job.recipe,
        order="given" if job.settings.order == "given" else f"shuffled by seed {job.settings.shuffle_seed}",
        tally=work.steps[-1].tally._asdict() | {"files": job.files_left_out},
        **{part: work.facts(part) for part in PARTS},
    )
