#!/bin/sh
# Every toy host that ships, untuned, after plain tuning and after Lavender, over three seeds, in one table.
# Stopped or killed, it goes on where it was. HOSTS names some only.
set -eu
cd "$(dirname "$0")/.."
. experiments/flags.sh
PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1
OUT=${OUT:-runs/hosts}
HOSTS=${HOSTS:-$(cd lavender_min/toy/models && ls -d -- */ | tr -d / | grep -v "^sd$")}

# shellcheck disable=SC2086
python extract.py --data toy $MAPS
for host in $HOSTS; do
    python evaluate.py --data toy --scenes 100 --seeds 3 --extract "$MAPS" --out "$OUT/$host" \
        --train "--vlm lavender_min/toy/models/$host $TUNING"
done
for host in $HOSTS; do set -- "$@" "$OUT/$host"; done
python -m lavender_min.evaluation.side_by_side "$@"
