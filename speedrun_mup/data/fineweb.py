"""FineWeb as tokens: downloads modded-nanogpt's ready-made GPT-2 shards from the Hugging Face hub, and checks them.

A shard is fetched into DIR/.download, where a later run resumes it, and moved to the others only when its size,
header, ids and SHA-256 are right. So a file that has a shard's name is whole. The hub's address, token and proxies are what
huggingface_hub makes of HF_ENDPOINT, HF_TOKEN and the rest. A mirror is not trusted: names, sizes and hashes of its listing are
checked, no body may be longer than it was said to be, and one that trickles is given up.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from tqdm import tqdm

from speedrun_mup.core.errors import ConfigError, UserError, in_a_line
from speedrun_mup.data.manifest import GPT2_BOS, GPT2_VOCAB, open_corpus, write_manifest
from speedrun_mup.data.shards import (
    HEADER_BYTES,
    MANIFEST,
    MAX_TOKENS,
    Corpus,
    ShardError,
    ShardFacts,
    measure_shard,
    sole_writer,
)
from speedrun_mup.files import own_folder, printable, sync_folder
from speedrun_mup.packages import import_extra

REPOSITORIES = {
    "10B": "kjj0/fineweb10B-gpt2",
    "100B": "kjj0/fineweb100B-gpt2",
    "edu": "kjj0/finewebedu10B-gpt2",
}
ATTEMPTS = 4
FIRST_WAIT_S = 2.0  # doubled after every failed attempt
SLOWEST_BYTES_S, STALL_S = 1000, 6.0  # a connection that brings less than that, for so long, is a stalled one
_FINAL = (401, 403, 404, 410)  # answers that asking again does not change
_ENOUGH_BYTES = 2**20  # that an attempt has brought if it was worth it, although it failed
_LISTING_BYTES, _LISTING_PAGES = 2**26, 1000

_T = TypeVar("_T")


class FetchError(UserError):
    """The hub is out of reach, does not have what was asked for, or keeps sending something else."""

    exit_code = 3


@dataclass(frozen=True)
class RemoteShard:
    """A shard on the hub. size: bytes. sha256: "" where the hub gives none."""

    name: str
    size: int
    sha256: str

    @property
    def tokens(self) -> int:
        """As many as fit its size."""
        return (self.size - HEADER_BYTES) // 2

    @property
    def part(self) -> str:
        """ "train" or "val"."""
        return "val" if "_val_" in self.name else "train"


def download_fineweb(
    tokens: int, out: Path, dataset: str = "10B", revision: str = "main", workers: int = 4, progress: bool = False
) -> Corpus:
    """Have the first shards with at least `tokens` train tokens, and the val shard, in `out`; fetch those not there yet.

    dataset: a key of REPOSITORIES. revision: branch, tag or commit. Raises ConfigError, FetchError, ShardError; what was
    fetched stays, and the next call resumes it.
    """
    if workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    repository = REPOSITORIES[dataset]
    with _quiet_hub():
        print(f"asking {printable(_hub('constants').ENDPOINT)} for the shards of {repository}")
        commit, available = _attempt(lambda: list_shards(repository, revision), repository)
        chosen = choose_shards(available, tokens, repository)
        with sole_writer(out):
            facts = _known_facts(out, chosen)
            missing = [shard for shard in chosen if shard.name not in facts]
            print(
                f"{len(chosen)} shards, {sum(shard.size for shard in chosen) / 1e9:.2f} GB, at {commit[:12]}, in "
                f"{printable(out)}; {len(missing)} to fetch"
            )
            facts |= _fetch_all(missing, out, lambda name: _url(repository, name, commit), workers, progress)
            train, val = ({s.name: facts[s.name] for s in chosen if s.part == part} for part in ("train", "val"))
            corpus = write_manifest(
                out,
                tokenizer="gpt2",
                vocab_size=GPT2_VOCAB,
                bos_token=GPT2_BOS,
                train=train,
                val=val,
                source=f"{repository}, {sum(each.tokens for each in train.values()) / 1e6:,.0f}M tokens",
                recipe=f"{repository}@{commit}",
            )
    (out / ".lock").unlink(missing_ok=True)
    return corpus


def parse_tokens(text: str) -> int:
    """A number of tokens such as 900M, 1.5B or 200000. ConfigError for anything else."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB]?)", text)
    tokens = (
        round(float(matched[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[matched[2].lower()]) if matched else 0
    )
    if tokens < 1:
        raise ConfigError(f"--tokens {text}: give a number such as 900M or 1.5B")
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Which shards


def list_shards(repository: str, revision: str) -> tuple[str, list[RemoteShard]]:
    """The commit that `revision` names now, and the shards it has, sorted.

    Raises FetchError for a listing that is damaged, and what huggingface_hub and its HTTP library raise.
    """
    api = "/".join([_hub("constants").ENDPOINT, "api", "datasets", repository])
    about, _ = _get_json("/".join([api, "revision", quote(revision, safe="")]))
    commit = about.get("sha") if isinstance(about, dict) else None
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise _damaged(repository, f"its commit is {printable(repr(commit), 60)}")
    shards: dict[str, RemoteShard] = {}
    url: str | None = "/".join([api, "tree", commit])
    for _ in range(_LISTING_PAGES):
        files, url = _get_json(url or "")
        for shard in _listed(repository, files):
            if shard.name in shards:
                raise _damaged(repository, f"{shard.name} is in it twice")
            shards[shard.name] = shard
        if url is None:
            return commit, [shards[name] for name in sorted(shards)]
    raise _damaged(repository, f"it has more than {_LISTING_PAGES:,} pages")


def _listed(repository: str, files: Any) -> Iterator[RemoteShard]:
    """The shards among the files of a listing. Its other files do not matter."""
    if not isinstance(files, list):
        raise _damaged(repository, "it is not a list")
    for file in files:
        name = file.get("path") if isinstance(file, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*_(train|val)_\d+\.bin", name, re.ASCII):
            continue
        lfs, size = file.get("lfs"), file.get("size")
        sha256 = lfs.get("oid") if isinstance(lfs, dict) else ""
        if type(size) is not int or not HEADER_BYTES < size <= HEADER_BYTES + 2 * MAX_TOKENS or len(name) > 200:
            raise _damaged(repository, f"{name[:200]} has size {printable(repr(size), 40)}")
        if not isinstance(sha256, str) or not re.fullmatch("([0-9a-f]{64})?", sha256):
            raise _damaged(repository, f"{name} has SHA-256 {printable(repr(sha256), 80)}")
        yield RemoteShard(name, size, sha256)


def _damaged(repository: str, how: str) -> FetchError:
    endpoint = printable(_hub("constants").ENDPOINT)
    return FetchError(f"{repository}: the listing from {endpoint} is damaged: {how}; check HF_ENDPOINT")


def _get_json(url: str) -> tuple[Any, str | None]:
    """What the hub answers, and the address of the next page."""
    with _answer(url) as response:
        body = b"".join(_pieces(response, _LISTING_BYTES))
        following = response.links.get("next", {}).get("url")
    if following is not None and urlsplit(following)[:2] != urlsplit(url)[:2]:
        raise FetchError(f"{printable(url)}: its next page is on another server; check HF_ENDPOINT")
    try:
        return json.loads(body), following
    except (ValueError, RecursionError):
        raise FetchError(f"{printable(url)}: the answer is not JSON; check HF_ENDPOINT") from None


def choose_shards(available: Sequence[RemoteShard], tokens: int, repository: str) -> list[RemoteShard]:
    """The val shards and as many train shards as it takes. FetchError if there are too few, or none for validation."""
    chosen, left = [shard for shard in available if shard.part == "val"], tokens
    if not chosen:
        raise FetchError(f"{repository}: has no *_val_*.bin shard at this revision; try --revision main")
    for shard in available:
        if shard.part == "train" and left > 0:
            chosen.append(shard)
            left -= shard.tokens
    if left > 0:
        raise FetchError(f"{repository}: has only {tokens - left:,} train tokens; ask for fewer, or for --dataset 100B")
    return chosen


def _known_facts(out: Path, chosen: Sequence[RemoteShard]) -> dict[str, ShardFacts]:
    """Of the chosen shards that are in `out` already and whole: by the manifest, or by reading them."""
    facts: dict[str, ShardFacts] = {}
    try:
        noted = open_corpus(out).facts if (out / MANIFEST).exists() else {}
    except ShardError:
        noted = {}
    for shard in chosen:
        path = out / shard.name
        if not path.exists() or path.stat().st_size != shard.size:
            continue
        if shard.name in noted and noted[shard.name].sha256 == shard.sha256:
            facts[shard.name] = noted[shard.name]
        else:
            try:
                facts[shard.name] = _verify(path, shard)
            except ShardError as fault:
                print(f"fetching again: {fault}")
    return facts


def _verify(path: Path, shard: RemoteShard) -> ShardFacts:
    """Read a shard against its format, its vocabulary and the hub's SHA-256. Raises ShardError."""
    facts = measure_shard(path, GPT2_VOCAB, GPT2_BOS)
    if shard.sha256 and facts.sha256 != shard.sha256:
        raise ShardError(f"{path}: its SHA-256 is not the hub's: bytes were changed on the way; fetch it again")
    return facts


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


class _Stopped(Exception):
    """Another shard failed, or the user wants to stop."""


def _fetch_all(
    shards: Sequence[RemoteShard], out: Path, url_of: Callable[[str], str], workers: int, progress: bool
) -> dict[str, ShardFacts]:
    """Fetch `shards`, several at a time, while one bar counts the bytes on disk."""
    if not shards:
        return {}
    staging = out / ".download"
    own_folder(staging)
    total, have = sum(shard.size for shard in shards), _bytes_in(staging)
    if (free := shutil.disk_usage(out).free) < total - have:
        raise FetchError(f"{out}: needs {(total - have) / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; make room")
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fetch")
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=not progress)
    try:
        fetching = {shard.name: pool.submit(_fetch, shard, url_of(shard.name), staging, out, stop) for shard in shards}
        waiting: set[Future[ShardFacts]] = set(fetching.values())
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            there = sum(shard.size for shard in shards if (out / shard.name).exists())
            bar.update(min(there + _bytes_in(staging), total) - bar.n)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()
    shutil.rmtree(staging, ignore_errors=True)
    return {name: future.result() for name, future in fetching.items()}


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.bin"))


def _fetch(shard: RemoteShard, url: str, staging: Path, out: Path, stop: threading.Event) -> ShardFacts:
    """Bring one shard into `out`, whole and verified, resuming from what `staging` has of it."""
    path = staging / shard.name

    def fetch() -> ShardFacts:
        if os.path.lexists(path) and not (
            path.is_file() and not path.is_symlink() and path.stat().st_size <= shard.size
        ):
            path.unlink()
        try:
            _download(url, path, shard.size, stop)
            return _verify(path, shard)
        except (OSError, ShardError) as fault:
            if not isinstance(fault, ConnectionError) and _status(fault) is None:  # whole, but not what it should be
                path.unlink(missing_ok=True)
            raise

    facts = _attempt(fetch, shard.name, stop, lambda: path.stat().st_size if path.exists() else 0)
    path.replace(out / shard.name)
    sync_folder(out)
    return facts


def _download(url: str, path: Path, size: int, stop: threading.Event) -> None:
    """Bring what is missing of a file of `size` bytes, and put it on the disk. OSError for a body of another size."""
    have = path.stat().st_size if path.exists() else 0
    if have < size:
        with _answer(url, have) as response, open(path, "ab") as file:
            if have and response.status_code == 200:  # the server knows no ranges
                file.truncate(0)
                have = 0
            for piece in _pieces(response, size - have, stop):
                file.write(piece)
            have = file.tell()
            file.flush()
            os.fsync(file.fileno())
    if have < size:
        raise ConnectionError(f"it ended after {have:,} of {size:,} bytes")


@contextmanager
def _answer(url: str, start: int = 0) -> Iterator[Any]:
    """The hub's answer, from byte `start` on, its body not read yet."""
    hub = _hub("utils")
    headers = hub.build_hf_headers() | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    patience = {"timeout": _hub("constants").HF_HUB_DOWNLOAD_TIMEOUT, "retry_on_exceptions": ()}
    with _hub("utils._http").http_stream_backoff(
        "GET", url, headers=headers, retry_on_status_codes=(408, 429), **patience
    ) as response:
        hub.hf_raise_for_status(response)
        yield response


def _pieces(response: Any, most: int, stop: threading.Event | None = None) -> Iterator[bytes]:
    """The body, piece by piece. OSError once it is more than `most` bytes, ConnectionError if it trickles."""
    got, since, since_then = 0, time.monotonic(), 0
    for piece in response.iter_raw():
        if stop is not None and stop.is_set():
            raise _Stopped
        got, since_then = got + len(piece), since_then + len(piece)
        if got > most:
            raise OSError(f"it sends more than the {most:,} bytes that there should be")
        if (passed := time.monotonic() - since) > STALL_S:
            if since_then < SLOWEST_BYTES_S * passed:
                raise ConnectionError(f"stalled: {since_then:,} bytes in {passed:.0f} s")
            since, since_then = time.monotonic(), 0
        yield piece


def _attempt(
    work: Callable[[], _T],
    what: str,
    stop: threading.Event | None = None,
    progress: Callable[[], int] = lambda: 0,
) -> _T:
    """The result of `work`, tried up to ATTEMPTS times in a row without progress; FetchError for the last failure.

    progress: bytes that are there. A failure that asking again does not change ends it at once.
    """
    failures, before = 0, progress()
    while True:
        try:
            return work()
        except (_Stopped, UserError) as fault:
            if not isinstance(fault, ShardError):
                raise
            last: Exception = fault
        except Exception as fault:  # huggingface_hub's, its HTTP library's or the operating system's
            last = fault
        there = progress()
        failures, before = (1 if there > before + _ENOUGH_BYTES else failures + 1), max(there, before)
        if _status(last) in _FINAL or isinstance(last, PermissionError) or _is_offline(last) or failures == ATTEMPTS:
            raise FetchError(_explain(last, what)) from None
        (stop or threading.Event()).wait(FIRST_WAIT_S * 2 ** (failures - 1))


def _status(fault: BaseException) -> int | None:
    """The HTTP status of a fault."""
    return getattr(getattr(fault, "response", None), "status_code", None)


def _is_offline(fault: BaseException) -> bool:
    return type(fault).__name__ == "OfflineModeIsEnabled"


def _explain(fault: BaseException, what: str) -> str:
    """One line on what happened and what to do."""
    status = _status(fault)
    if isinstance(fault, ShardError):
        return f"{fault} (tried {ATTEMPTS} times)"
    if status in (404, 410):
        return f"{what}: the hub does not have it (HTTP {status}); check --revision and HF_ENDPOINT"
    if status in (401, 403):
        return f"{what}: the hub does not let us have it (HTTP {status}); check HF_TOKEN, or the mirror in HF_ENDPOINT"
    reason = f"HTTP {status}" if status else printable(in_a_line(fault))
    return (
        f"{what}: cannot be fetched from {printable(_hub('constants').ENDPOINT)} ({reason}); check the network, "
        "proxy or HF_ENDPOINT and run this again, or do without: train with --data embedded, or make shards of your own "
        "text with `python scripts/data/text.py`"
    )


# ---------------------------------------------------------------------------------------------------------------------
# huggingface_hub


def _hub(module: str = "") -> Any:
    import_extra("huggingface_hub", "hf_hub_url", "downloading", "data")
    return importlib.import_module(f"huggingface_hub.{module}".rstrip("."))


def _url(repository: str, name: str, commit: str) -> str:
    return _hub().hf_hub_url(repository, name, repo_type="dataset", revision=commit)


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep huggingface_hub from telling of every retry."""
    logging = _hub("utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
