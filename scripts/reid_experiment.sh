#!/usr/bin/env bash
# Does the pre-training help re-identification? TransReID on the drawn set in VeRi-776's layout, from a CGD-MAE encoder, from
# plain MAE and from random weights, the same epochs and seeds. docs/RESULTS.md has the outcome.
# Usage: [SEEDS="0 1 2"] [ROWS="cgd mae random"] [EPOCHS=20] bash scripts/reid_experiment.sh OUTPUT
# A stopped run goes on, a finished one is only scored again; with another EPOCHS it refuses, so take another OUTPUT.
set -euo pipefail
output="$(realpath -m "${1:?output folder}")"
mkdir -p "$output"
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
epochs="${EPOCHS:-20}"

# pre-training sees other vehicles than the test, and no labels; the teacher has learned from the same pictures' captions
"$python" -m datasets.demo --output "$output/pictures" --num_images 3000 --size 96 --seed 1 --val_ratio 0
if [ ! -f "$output/teacher/texts.txt" ]; then
    "$python" -m tools.train_teacher --data_path "$output/pictures/labels.csv" --caption_column short_caption \
        --output "$output/teacher" --epochs 8
fi
"$python" -m datasets.demo_reid --output "$output/veri" --layout veri776 --size 96 --train_ids 60 --test_ids 40 --seed 0
teacher=(--clip_model "$output/teacher/MiniCLIP.json" --clip_pretrained "$output/teacher/weights.safetensors")

pretrain() {  # NAME FLAGS...
    local name="$1"
    shift
    if [ -f "$output/$name/encoder.safetensors" ]; then return; fi
    "$python" main_pretrain.py --data_path "$output/pictures/images" --output_dir "$output/$name" --resume auto \
        --model mae_vit_tiny_patch16 --input_size 96 --batch_size 32 --epochs 20 --warmup_epochs 3 --blr 4e-3 \
        --norm_pix_loss --crop_min 0.5 --vis_epochs 0 --num_workers 1 "$@"
}

for row in ${ROWS:-cgd mae random}; do
    case "$row" in
        cgd) pretrain cgd "${teacher[@]}"; start=(--finetune "$output/cgd/encoder.safetensors") ;;
        mae) pretrain mae --no_distill; start=(--finetune "$output/mae/encoder.safetensors") ;;
        random) start=(--model vit_tiny_patch16) ;;
        *) echo "row '$row': choose cgd, mae or random" >&2; exit 2 ;;
    esac
    for seed in ${SEEDS:-0 1 2}; do
        echo "== $row, seed $seed"
        "$python" main_finetune.py --task reid --data_path "$output/veri" --output_dir "$output/${row}_$seed" --seed "$seed" \
            --resume auto "${start[@]}" --input_size 96 --batch_size 32 --epochs "$epochs" --warmup_epochs 3 --opt adamw \
            --lr 5e-4 --weight_decay 0.05 --bias_lr_factor 1 --jpm --jpm_shift 5 --num_workers 1
    done
    if [ "$row" != random ] && [ ! -f "$output/${row}_as_is/metrics.json" ]; then  # before any label
        "$python" main_finetune.py --task reid --eval --data_path "$output/veri" --output_dir "$output/${row}_as_is" \
            --input_size 96 "${start[@]}"
    fi
done
for row in ${ROWS:-cgd mae random}; do
    "$python" - "$row" "$output" <<'PY'
import json, statistics, sys
from pathlib import Path
row, folder = sys.argv[1], Path(sys.argv[2])
runs = [json.loads(f.read_text()) for f in sorted(folder.glob(f"{row}_[0-9]*/metrics.json"))]
print(row, {name: [round(100 * run[name], 1) for run in runs] + [f"mean {100 * statistics.mean(run[name] for run in runs):.1f}"]
            for name in ("mAP", "R1", "R5")})
PY
done
