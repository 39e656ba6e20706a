"""Records sorted on disk: as `sorted` would, whatever the pieces and the blocks, from any record on, and never trusted."""

import itertools
import random
import resource
from pathlib import Path

import numpy as np
import pytest

from speedrun_mup.data.external_sort import Merge, Piece, SortedBlock, write_piece


def make(folder: Path, rows: list[tuple[int, bytes]], cuts: list[int]) -> list[Piece]:
    pieces = []
    for number, (start, stop) in enumerate(itertools.pairwise([0, *cuts, len(rows)])):
        keys = np.array([key for key, _ in rows[start:stop]], np.uint64)
        records = [record for _, record in rows[start:stop]]
        tags = [bytes([key % 251]) * 16 for key, _ in rows[start:stop]]
        pieces.append(write_piece(folder / f"{number}.piece", keys, tags, records))
    return pieces


def unpacked(blocks: list[SortedBlock]) -> list[bytes]:
    records = []
    for block in blocks:
        cuts = [0, *np.cumsum(block.sizes).tolist()]
        assert cuts[-1] == len(block.data)
        records += [block.data[a:b] for a, b in itertools.pairwise(cuts)]
    return records


def rows_of(kind: str) -> list[tuple[int, bytes]]:
    rng = random.Random(7)
    keys = {
        "random": [rng.getrandbits(64) for _ in range(500)],
        "in order": list(range(500)),
        "equal": [5] * 500,
        "few": [rng.choice([1, 2**64 - 1, 0]) for _ in range(500)],
    }[kind]
    return [(key, rng.randbytes(rng.choice([0, 2, 40, 2000]))) for key in keys]


@pytest.mark.parametrize("kind", ["random", "in order", "equal", "few"])
def test_as_sorted_would(tmp_path: Path, kind: str) -> None:
    rows = rows_of(kind)
    pieces = make(tmp_path, rows, [3, 200, 333])
    right = [record for _, record in sorted(rows, key=lambda row: row[0])]
    for block_bytes in 1, 5000, 10**7:
        blocks = list(Merge(pieces, block_bytes).blocks(0))
        assert unpacked(blocks) == right
        assert len(blocks) == 1 or block_bytes < 10**7
        for skip in 1, 77, 499, 500:
            assert unpacked(list(Merge(pieces, block_bytes).blocks(skip))) == right[skip:]
            sizes = [size for some in Merge(pieces, block_bytes).sizes(skip) for size in some.tolist()]
            assert sizes == list(map(len, right[skip:]))
    assert all(piece.is_whole() for piece in pieces)
    assert list(pieces[0].tags()) == [bytes([key % 251]) * 16 for key, _ in sorted(rows[:3], key=lambda row: row[0])]


@pytest.mark.parametrize("kind", ["random", "in order"])
def test_blocks_stay_near_their_size(tmp_path: Path, kind: str) -> None:
    """Where large records come last, too."""
    rng = random.Random(1)
    keys = [rng.getrandbits(64) for _ in range(4000)] if kind == "random" else list(range(4000))
    rows = [(key, bytes(10 if number < 3000 else 1000)) for number, key in enumerate(keys)]
    blocks = list(Merge(make(tmp_path, rows, list(range(200, 4000, 200))), 50_000).blocks(0))
    assert len(blocks) > 15 and max(len(block.data) for block in blocks) < 75_000


def test_damage_is_seen(tmp_path: Path) -> None:
    (piece,) = make(tmp_path, rows_of("random"), [])
    content = piece.path.read_bytes()
    for damaged in content[:-1], content + b"\0", content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]:
        piece.path.write_bytes(damaged)
        assert not piece.is_whole()
    piece.path.unlink()
    assert not piece.is_whole()


def test_many_pieces_need_few_open_files(tmp_path: Path) -> None:
    rows = rows_of("random")
    pieces = make(tmp_path, rows, list(range(1, 500, 2)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
    try:
        found = unpacked(list(Merge(pieces, 10**6).blocks(0)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == [record for _, record in sorted(rows)]
