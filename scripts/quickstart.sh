#!/usr/bin/env bash
# From nothing to a trained vehicle encoder, offline after the install, on CPU or GPU: about 5 minutes on 2 idle cores after the install.
# Usage: bash scripts/quickstart.sh [FOLDER]      (default: runs/quickstart)
# What was stopped goes on where it was; what is finished is left as it is.
set -euo pipefail
case "${1:-}" in -*) sed -n '2,4s/^# //p' "$0"; exit 2 ;; esac
out="${1:-runs/quickstart}"
if [ -n "${1:-}" ]; then out="$(realpath -m "$1")"; fi
cd "$(dirname "$0")/.."
if [ -f "$out" ]; then echo "$out is a file: name a folder"; exit 2; fi
if [ -f "$out/summary.txt" ]; then
    echo "$out is finished, and nothing was done: another FOLDER starts anew."
    cat "$out/summary.txt"
    exit
fi
source scripts/venv.sh requirements.txt
teacher=(--clip_model "$out/teacher/MiniCLIP.json" --clip_pretrained "$out/teacher/weights.safetensors")
number=0

stage() {  # WORDS FILE: says what comes; false where FILE, which is written last, is there already
    number=$((number + 1))
    echo "== $number/7  $1$([ ! -e "$2" ] || echo ": done before")"
    [ ! -e "$2" ]
}

run() {  # python without the last line, which is for machines; Ctrl-C is python's
    python "$@" | (trap "" INT; sed -u '/^{"/d')
}

if stage "drawing a pool of 2,600 small pictures: vehicles, copies, rubbish, leaked test pictures" "$out/pool/pool.json"; then
    run -m demo.pool --output "$out/pool" --num_images 2600
fi
if stage "training a miniature CLIP on their captions (stands in for the real teacher, a 900 MB download)" "$out/teacher/texts.txt"; then
    run -m tools.train_teacher --data_path "$out/pool/captions.csv" --output "$out/teacher" --epochs 8
fi
if stage "choosing 700 pictures to train on; those of the test and val rows leave the pool, with their copies" "$out/data/report.html"; then
    run main_curate.py --pool "demo=$out/pool/photos" --exclude "test=$out/pool/benchmark" "val=$out/pool/labels.csv" \
        --vehicle_filter --vehicle_prompts "$out/pool/prompts.json" --target_size 700 "${teacher[@]}" --output "$out/data"
fi
if stage "texts from the attributes of the pictures, kept where the pictures show them" "$out/texts/report.html"; then
    run main_describe.py --attributes "$out/pool/labels.csv" --split train --images "$out/pool/labels.csv" "${teacher[@]}" \
        --output "$out/texts"
fi
if stage "pre-training CGD-MAE" "$out/run/encoder.safetensors"; then
    run main_pretrain.py --data_path "$out/data" --output_dir "$out/run" --resume auto --recipe paper --model mae_vit_tiny_patch16 --input_size 96 \
        --batch_size 32 --epochs 20 --warmup_epochs 3 --blr 4e-3 --norm_pix_loss --crop_min 0.5 --vis_epochs 20 --print_freq 21 \
        "${teacher[@]}" --text_bank "$out/texts" --kl_weight 0.05
fi
if stage "what was learned" "$out/run/report.html"; then
    run -m tools.report run "$out/run" --data_path "$out/pool/labels.csv" --label_column body colour viewid --read_out cls
fi
if stage "fine-tuning the encoder to find the same vehicle again, scored before and after" "$out/reid/report.html"; then
    run -m demo.reid --output "$out/veri" --size 96 --train_ids 160 --test_ids 20 --images_per_id 10
    reid=(--task reid --data_path "$out/veri" --finetune "$out/run/encoder.safetensors" --input_size 96)
    if [ ! -f "$out/reid_before/metrics.json" ]; then run main_finetune.py "${reid[@]}" --eval --output_dir "$out/reid_before"; fi
    run main_finetune.py "${reid[@]}" --output_dir "$out/reid" --resume auto --batch_size 32 --epochs 5 --warmup_epochs 0.5 --opt adamw \
        --lr 4e-4 --min_lr_ratio 0.2 --head_lr_factor 10 --layer_decay 0.85 --bias_lr_factor 1 --weight_decay 0.05 --drop_path 0 \
        --triplet_weight 0 --erase 0 --report --before "$out/reid_before/metrics.json" | tee "$out/reid.log"
fi
{
    echo "The same vehicle found again: $(grep " before, .* after" "$out/reid.log")"
    echo "Open $out/run/report.html, $out/data/report.html (what was chosen, and why), $out/texts/report.html and"
    echo "$out/reid/report.html (which vehicles were found). Next: your own photos with --data_path (README.md)."
} | tee "$out/summary.txt"
