#!/usr/bin/env bash
# Make one set of artifacts with the code of an old commit:  make.sh CHECKOUT PYTHON FOLDER
set -euo pipefail
mkdir -p "$3" && cd "$3" && ln -s "$1" code
export PYTHONPATH=$1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
model="--head-dim 8 --base-width 8 --data synthetic --micro-batch-tokens 64 --micro-batches 2 --val-tokens 4096"

# A run that is interrupted (Ctrl-C) after its second checkpoint, and what the same code makes of the rest.
"$2" code/train.py --device cpu --width 16 --mup $model --iterations 40 --val-every 10 --save-every 8 --seed 3 \
  --weight-decay 0.1 --no-progress --out . --name run > /dev/null & run=$!
until [ -e run/checkpoints/step-00000016 ]; do sleep 0.01; done
kill -INT $run; wait $run || true
ls run/checkpoints | head -n -1 | while read -r older; do rm -r "run/checkpoints/$older"; done
rm -f run/.lock run/loss.png
cp -r run continued
"$2" code/train.py --resume continued --no-progress > /dev/null
mv continued/metrics.jsonl expected.jsonl && rm -r continued

# A sweep: two widths, three learning rates, one seed. Its report is a table of its runs.
"$2" -m speedrun_mup sweep --widths 16 32 --octaves -1 0 1 --seeds 1 --arms mup adam-sp --iterations 4 $model --device cpu \
  --workers 1 --no-adaptive --no-progress --out sweep > /dev/null || [ $? = 1 ]
find sweep -name '.lock' -delete -o -name '*.png' -delete

"$2" -m speedrun_mup coord-check --widths 16 32 64 --steps 4 --seeds 1 --tokens 64 --head-dim 8 --base-width 16 --mup \
  --data synthetic --no-progress --out . --name coord-check > /dev/null || [ $? = 1 ]
rm -f coord-check/*.png code
tar -cJf "../$(basename "$3").tar.xz" ./*
