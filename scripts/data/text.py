"""Any text to shards: the same command as `speedrun-mup data text`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from speedrun_mup.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["data", "text", *sys.argv[1:]]))
