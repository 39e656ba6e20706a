"""Train record 26 of the modded-nanogpt speedrun at any width, with or without muP.

python train.py                                                        a minute on a CPU; the whole record on CUDA
python train.py --width 768 --iterations 1750
python train.py --mup --width 1024 --base-width 768 --iterations 1750
torchrun --nproc_per_node=8 train.py --mup --width 1024 --base-width 768
"""

import sys

from speedrun_mup.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
