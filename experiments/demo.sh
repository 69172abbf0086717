#!/bin/sh
# The whole way on the toy world, in the order a real run has: maps, plain tuning, Lavender tuning, report.
# Needs no GPU, no network and no download. `make demo` runs it in the project's own environment.
set -eu
cd "$(dirname "$0")/.."
. experiments/flags.sh
PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1
OUT=${OUT:-runs/demo}

say() { printf '\n== %s\n' "$*"; "$@"; }

# shellcheck disable=SC2086
say python extract.py --data toy $MAPS

# Three runs at once, a thread each: plain tuning, the paper's default, and what pointed best in trust.sh for no fewer answers.
runs=
tune() {
    folder="$OUT/$1" && shift
    # shellcheck disable=SC2086
    (export OMP_NUM_THREADS=1; say python train.py --data toy --output_dir "$folder" "$@" $TUNING --disable_tqdm true) &
    runs="$runs $!"
}
tune plain-0 --plain
tune lavender-0
# shellcheck disable=SC2086
tune direct-0 $DIRECT $TRUST
for run in $runs; do wait "$run"; done

say python evaluate.py --data toy --scenes 60 --extract "$MAPS" --out "$OUT" \
    --plain "$OUT/plain-0" --lavender "$OUT/lavender-0" "$OUT/direct-0"
