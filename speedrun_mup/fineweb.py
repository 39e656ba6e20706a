"""FineWeb as tokens: downloads modded-nanogpt's ready-made GPT-2 shards from the Hugging Face hub, and checks them.

A shard is fetched into DIR/.download, where a later run goes on with it, and moved beside the others only when its size,
header, ids and SHA-256 are right. So a file that has a shard's name is whole. The hub's address, token and proxies are what
huggingface_hub makes of HF_ENDPOINT, HF_TOKEN and the rest.
"""

from __future__ import annotations

import importlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from speedrun_mup.core.errors import ConfigError, UserError, in_a_line
from speedrun_mup.shards import (
    GPT2_BOS,
    GPT2_VOCAB,
    HEADER_BYTES,
    MANIFEST,
    Corpus,
    ShardError,
    ShardFacts,
    measure_shard,
    open_corpus,
    sole_writer,
    write_manifest,
)

REPOSITORIES = {
    "10B": "kjj0/fineweb10B-gpt2",
    "100B": "kjj0/fineweb100B-gpt2",
    "edu": "kjj0/finewebedu10B-gpt2",
}
ATTEMPTS = 4
FIRST_WAIT_S = 2.0  # doubled after every failed attempt
_FINAL = (401, 403, 404, 410)  # answers that asking again does not change

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
    fetched stays, and the next call goes on with it.
    """
    if workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    repository = REPOSITORIES[dataset]
    with _quiet_hub():
        print(f"asking {_hub('constants').ENDPOINT} for the shards of {repository}")
        commit, available = _attempt(lambda: list_shards(repository, revision), repository)
        chosen = choose_shards(available, tokens, repository)
        with sole_writer(out):
            facts = _known_facts(out, chosen)
            missing = [shard for shard in chosen if shard.name not in facts]
            print(
                f"{len(chosen)} shards, {sum(shard.size for shard in chosen) / 1e9:.2f} GB, at {commit[:12]}, in {out}; "
                f"{len(missing)} to fetch"
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
    """The commit that `revision` names now, and the shards it has, sorted. Raises what huggingface_hub raises."""
    api = _hub().HfApi()
    commit = api.dataset_info(repository, revision=revision).sha
    files = api.list_repo_tree(repository, repo_type="dataset", revision=commit)
    shards = [
        RemoteShard(file.path, file.size, file.lfs.sha256 if file.lfs else "")
        for file in files
        if re.fullmatch(r"[^/]*_(train|val)_\d+\.bin", file.path)
    ]
    return commit, sorted(shards, key=lambda shard: shard.name)


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
    staging.mkdir(exist_ok=True)
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
    """Bring one shard into `out`, whole and verified, going on with what `staging` has of it."""
    path = staging / shard.name

    def fetch() -> ShardFacts:
        if path.exists() and path.stat().st_size > shard.size:
            path.unlink()
        try:
            with open(path, "ab") as file:
                _hub("file_download").http_get(
                    url,
                    file,
                    resume_size=file.tell(),
                    headers=_hub("utils").build_hf_headers(),
                    expected_size=shard.size,
                    tqdm_class=_stoppable_bar(stop),
                )
            return _verify(path, shard)
        except (OSError, ShardError) as fault:
            if not isinstance(fault, ConnectionError) and _status(fault) is None:  # whole, but not what it should be
                path.unlink(missing_ok=True)
            raise

    facts = _attempt(fetch, shard.name, stop)
    path.replace(out / shard.name)
    return facts


def _stoppable_bar(stop: threading.Event) -> type[tqdm]:
    """A bar that shows nothing and ends its download once `stop` is set."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise _Stopped

    return Bar


def _attempt(work: Callable[[], _T], what: str, stop: threading.Event | None = None) -> _T:
    """The result of `work`, tried up to ATTEMPTS times; FetchError for the last failure, or at once for a final one."""
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except _Stopped:
            raise
        except (
            Exception
        ) as fault:  # huggingface_hub's, its HTTP library's, the operating system's, or a damaged shard's
            last = fault
        if _status(last) in _FINAL or isinstance(last, PermissionError) or _is_offline(last):
            break
        if attempt < ATTEMPTS - 1:
            (stop or threading.Event()).wait(FIRST_WAIT_S * 2**attempt)
    raise FetchError(_explain(last, what)) from None


def _status(fault: BaseException) -> int | None:
    """The HTTP status that a fault tells of."""
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
    reason = f"HTTP {status}" if status else in_a_line(fault)
    return (
        f"{what}: cannot be fetched from {_hub('constants').ENDPOINT} ({reason}); check the network, proxy or HF_ENDPOINT and "
        "run this again, or do without: train with --data embedded, or make shards of your own text with "
        "`python scripts/data/text.py`"
    )


# ---------------------------------------------------------------------------------------------------------------------
# huggingface_hub


def _hub(module: str = "") -> Any:
    try:
        return importlib.import_module(f"huggingface_hub.{module}".rstrip("."))
    except ImportError:
        raise ConfigError("downloading needs huggingface_hub; pip install 'speedrun-mup[data]'") from None


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
