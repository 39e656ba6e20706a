"""What is done of a text, as progress.json has it, so that a killed process is resumed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speedrun_mup.core.errors import UserError
from speedrun_mup.data.documents import Position
from speedrun_mup.data.external_sort import Piece, PieceFacts, write_piece
from speedrun_mup.data.shards import ShardFacts, digest_of, file_sha256
from speedrun_mup.data.sources import Source
from speedrun_mup.data.tokenize_text.chunks import Counts, Encoded, Step, sort_keys
from speedrun_mup.data.tokenize_text.job import PARTS, Job, TextSettings, other_corpus
from speedrun_mup.files import printable, read_json, sync_folder, write_whole

PROGRESS, SOURCES = "progress.json", "sources.json"
COMMIT_EVERY_S = 10.0


@dataclass
class Progress:
    """What is done in a folder, as progress.json has it.

    is_read: the text is at its end. text_changed: since it was read. trained_on: a hash of the text that the tokenizer
    comes from. shards: the finished ones of every part, with the documents in each.
    """

    directory: Path
    identity: str
    steps: list[Step] = field(default_factory=list)
    is_read: bool = False
    text_changed: bool = False
    trained_on: str = ""
    shards: dict[str, dict[str, tuple[ShardFacts, int]]] = field(default_factory=lambda: {part: {} for part in PARTS})
    _synced: int = 0  # how many steps have their pieces on the disk
    _noted_at: float = -math.inf

    def save_if_due(self) -> None:
        """Write down how far it is, unless that was done some seconds ago."""
        if time.monotonic() - self._noted_at >= COMMIT_EVERY_S:
            self.save()

    def save(self) -> None:
        """Bring the pieces to the disk, then write down how far it is. Shards must be on the disk already."""
        for number in range(self._synced, len(self.steps)):
            for part, facts in self.steps[number].pieces.items():
                Piece(self._piece(number, part), facts).sync()
        self._synced = len(self.steps)
        noted = {
            "identity": self.identity,
            "is_read": self.is_read,
            "trained_on": self.trained_on,
            "steps": [
                [*step[:-1], {part: dataclasses.asdict(facts) for part, facts in step.pieces.items()}]
                for step in self.steps
            ],
            "shards": {
                part: {name: [dataclasses.asdict(facts), documents] for name, (facts, documents) in shards.items()}
                for part, shards in self.shards.items()
            },
        }
        sync_folder(self.directory)
        write_whole(self.directory / PROGRESS, json.dumps({"noted": noted, "sha256": digest_of(noted)}))
        self._noted_at = time.monotonic()

    @classmethod
    def restore(cls, directory: Path, job: Job) -> Progress:
        """What was noted, as far as its files are whole and the text before the note is the same.

        ConfigError if another command began this folder.
        """
        work = cls(directory, job.identity)
        if (directory / PROGRESS).exists():
            try:
                saved = read_json(directory / PROGRESS, "", most=2**31)
                if saved["sha256"] != digest_of(saved["noted"]):
                    raise ValueError
                work._load(saved["noted"])
            except (UserError, KeyError, TypeError, ValueError, AttributeError):
                print(f"{printable(directory / PROGRESS)} is damaged; starting from the beginning")
                work = cls(directory, job.identity)
        if work.identity != job.identity:
            raise other_corpus(directory)
        work._drop_stale(job)
        kept = {piece.path.name for part in PARTS for piece in work.pieces(part)}
        for path in directory.glob("*.piece"):
            if path.name not in kept:
                path.unlink()
        return work

    def _load(self, noted: Any) -> None:
        self.identity, self.is_read, self.trained_on = (
            str(noted["identity"]),
            noted["is_read"] is True,
            noted["trained_on"],
        )
        for end, documents, chain, tally, pieces in noted["steps"]:
            facts = {part: PieceFacts(**piece) for part, piece in pieces.items()}
            self.steps.append(
                Step(Position(*map(int, end)), int(documents), int(chain), Counts(*map(int, tally)), facts)
            )
        self._synced = len(self.steps)
        for part in PARTS:
            for name, (facts, documents) in noted["shards"][part].items():
                self.shards[part][name] = ShardFacts(**facts), int(documents)

    def _drop_stale(self, job: Job) -> None:
        """Forget what does not hold: from the first source that changed, or the first file that is not whole."""
        try:
            noted = [Source(*source) for source in read_json(self.directory / SOURCES, "", most=2**31)]
        except (UserError, TypeError):
            noted = []
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(noted, job.sources)))
        self.text_changed = not same == len(noted) == len(job.sources)
        before = [step for step in self.steps if step.end <= Position(same, 2**62)]
        if self.text_changed and self.steps:
            print(f"the text has changed from its source {same + 1:,} on; reading that again")
        self.forget(len(before), even_if_read=self.text_changed)
        for number, step in enumerate(self.steps):
            if not all(Piece(self._piece(number, part), facts).is_whole() for part, facts in step.pieces.items()):
                print(
                    f"{printable(self.directory)}: damaged after document {self._documents_at(number):,}; reading on there"
                )
                self.forget(number)
                break
        for part in PARTS:
            for number, (name, (facts, _)) in enumerate(list(self.shards[part].items())):
                path = self.directory / name
                if not path.is_file() or file_sha256(path) != facts.sha256:
                    self.shards[part] = dict(list(self.shards[part].items())[:number])
                    break

    def forget(self, steps: int, even_if_read: bool = True) -> None:
        """Take back all but the first `steps`, and with them the shards, which hold something of each."""
        if steps < len(self.steps) or (even_if_read and self.is_read):
            self.is_read, self.shards = False, {part: {} for part in PARTS}
        del self.steps[steps:]
        self._synced = min(self._synced, steps)

    def _documents_at(self, number: int) -> int:
        return self.steps[number - 1].documents if number else 0

    def _piece(self, number: int, part: str) -> Path:
        return self.directory / f"{part}_{number:06d}.piece"

    def pieces(self, part: str) -> list[Piece]:
        """The pieces of a part, in the order of the text."""
        return [
            Piece(self._piece(number, part), step.pieces[part])
            for number, step in enumerate(self.steps)
            if part in step.pieces
        ]

    def facts(self, part: str) -> dict[str, ShardFacts]:
        """Of all finished shards of a part."""
        return {name: facts for name, (facts, _) in self.shards[part].items()}

    def add(self, read: Sequence[Encoded], settings: TextSettings, is_end: bool) -> None:
        """Write what was read as pieces, and note it."""
        pieces = {}
        for part in PARTS:
            rows = [row for one in read for row in one.rows if row.is_val == (part == "val")]
            if rows:
                _, digests, numbers, records = zip(*rows)
                path = self._piece(len(self.steps), part)
                pieces[part] = write_piece(path, sort_keys(digests, numbers, settings), digests, records).facts
        if read:
            last = read[-1].chunk
            self.steps.append(Step(last.end, last.read, last.chain, read[-1].tally, pieces))
        self.is_read = is_end
        self.save_if_due()
