"""Where text comes from: files, folders, standard input and Hugging Face datasets, found always in the same order."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speedrun_mup.core.errors import ConfigError, UserError
from speedrun_mup.files import kind_of, printable

STDIN, HUB = "-", "hf://"
FORMATS = (".txt", ".md", ".jsonl", ".parquet")  # that folders are searched for; a file with another suffix is text
COMPRESSIONS = (".gz", ".zst")
LARGEST_PASSAGE = 2**20  # characters
SKIP = "or leave such documents out with --on-bad-document skip"


_FLAG_OF_TEXT = re.compile(r"[;,] [^;,]*--(?:on-bad-document|field|passage)\b[^;,]*")


def without_flags(fault: Exception) -> str:
    """What a fault of a source says in a command that has no flag of `data text` but --suffix."""
    return _FLAG_OF_TEXT.sub("", str(fault))


class SourceError(UserError):
    """Text that cannot be read: a missing or damaged file, a record without the field, a dataset out of reach."""

    exit_code = 3


@dataclass(frozen=True)
class Source:
    """One file, standard input ("-") or one dataset ("hf://..."). size: bytes, 0 if unknown. changed: time, in ns."""

    name: str
    size: int = 0
    changed: int = 0


def format_of(name: str) -> str:
    """The format of a file, such as ".jsonl", by its name without the compression; "" where that does not show it."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


@dataclass
class Found:
    """What `find_sources` found. left_out: how many files and folders of each kind are not read.

    examples: one of each kind that is not a suffix.
    """

    sources: list[Source] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def leave_out(self, kind: str, name: str | Path) -> None:
        """Count one that is not read."""
        self.left_out[kind] += 1
        self.examples.setdefault(kind, f" ({printable(name)})")

    def add(self, other: Found) -> None:
        """Take over what was found elsewhere."""
        self.sources += other.sources
        self.left_out += other.left_out
        self.examples = other.examples | self.examples

    def pass_over(self, path: Path) -> None:
        """Count one that is not read because of its suffix."""
        ending = "".join(path.suffixes[-2 if path.suffix.lower() in COMPRESSIONS else -1 :]).lower()
        kind = f"*{printable(ending, 12)}" if ending else "without a suffix"
        self.left_out[kind] += 1

    def told(self) -> str:
        """One line about all that was left out and how to have it, "" if nothing was."""
        common = self.left_out.most_common(8)
        kinds = [f"{count:,} {kind}{self.examples.get(kind, '')}" for kind, count in common]
        rest = self.left_out.total() - sum(count for _, count in common)
        advice = "; --suffix reads more as plain text" if any(kind.startswith("*") for kind in self.left_out) else ""
        return ", ".join([*kinds, *([f"{rest:,} more"] if rest else [])]) + advice


def suffix(text: str) -> str:
    """A file suffix as people write it, .py or *.py, in lower case. ConfigError for anything else."""
    matched = re.fullmatch(r"\*?(\.[^./*\s]+)", text)
    if not matched or matched[1].lower() in COMPRESSIONS:
        raise ConfigError(
            f"--suffix {printable(text, 40)}: expected suffixes such as .py .c, without .gz or .zst; put paths before --suffix"
        )
    return matched[1].lower()


def find_sources(
    paths: Sequence[str], out: Path | None = None, skip_bad: bool = False, suffixes: Sequence[str] = ()
) -> Found:
    """The sources that `paths` name, in their order; a folder stands for its text files, sorted, hidden ones left out.

    Links that a folder holds are followed only inside it, and nothing is found twice; what they lead to outside is left
    out and counted, as are files of other kinds. A path that is named is followed wherever it leads, and whatever its suffix:
    it is plain text unless its name says that it holds records.

    Args:
        paths: files, folders, "-" or "hf://...".
        out: a folder that is not looked into, because it is going to be written.
        skip_bad: leave out and count what may not be read, instead of raising.
        suffixes: of files that folders are searched for in addition to those of FORMATS, as plain text; lower case, with the dot.

    Raises:
        SourceError: a path is missing, may not be read or is of another kind, or a folder is without any text.
    """
    found = Found()
    for path in paths:
        if path == STDIN and sys.stdin is None:
            raise SourceError("standard input is closed; name a file, or give it some text")
        if path == STDIN or path.startswith(HUB):
            found.sources.append(Source(path))
        elif os.path.isdir(path):
            inside = Found()
            _Walk(Path(path), inside, out, skip_bad, (*FORMATS, *suffixes)).walk()
            if not inside.sources:
                told = f"; left out: {inside.told()}" if inside.left_out else ""
                wanted = ", ".join([*FORMATS, *suffixes])
                raise SourceError(
                    f"{printable(path)}: no {wanted} file (or {'/'.join(COMPRESSIONS)} of one) in there{told}"
                )
            found.add(inside)
        else:
            found.sources.append(_file(Path(path)))
    return found


