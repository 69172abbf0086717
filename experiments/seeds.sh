#!/bin/sh
# The demo's comparison over three seeds, for the default and for alignment without networks (trust.sh has five of the latter).
# A quarter of an hour on 2 cores. Stopped or killed, it goes on where it was. `make seeds` runs it.
set -eu
cd "$(dirname "$0")/.."
. experiments/flags.sh
PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1
OUT=${OUT:-runs/seeds}

# shellcheck disable=SC2086
python extract.py --data toy $MAPS
python evaluate.py --data toy --scenes 100 --seeds 3 --train "$TUNING" --extract "$MAPS" --out "$OUT"
for seed in 0 1 2; do
    # shellcheck disable=SC2086
    python train.py --data toy --seed $seed --output_dir "$OUT-direct/lavender-$seed" $DIRECT $TUNING
done
python evaluate.py --data toy --scenes 100 --extract "$MAPS" --out "$OUT-direct" \
    --plain "$OUT/plain-0" "$OUT/plain-1" "$OUT/plain-2" \
    --lavender "$OUT-direct/lavender-0" "$OUT-direct/lavender-1" "$OUT-direct/lavender-2"
