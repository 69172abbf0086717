#!/bin/sh
# The README's table of which card fits which host: the peak of a training step at batch 1, as `train.py --plan` computes it, and the
# smallest card that holds it. Nothing is loaded, and no GPU runs. `sh experiments/plans.sh MODEL …` plans these models only.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1

[ $# -gt 0 ] || set -- \
    meta-llama/Llama-3.2-11B-Vision-Instruct \
    Qwen/Qwen2-VL-7B-Instruct Qwen/Qwen2.5-VL-3B-Instruct Qwen/Qwen2.5-VL-7B-Instruct Qwen/Qwen3-VL-8B-Instruct \
    HuggingFaceTB/SmolVLM2-2.2B-Instruct \
    llava-hf/llava-1.5-7b-hf llava-hf/llava-v1.6-mistral-7b-hf llava-hf/llava-onevision-qwen2-7b-ov-hf \
    google/gemma-3-4b-it google/paligemma-3b-mix-224 OpenGVLab/InternVL3-8B-hf

echo "| host | QLoRA | LoRA | every weight | its largest picture |"
echo "|---|---|---|---|---|"
for vlm in "$@"; do
    row="| $vlm |"
    for mode in qlora lora full; do
        plan=$(python train.py --vlm "$vlm" "--$mode" --plan)
        row="$row $(echo "$plan" | awk '
            /^peak/ { match($0, /[0-9.]+ GiB/); peak = sprintf("%.1f GiB", substr($0, RSTART, RLENGTH - 4)) }
            / fits,/ && !card { card = $1 " " $2 " " $3 }
            END { print peak ", " (card ? card : "none of them") }') |"
    done
    echo "$row $(echo "$plan" | sed -n '1s/.*each a word), \(.*\), activations checkpointed.*/\1/p') |"
done