class _Walk:
    """Finds the text files in one folder. Every real file and folder is taken at most once, so links cannot loop."""

    def __init__(self, root: Path, found: Found, out: Path | None, skip_bad: bool, formats: Sequence[str]):
        self.root, self.found, self.skip_bad, self.formats = root, found, skip_bad, formats
        self._real_root = os.path.realpath(root)
        self._seen: set[str] = set()
        self._folders_seen: set[tuple[int, int]] = set()
        with contextlib.suppress(OSError, ValueError):  # it need not be there yet
            facts = out.stat() if out else None
            if facts:
                self._folders_seen.add((facts.st_dev, facts.st_ino))
        self._folders: list[Path] = []  # to be looked into
        self._links: list[Path] = []

    def walk(self) -> None:
        """Add what is there to `found`."""
        self._folder(self.root)
        while self._links:  # after the rest: a link to what was found under its own name adds nothing
            links, self._links = sorted(self._links), []
            for link in links:
                self._link(link)
        self.found.sources.sort(key=lambda source: Path(source.name))

    def _folder(self, folder: Path) -> None:
        self._folders.append(folder)
        while self._folders:
            folder = self._folders.pop()
            try:
                facts = folder.stat()
                if (facts.st_dev, facts.st_ino) in self._folders_seen:
                    continue
                self._folders_seen.add((facts.st_dev, facts.st_ino))
                with os.scandir(folder) as entries:
                    names = sorted(entry.name for entry in entries)
            except OSError as fault:
                self._unreadable(folder, fault)
                continue
            for name in names:
                self._entry(folder / name)

    def _entry(self, path: Path) -> None:
        if path.name.startswith("."):
            return
        try:
            mode = path.lstat().st_mode
        except OSError as fault:
            self._unreadable(path, fault)
            return
        if stat.S_ISLNK(mode):
            self._links.append(path)
        elif stat.S_ISDIR(mode):
            self._folders.append(path)
        elif not stat.S_ISREG(mode):
            self.found.leave_out(f"that are {kind_of(mode).removeprefix('a ')}s", path)
        elif format_of(path.name) not in self.formats:
            self.found.pass_over(path)
        else:
            self._take(path)

    def _link(self, path: Path) -> None:
        real = os.path.realpath(path)
        if not os.path.exists(real):
            self.found.leave_out("broken or circular links", path)
        elif os.path.commonpath([real, self._real_root]) != self._real_root:
            self.found.leave_out("links that lead out of the folder", path)
        elif os.path.isdir(real):
            self._folder(path)
        elif real not in self._seen and format_of(path.name) in self.formats and os.path.isfile(real):
            self._take(path)

    def _take(self, path: Path) -> None:
        self._seen.add(os.path.realpath(path))
        try:
            if not os.access(path, os.R_OK):
                raise PermissionError(0, "Permission denied")
            self.found.sources.append(_file(path))
        except OSError as fault:
            self._unreadable(path, fault)

    def _unreadable(self, path: Path, fault: OSError) -> None:
        if not self.skip_bad:
            raise SourceError(f"{printable(path)}: cannot read: {fault.strerror}; check its permissions, {SKIP}")
        self.found.leave_out("that cannot be read", path)


def _file(path: Path) -> Source:
    try:
        found = path.stat()
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise SourceError(f"{printable(path)}: cannot read: {reason}; check the path") from None
    source = Source(str(path), found.st_size, found.st_mtime_ns)
    if not stat.S_ISREG(found.st_mode):
        raise SourceError(f"{printable(path)}: cannot read: it is {kind_of(found.st_mode)}; use - for a stream")
    return source
