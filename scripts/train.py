"""The same command as the train.py above this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from speedrun_mup.cli import guarded, run_train

if __name__ == "__main__":
    sys.exit(guarded(lambda: run_train(sys.argv[1:], prog="scripts/train.py")))
