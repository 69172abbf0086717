#!/bin/sh
# The whole way on the toy world, in the order a real run has: maps, plain tuning, Lavender tuning, report.
# Needs no GPU, no network and no download. `make demo` runs it in the project's own environment.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1
OUT=${OUT:-runs/demo}

say() { printf '\n== %s\n' "$*"; "$@"; }

TUNING="--lora_targets language --lora_r 16 --lora_alpha 32 --learning_rate 1e-3 --per_device_train_batch_size 16
        --num_train_epochs ${EPOCHS:-4} --lr_scheduler_type cosine --logging_steps 32 --save_strategy epoch"

# One plainly noised pass, read at 16², finds words as well as anything here (lavender_min/toy/README.md).
MAPS="--recipe noise --timesteps 151 --resolutions 16:1 --batch_size 32"

# shellcheck disable=SC2086
say python extract.py --data toy $MAPS
# shellcheck disable=SC2086
say python train.py --data toy --qlora --plain --output_dir "$OUT/plain-0" $TUNING
# shellcheck disable=SC2086
say python train.py --data toy --qlora --output_dir "$OUT/lavender-0" $TUNING
say python evaluate.py --data toy --scenes 60 --extract "$MAPS" --plain "$OUT/plain-0" --lavender "$OUT/lavender-0" --out "$OUT"
