#!/usr/bin/env bash
# Does distillation help to find vehicles? Plain MAE, CGD-MAE as the paper has it (before) and with a whitened teacher (cgd), the same flags and
# seeds; frozen and fine-tuned, beside teacher, colour histogram and random weights. docs/RESULTS.md has the outcome.
# Usage: [ROWS="mae before cgd"] [SEEDS="0 1 2"] bash scripts/experiments/claim.sh POOL REID.csv LABELS.csv PARTS CLIP.json CLIP.safetensors OUTPUT [FLAGS]
#   POOL: photos to pre-train on. REID.csv: path, pid, camid, split, type. LABELS.csv: path, split, LABELS (default "make body class_name").
#   PARTS: a folder as for --task seg. FLAGS: of main_pretrain.py.
# A row and seed takes about 45 minutes of pre-training and 15 of fine-tuning on one core for 5,000 photos. Start it several times with other SEEDS to
# use more cores. A stopped run goes on, a finished one is kept; the tables at the end are of what is there.
set -euo pipefail
if (( $# < 7 )); then
    sed -n 's/^# \(Usage.*\)/\1/p' "$0" >&2
    exit 2
fi
pool="$(realpath "$1")" reid="$(realpath "$2")" labels="$(realpath "$3")" parts="$(realpath "$4")"
clip="$(realpath "$5")" weights="$(realpath "$6")" output="$(realpath -m "$7")"
shift 7
mkdir -p "$output"
cd "$(dirname "$0")/../.."
python="${PYTHON:-python}"
read -r -a columns <<< "${LABELS:-make body class_name}"

tune() {  # NAME SEED START...: the baseline of TransReID, AdamW, 20 epochs
    local name="$1" seed="$2"
    shift 2
    if [ -f "$output/tuned/$name/model.pth" ]; then return; fi
    "$python" main_finetune.py --task reid --data_path "$reid" --input_size 128 --num_instances 2 --batch_size 64 --epochs 20 --warmup_epochs 2 \
        --opt adamw --lr 3e-4 --weight_decay 0.05 --layer_decay 0.75 --erase 0.5 --clip_grad 1 --num_workers 1 --seed "$seed" \
        --output_dir "$output/tuned/$name" --resume auto "$@"
}

for seed in ${SEEDS:-0 1 2}; do
    for row in ${ROWS:-mae before cgd}; do
        case "$row" in
            mae) flags=(--no_distill) ;;
            before) flags=(--teacher_norm none) ;;
            cgd) flags=() ;;
            *) echo "row '$row': choose mae, before or cgd" >&2; exit 2 ;;
        esac
        if [ "$row" != mae ]; then flags+=(--clip_model "$clip" --clip_pretrained "$weights"); fi
        if [ ! -f "$output/${row}_$seed/encoder.safetensors" ]; then
            "$python" main_pretrain.py --data_path "$pool" --output_dir "$output/${row}_$seed" --recipe small --seed "$seed" --resume auto \
                --vis_epochs 0 --num_workers 1 "${flags[@]}" "$@"
        fi
        tune "${row}_$seed" "$seed" --finetune "$output/${row}_$seed/encoder.safetensors"
    done
    tune "random_$seed" "$seed" --model vit_tiny_patch16
done

frozen=() tuned=()
for row in mae before cgd random; do
    name=checkpoint-last.pth
    if [ "$row" = mae ]; then name=encoder.safetensors; fi
    files=("$output/${row}"_[0-9]*/"$name") models=("$output/tuned/${row}"_[0-9]*/model.pth)
    if [ -f "${files[0]}" ]; then frozen+=("$row=$(IFS=,; echo "${files[*]}")"); fi
    if [ -f "${models[0]}" ]; then tuned+=("$row=$(IFS=,; echo "${models[*]}")"); fi
done
"$python" -m tools.compare --encoders "${frozen[@]}" "teacher=open_clip:$clip@$weights" histogram random=random:vit_tiny_patch16 --input_size 128 \
    --reid "$reid" --group type --labels "$labels" --label_column "${columns[@]}" --protocol knn linear --parts "$parts" --output "$output/frozen"
"$python" -m tools.compare --encoders "${tuned[@]}" histogram --input_size 128 --reid "$reid" --group type --output "$output/fine-tuned"
