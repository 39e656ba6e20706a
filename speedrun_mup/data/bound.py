"""Binding files to the SHA-256 that a manifest gives them, when they are first read, without keeping the reader waiting."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import open_regular

AT_ONCE = 2**24  # bytes of a file that is hashed before its first token is used; larger ones are in the background
_SETTLED_NS = 2 * 10**9  # a file that changed more recently may change again within the clock's resolution


def cache_folder() -> Path:
    """Where this package keeps what it writes by itself. Raises ConfigError where no home folder is known."""
    if folder := os.environ.get("SPEEDRUN_MUP_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder, "speedrun-mup")
    try:
        return Path.home() / ".cache" / "speedrun-mup"
    except RuntimeError:
        raise ConfigError("this user has no home folder; set SPEEDRUN_MUP_CACHE to a folder to write to") from None


@dataclass(frozen=True)
class Identity:
    """What of a file on disk changes whenever its content does, as far as the file system shows it."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, facts: os.stat_result) -> Identity:
        """From the result of `os.stat` or `os.fstat`."""
        return cls(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


class Check:
    """Whether a file is the one that its manifest means; answered at once, or later by the thread that hashes files.

    What was found right is noted in the cache folder, so that a file is hashed again only if it has changed.

    Args:
        path: of the file.
        identity: of the file that is read.
        sha256: that the file must have.
        wrong: makes the error from what was found instead.
    """

    def __init__(self, path: Path, identity: Identity, sha256: str, wrong: Callable[[str], Exception]):
        self._path, self._identity, self._sha256, self._wrong = path, identity, sha256, wrong
        self._done = threading.Event()
        self._fault: Exception | None = None
        self._note = self._find_note() if identity.size > AT_ONCE else None
        if identity.size <= AT_ONCE:
            self.compare()
        elif self._note and self._note.exists():
            self._done.set()
        else:
            _Hashing.of_this_process().put(self)

    def compare(self) -> None:
        """Hash the file and come to a verdict."""
        began = time.time_ns()
        try:
            found = self._digest()
        except OSError as fault:
            found = f"nothing that can be read ({fault.strerror})"
        if found != self._sha256:
            self._fault = self._wrong(found)
        elif self._note and began - self._identity.changed_ns > _SETTLED_NS:
            with contextlib.suppress(OSError):  # it would save time, no more
                self._note.parent.mkdir(parents=True, exist_ok=True)
                self._note.touch()
        self._done.set()

    def _digest(self) -> str:
        digest = hashlib.sha256()
        with open_regular(self._path) as file:
            if Identity.of(os.fstat(file.fileno())) != self._identity:
                return "none, as the file was replaced"
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def verdict(self, wait: bool = False) -> bool:
        """True once the file is known to be right; raises the error once it is known to be wrong."""
        if wait:
            self._done.wait()
        if not self._done.is_set():
            return False
        if self._fault:
            raise self._fault
        return True

    def _find_note(self) -> Path | None:
        """An empty file whose name says which file was right."""
        try:
            folder = cache_folder() / "checked"
        except ConfigError:
            return None
        name = repr((os.path.realpath(self._path), self._identity, self._sha256))
        return folder / hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()


class _Hashing:
    """The thread that hashes files; a daemon, because a process that ends need not know the answer."""

    _one: _Hashing | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.process = os.getpid()
        self._queue: queue.SimpleQueue[Check] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="hashing", daemon=True).start()

    @classmethod
    def of_this_process(cls) -> _Hashing:
        """The one there is; a forked process gets its own."""
        with cls._lock:
            if cls._one is None or cls._one.process != os.getpid():
                cls._one = cls()
            return cls._one

    def put(self, check: Check) -> None:
        """Hash a file some time soon."""
        self._queue.put(check)

    def _work(self) -> None:
        while True:
            self._queue.get().compare()
