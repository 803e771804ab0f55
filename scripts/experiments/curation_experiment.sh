#!/usr/bin/env bash
# Does curation help, and which texts? One small model, the same number of updates, on a random half of an unbalanced pool,
# on its curated half, on all of it, and on all of it with the KL over two banks. docs/RESULTS.md has the outcome.
# Usage: [ROWS="random curated all words classes"] [SEEDS="0 1 2"] [LABEL=make] \
#            bash scripts/experiments/curation_experiment.sh LABELS.csv CLIP.json CLIP.safetensors OUTPUT
#   LABELS.csv: columns path, split (train, val), LABEL, body, class_name; 12 train and val rows of a class are judged
# What is done is not done again; a stopped run goes on.
set -euo pipefail
labels="$(realpath "$1")"
teacher=(--clip_model "$(realpath "$2")" --clip_pretrained "$(realpath "$3")")
mkdir -p "$4"
output="$(realpath "$4")"
cd "$(dirname "$0")/../.."
python="${PYTHON:-python}"
label="${LABEL:-make}"
crowd="$output/crowd"

if [ ! -f "$crowd/metrics.json" ]; then
    "$python" -m scripts.experiments.long_tail --data_path "$labels" --label_column "$label" --output "$crowd"
fi
half=$(( ($(wc -l < "$crowd/pool.csv") - 1) / 2 ))

train() {  # NAME SEED LIST EPOCHS FLAGS...
    local name="$1_$2" seed="$2" list="$3" epochs="$4"
    shift 4
    if [ -f "$output/$name/probe/metrics.json" ]; then return; fi
    echo "== $name"
    "$python" -m tools.reinforce --data_path "$list" --output "$output/cache_$name" --teacher_view full --input_size 128 \
        "${teacher[@]}" ${bank[@]+"${bank[@]}"}
    "$python" main_pretrain.py --data_path "$list" --output_dir "$output/$name" --seed "$seed" --resume auto \
        --model mae_vit_tiny_patch16 --input_size 128 --batch_size 32 --epochs "$epochs" --warmup_epochs "$((epochs / 6))" \
        --blr 4e-3 --norm_pix_loss --crop_min 0.5 --vis_epochs 0 --num_workers 1 \
        --teacher_view full --teacher_cache "$output/cache_$name" "$@"
    "$python" main_linprobe.py --checkpoint "$output/$name/encoder.pth" --data_path "$crowd/balanced.csv" \
        --label_column "$label" body class_name --read_out cls mean --protocol knn --output_dir "$output/$name/probe"
}

for seed in ${SEEDS:-0 1 2}; do
    for row in ${ROWS:-random curated all words classes}; do
        bank=()
        case "$row" in
        random)  # a draw of its own for each seed
            "$python" -c 'import random, sys
head, *rows = open(sys.argv[1], encoding="utf-8")
random.Random(int(sys.argv[2])).shuffle(rows)
sys.stdout.writelines([head, *rows[:int(sys.argv[3])]])' "$crowd/pool.csv" "$seed" "$half" > "$crowd/random_$seed.csv"
            train random "$seed" "$crowd/random_$seed.csv" 12
            ;;
        curated)
            "$python" main_curate.py --pool "crowd=$crowd/pool.csv" --output "$output/half_$seed" --seed "$seed" \
                --target_size "$half" "${teacher[@]}"
            train curated "$seed" "$output/half_$seed" 12
            ;;
        all) train all "$seed" "$crowd/pool.csv" 6 ;;
        words) train words "$seed" "$crowd/pool.csv" 6 --kl_weight 0.4 ;;  # the built-in vocabulary
        classes)
            "$python" main_describe.py --attributes "$labels" --output "$output/bank" "${teacher[@]}"
            bank=(--text_bank "$output/bank")
            train classes "$seed" "$crowd/pool.csv" 6 --kl_weight 0.4
            ;;
        *) echo "unknown row '$row': random, curated, all, words, classes" >&2; exit 2 ;;
        esac
    done
done
