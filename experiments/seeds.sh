#!/bin/sh
# The demo's comparison over three seeds, for the default and for alignment without networks: README, "Three seeds".
# A quarter of an hour on 2 cores. Stopped or killed, it goes on where it was. `make seeds` runs it.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1
OUT=${OUT:-runs/seeds}

TUNING="--qlora --lora_targets language --lora_r 16 --lora_alpha 32 --learning_rate 1e-3 --per_device_train_batch_size 16
        --num_train_epochs 4 --lr_scheduler_type cosine --logging_steps 32 --save_strategy epoch"
MAPS="--recipe noise --timesteps 151 --resolutions 16:1 --batch_size 32"

# shellcheck disable=SC2086
python extract.py --data toy $MAPS
python evaluate.py --data toy --scenes 100 --seeds 3 --train "$TUNING" --extract "$MAPS" --out "$OUT"
for seed in 0 1 2; do
    # shellcheck disable=SC2086
    python train.py --data toy --seed $seed --aggregate layer-mean --aligner none --output_dir "$OUT-direct/lavender-$seed" $TUNING
done
python evaluate.py --data toy --scenes 100 --extract "$MAPS" --out "$OUT-direct" \
    --plain "$OUT/plain-0" "$OUT/plain-1" "$OUT/plain-2" \
    --lavender "$OUT-direct/lavender-0" "$OUT-direct/lavender-1" "$OUT-direct/lavender-2"
