#!/bin/sh
# Does a map's contrast tell whether it is right, and does it help to weigh words by it? First the calibration of every recipe, on the
# scenes that train. Then tuning over five seeds, plain and with the host's own maps pulled by words that all count alike, by contrast,
# or by those of a contrast of at least 0.6 alone. Stopped or killed, it goes on where it was.
set -eu
cd "$(dirname "$0")/.."
. experiments/flags.sh
PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1
OUT=${OUT:-runs/trust}

# shellcheck disable=SC2086
python extract.py --data toy $MAPS
calibrated="maps/toy"
for recipe in noise invert paper null-text; do
    # Null-text takes a second a picture: a quarter of the texts will do.
    limit=$([ $recipe = null-text ] && echo 256 || echo 1024)
    for layers in all 16; do
        maps=maps/toy-$recipe-$layers
        # shellcheck disable=SC2046
        python extract.py --data toy --recipe $recipe --maps $maps --limit "$limit" --batch_size 32 \
            $([ $layers = all ] || echo --resolutions $layers:1)
        calibrated="$calibrated $maps"
    done
done
# shellcheck disable=SC2086
python -m lavender_min.evaluation.calibration --data toy --out "$OUT/calibration.png" --maps $calibrated

python evaluate.py --data toy --scenes 100 --seeds 5 --train "$DIRECT $TUNING" --extract "$MAPS" --out "$OUT/none"
for trust in contrast threshold:0.6; do
    plain= lavender=
    for seed in 0 1 2 3 4; do
        # shellcheck disable=SC2086
        python train.py --data toy --seed $seed --output_dir "$OUT/$trust/lavender-$seed" --trust $trust $DIRECT $TUNING
        plain="$plain $OUT/none/plain-$seed" lavender="$lavender $OUT/$trust/lavender-$seed"
    done
    # shellcheck disable=SC2086
    python evaluate.py --data toy --scenes 100 --extract "$MAPS" --out "$OUT/$trust" --plain $plain --lavender $lavender
done
python -m lavender_min.evaluation.side_by_side "$OUT/none" "$OUT/contrast" "$OUT/threshold:0.6"
