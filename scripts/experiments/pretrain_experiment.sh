#!/usr/bin/env bash
# Is CGD-MAE ahead of plain MAE on photos with labels? The same small model, flags and seeds with and without distillation, then kNN
# and linear probes of the class token. docs/RESULTS.md has the outcome.
# Usage: [ROWS="mae attention"] [SEEDS="0 1 2"] [EPOCHS=30] [LABELS="make body class_name"] \
#            bash scripts/experiments/pretrain_experiment.sh LABELS.csv CLIP.json CLIP.safetensors OUTPUT [FLAGS of main_pretrain.py]
#   LABELS.csv: columns path, split (train, val) and LABELS. A row is mae, or a reading (attention, cls, mean, decoder)
# 150,000 images a row and seed for 5,000 photos: 40 to 75 minutes on one core. A stopped run goes on, a finished one is kept.
set -euo pipefail
table="$(realpath "$1")"
teacher=(--clip_model "$(realpath "$2")" --clip_pretrained "$(realpath "$3")")
output="$(realpath -m "$4")"
shift 4
mkdir -p "$output"
cd "$(dirname "$0")/../.."
python="${PYTHON:-python}"
epochs="${EPOCHS:-30}"
read -r -a labels <<< "${LABELS:-make body class_name}"
read -r -a rows <<< "${ROWS:-mae attention}"

for row in "${rows[@]}"; do
    case "$row" in
        mae | attention | cls | mean | decoder) ;;
        *) echo "row '$row': choose mae, attention, cls, mean or decoder" >&2; exit 2 ;;
    esac
done
if [ "${rows[*]}" != mae ]; then
    "$python" -m tools.reinforce --data_path "$table" --split train --output "$output/cache" --teacher_view full --input_size 128 \
        "${teacher[@]}"
fi
for seed in ${SEEDS:-0 1 2}; do
    for row in "${rows[@]}"; do
        run="$output/${row}_$seed"
        if [ -f "$run/probe/metrics.json" ]; then continue; fi
        echo "== $row, seed $seed"
        distill=(--context "$row" --teacher_view full --teacher_cache "$output/cache")
        if [ "$row" = mae ]; then distill=(--no_distill); fi
        "$python" main_pretrain.py --data_path "$table" --split train --output_dir "$run" --seed "$seed" --resume auto --recipe paper \
            --model mae_vit_tiny_patch16 --input_size 128 --batch_size 32 --epochs "$epochs" --warmup_epochs "$((epochs / 10))" \
            --blr 2e-3 --norm_pix_loss --crop_min 0.8 --vis_epochs 0 --num_workers 1 "${distill[@]}" "$@"
        "$python" main_linprobe.py --checkpoint "$run/encoder.pth" --data_path "$table" --label_column "${labels[@]}" \
            --read_out cls mean --protocol knn linear --output_dir "$run/probe"
    done
done
"$python" - "$output" "${labels[@]}" <<'PY'
import json, statistics, sys
from pathlib import Path
output, labels = Path(sys.argv[1]), sys.argv[2:]
rows = sorted({file.parts[-3].rsplit("_", 1)[0] for file in output.glob("*_*/probe/metrics.json")}, key=lambda row: row != "mae")
for read_out in ("cls", "mean"):
    for name in (f"{protocol}_{read_out}_{label}_top1" for protocol in ("knn", "linear") for label in labels):
        for row in rows:
            files = sorted(output.glob(f"{row}_[0-9]*/probe/metrics.json"))
            found = [100 * json.loads(file.read_text())[name] for file in files]
            print(f"{name:28} {row:10} mean {statistics.mean(found):5.1f} of", *(f"{value:5.1f}" for value in found))
PY
