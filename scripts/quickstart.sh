#!/usr/bin/env bash
# From nothing to a trained vehicle encoder, offline after the install, on CPU or GPU: about 8 minutes on 2 cores after the install.
# Usage: bash scripts/quickstart.sh [FOLDER]      (default: runs/quickstart)
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-runs/quickstart}"
source scripts/venv.sh requirements.txt

echo "== 1/4  drawing 3,000 small vehicle pictures"
python -m datasets.demo --output "$out/demo" --num_images 3000 --size 96

echo "== 2/4  training a miniature CLIP on their captions (stands in for the real teacher, a 900 MB download)"
if [ ! -f "$out/teacher/texts.txt" ]; then
    python -m tools.train_teacher --data_path "$out/demo/labels.csv" --caption_column short_caption \
        --output "$out/teacher" --epochs 8
fi

echo "== 3/4  pre-training CGD-MAE against it"
python main_pretrain.py --data_path "$out/demo/labels.csv" --split train --output_dir "$out/run" --resume auto \
    --model mae_vit_tiny_patch16 --input_size 96 --batch_size 32 --epochs 7 --warmup_epochs 1 --blr 4e-3 \
    --norm_pix_loss --crop_min 0.5 --vis_epochs 7 --print_freq 35 \
    --clip_model "$out/teacher/MiniCLIP.json" --clip_pretrained "$out/teacher/weights.safetensors" \
    --text_bank "$out/teacher/texts.txt"

echo "== 4/4  what was learned"
python -m tools.report "$out/run" --data_path "$out/demo/labels.csv" --label_column body colour viewid --pool cls
echo "Open $out/run/report.html. Next: your own photos with --data_path (README.md)."
