#!/usr/bin/env bash
# From nothing to a trained vehicle encoder, offline after the install, on CPU or GPU: about 4 minutes on 2 idle cores after the install.
# Usage: bash scripts/quickstart.sh [FOLDER]      (default: runs/quickstart)
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-runs/quickstart}"
source scripts/venv.sh requirements.txt
teacher=(--clip_model "$out/teacher/MiniCLIP.json" --clip_pretrained "$out/teacher/weights.safetensors")

echo "== 1/7  drawing a pool of 2,600 small pictures: vehicles, copies, rubbish, leaked test pictures"
python -m demo.pool --output "$out/pool" --num_images 2600

echo "== 2/7  training a miniature CLIP on their captions (stands in for the real teacher, a 900 MB download)"
if [ ! -f "$out/teacher/texts.txt" ]; then
    python -m tools.train_teacher --data_path "$out/pool/captions.csv" --caption_column short_caption \
        --output "$out/teacher" --epochs 8
fi

echo "== 3/7  choosing 700 pictures to train on; those of the test and val rows leave the pool, with their copies"
python main_curate.py --pool "demo=$out/pool/photos" --exclude "test=$out/pool/benchmark" "val=$out/pool/labels.csv" \
    --vehicle_filter --vehicle_prompts "$out/pool/prompts.json" --target_size 700 "${teacher[@]}" --output "$out/data"

echo "== 4/7  texts from the attributes of the pictures, kept where the pictures show them"
python main_describe.py --attributes "$out/pool/labels.csv" --split train --images "$out/pool/labels.csv" \
    "${teacher[@]}" --output "$out/texts"

echo "== 5/7  pre-training CGD-MAE"
python main_pretrain.py --data_path "$out/data" --output_dir "$out/run" --resume auto \
    --model mae_vit_tiny_patch16 --input_size 96 --batch_size 32 --epochs 20 --warmup_epochs 3 --blr 4e-3 \
    --norm_pix_loss --crop_min 0.5 --vis_epochs 20 --print_freq 21 "${teacher[@]}" \
    --text_bank "$out/texts" --kl_weight 0.05

echo "== 6/7  what was learned"
python -m tools.report "$out/run" --data_path "$out/pool/labels.csv" --label_column body colour viewid --read_out cls

echo "== 7/7  fine-tuning the encoder to find the same vehicle again, scored before and after"
python -m demo.reid --output "$out/veri" --size 96 --train_ids 40 --test_ids 20 --images_per_id 10
reid=(--task reid --data_path "$out/veri" --finetune "$out/run/encoder.safetensors" --input_size 96)
python main_finetune.py "${reid[@]}" --eval --output_dir "$out/reid_before"
python main_finetune.py "${reid[@]}" --output_dir "$out/reid" --resume auto --batch_size 16 --epochs 8 --warmup_epochs 1 \
    --opt adamw --lr 5e-4 --weight_decay 0.05 --bias_lr_factor 1 --layer_decay 0.75 --drop_path 0 --triplet_weight 0.1 \
    --jpm --jpm_shift 5 --report
echo "Open $out/run/report.html, $out/data/report.html (what was chosen, and why), $out/texts/report.html and"
echo "$out/reid/report.html (which vehicles were found)."
echo "Next: your own photos with --data_path (README.md)."
