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
# shellcheck disable=SC2086
say python train.py --data toy --plain --output_dir "$OUT/plain-0" $TUNING
# shellcheck disable=SC2086
say python train.py --data toy --output_dir "$OUT/lavender-0" $TUNING
say python evaluate.py --data toy --scenes 60 --extract "$MAPS" --plain "$OUT/plain-0" --lavender "$OUT/lavender-0" --out "$OUT"
