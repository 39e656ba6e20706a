"""Kill `data text` with SIGKILL at random moments, start it again, and compare the shards with those of an unbroken run.

    python tests/helpers/kill_tokenize.py --kills 20 --seed 0

Every start is killed after a random time of up to twice what it needs to get going, until as many kills as asked for have
hit it at work; then it may finish. Notes of progress are taken at every chunk, so that many kinds of moments are hit.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from speedrun_mup.data.tokenize_text import chunks, progress
progress.COMMIT_EVERY_S = 0.0
chunks.CHUNK_CHARS = 20_000
from speedrun_mup.cli import main
sys.exit(main(["data", "text", *sys.argv[1:]]))
"""


def write_text(path: Path, documents: int, seed: int) -> None:
    """Documents of random words, some of them equal, as .jsonl."""
    rng = random.Random(seed)
    words = ["spam", "eggs", "naïve", "of", "the", "\n", "speedrun", "漢字", "42"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 400))) for _ in range(documents)]
    texts += rng.choices(texts, k=documents // 10)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def compare(folder: Path, kills: int, seed: int, documents: int) -> int:
    """Run both; returns how many starts were killed at work. Raises AssertionError unless all bytes are equal."""
    rng = random.Random(seed)
    write_text(folder / "text.jsonl", documents, seed)
    flags = ["--tokenizer", "byte", "--shard-tokens", "50000", "--drop-duplicates", "--val-share", "0.1"]

    def start(out: str, workers: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", START, "text.jsonl", "--out", out, *flags, "--workers", str(workers)]
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)

    assert start("whole", 1).wait() == 0
    hits = 0
    while not (folder / "broken" / "corpus.json").exists():
        process = start("broken", rng.randint(1, 4))
        progress = folder / "broken" / ".unfinished" / "progress.json"
        while not progress.exists() and process.poll() is None:
            time.sleep(0.005)
        before = progress.read_bytes() if progress.exists() else b""
        while hits < kills and process.poll() is None:  # at work as soon as the note changes
            if progress.exists() and progress.read_bytes() != before:
                time.sleep(rng.random() * 0.2)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        hits += process.wait() == -signal.SIGKILL
    assert contents(folder / "whole") == contents(folder / "broken")
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hits = compare(Path(folder), arguments.kills, arguments.seed, arguments.documents)
    print(f"{hits} kills; all files equal those of the unbroken run")


if __name__ == "__main__":
    main()
