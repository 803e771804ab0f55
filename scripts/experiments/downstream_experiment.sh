#!/usr/bin/env bash
# Does the pre-training help downstream? Each task on drawn vehicles, from a CGD-MAE encoder, from plain MAE and from random
# weights, the same epochs and seeds. docs/RESULTS.md has the outcome.
# Usage: [TASKS="reid attr fgvc seg"] [SEEDS="0 1 2"] [ROWS="cgd mae random"] bash scripts/experiments/downstream_experiment.sh OUTPUT [FLAGS of main_finetune.py]
# About 20 minutes of pre-training, then 8 (reid) or 2 minutes a run on one core. A stopped run goes on, a finished one is only
# scored again; with other FLAGS it refuses, so take another OUTPUT.
set -euo pipefail
if (( ! $# )); then
    sed -n 's/^# \(Usage.*\)/\1/p' "$0" >&2
    echo "error: give OUTPUT, a folder" >&2
    exit 2
fi
output="$(realpath -m "$1")"
shift
mkdir -p "$output"
cd "$(dirname "$0")/../.."
python="${PYTHON:-python}"

# pre-training sees other vehicles than the tests, and no labels; the teacher has learned from the same pictures' captions
"$python" -m demo.pool --output "$output/pictures" --num_images 3500 --size 96 --seed 1
if [ ! -f "$output/teacher/texts.txt" ]; then
    "$python" -m tools.train_teacher --data_path "$output/pictures/labels.csv" \
        --output "$output/teacher" --epochs 8
fi
teacher=(--clip_model "$output/teacher/MiniCLIP.json" --clip_pretrained "$output/teacher/weights.safetensors")

pretrain() {  # NAME FLAGS...
    local name="$1"
    shift
    if [ -f "$output/$name/encoder.safetensors" ]; then return; fi
    "$python" main_pretrain.py --data_path "$output/pictures/labels.csv" --output_dir "$output/$name" --resume auto --recipe paper \
        --model mae_vit_tiny_patch16 --input_size 96 --batch_size 32 --epochs 20 --warmup_epochs 3 --blr 4e-3 \
        --norm_pix_loss --crop_min 0.5 --vis_epochs 0 --num_workers 1 "$@"
}

prepare() {  # TASK: its data and its flags, the same for all rows
    flags=(--input_size 96 --num_workers 1 --opt adamw --weight_decay 0.05 --bias_lr_factor 1)
    local gentle=(--lr 1e-3 --layer_decay 0.75 --drop_path 0)
    case "$1" in
        reid)
            "$python" -m demo.reid --output "$output/veri" --size 96 --train_ids 60 --test_ids 40 --seed 0
            flags+=(--data_path "$output/veri" --batch_size 32 --epochs 20 --warmup_epochs 3 --lr 5e-4 --jpm --jpm_shift 5) ;;
        attr)
            "$python" -m demo.pool --output "$output/attr" --num_images 1600 --size 96 --seed 0
            flags+=(--data_path "$output/attr/labels.csv" --attr_categories colour body --attr_split val --batch_size 8 --epochs 6 --warmup_epochs 1 "${gentle[@]}" --head_lr_factor 10 \
                "${teacher[@]}") ;;
        fgvc)
            "$python" -m demo.pool --output "$output/cars" --num_images 1800 --size 120 --seed 2
            flags+=(--data_path "$output/cars/labels.csv" --label_column make --batch_size 16 --epochs 8 --warmup_epochs 1 "${gentle[@]}" --no-auto_augment) ;;
        seg)
            "$python" -m demo.seg --output "$output/parts" --num_images 300 --size 96 --seed 0
            flags+=(--data_path "$output/parts" --stride 8 --decoder naive --batch_size 4 --epochs 7 \
                --warmup_epochs 0.5 --lr 1e-3 --head_lr_factor 5 --min_lr_ratio 0.01 --clip_grad 1 --resize_range 0.9 1.3 --no-distort) ;;
        *) echo "task '$1': choose reid, attr, fgvc or seg" >&2; exit 2 ;;
    esac
}

for task in ${TASKS:-reid attr fgvc seg}; do
    for row in ${ROWS:-cgd mae random}; do
        case "$row" in
            cgd) pretrain cgd "${teacher[@]}"; start=(--finetune "$output/cgd/encoder.safetensors") ;;
            mae) pretrain mae --no_distill; start=(--finetune "$output/mae/encoder.safetensors") ;;
            random) start=(--model vit_tiny_patch16) ;;
            *) echo "row '$row': choose cgd, mae or random" >&2; exit 2 ;;
        esac
        prepare "$task"
        for seed in ${SEEDS:-0 1 2}; do
            echo "== $task, $row, seed $seed"
            "$python" main_finetune.py --task "$task" --output_dir "$output/${task}_${row}_$seed" --seed "$seed" --resume auto \
                "${start[@]}" "${flags[@]}" --report "$@"
        done
        if [ "$task" = reid ] && [ "$row" != random ]; then  # before any label
            "$python" main_finetune.py --task reid --eval --data_path "$output/veri" --output_dir "$output/reid_${row}_as_is" \
                --input_size 96 "${start[@]}"
        fi
    done
done
"$python" - "$output" <<'PY'
import json, statistics, sys
from pathlib import Path
shown = {"reid": ("mAP", "R1"), "attr": ("mA", "accuracy", "F1"), "fgvc": ("top1", "top5"), "seg": ("mIoU", "parts_mIoU", "mAcc")}
for task, names in shown.items():
    for row in ("cgd", "mae", "random"):
        files = sorted(Path(sys.argv[1]).glob(f"{task}_{row}_[0-9]*/metrics.json"))
        runs = [json.loads(file.read_text()) for file in files]
        if runs:
            print(task, row, {n: [round(100 * run[n], 1) for run in runs] + [f"mean {100 * statistics.mean(run[n] for run in runs):.1f}"]
                              for n in names})
PY
