#!/usr/bin/env bash
# VeRi-776 attributes (10 colours, 9 types) with VTB. Usage:
#   bash scripts/finetune_var_veri776.sh CHECKPOINT VERI [square|peer] [FLAGS of main_finetune.py]
#   CHECKPOINT: encoder.pth of CGD-MAE, or any encoder of docs/FINETUNE.md
#   VERI: folder with image_train/ image_test/ train_label.xml test_label.xml
# Rows: square  224 px, pixels as in pre-training; what the size of the published runs was is not known
#       peer    256 x 128 px, mean and std 0.5, bilinear position table: VTB's own settings, made for pedestrians
# Published with VTB, ViT-B/16, mA / accuracy / F1 (VehicleMAE's table; text vectors of all-mpnet-base-v2):
#   scratch          84.67 / 80.86 / 84.90      MAE, ImageNet      89.69 / 93.60 / 95.08
#   DINO             89.92 / 91.09 / 93.11      MAE, Autobot1M     90.19 / 94.06 / 95.43
#   iBOT             89.51 / 90.17 / 92.37      VehicleMAE         92.21 / 94.91 / 96.17
#   MoCo v3          90.38 / 93.88 / 95.33
# Text vectors move mA: compare rows of one source only. Here CLIP's (ViT-L-14 openai, a download of 900 MB unless cached);
# for the published source put its [19, 768] matrix, rows in the order that a run prints, into --attr_vectors FILE;
# --clip_pretrained "" takes random vectors.
# Not run here (the set is gated); expected on one 24 GB GPU: under an hour, 12 GB, bf16 or fp16.
# Environment: GPUS (1), PYTHON (python), OUTPUT (runs/var_veri776_ROW). The batch of 128 is shared among the GPUS.
set -euo pipefail
checkpoint="$(realpath "${1:?checkpoint}")"
data="$(realpath "${2:?folder of VeRi-776}")"
row="${3:-square}"
shift $(( $# < 3 ? $# : 3 ))
gpus="${GPUS:-1}"
output="$(realpath -m "${OUTPUT:-runs/var_veri776_$row}")"
case "$row" in
    square) flags=(--input_size 224) ;;
    peer) flags=(--input_size 256,128 --pixel_stats half --pos_resize bilinear) ;;
    *) echo "row '$row': choose square or peer" >&2; exit 2 ;;
esac
if (( 128 % gpus )); then echo "GPUS=$gpus does not divide the batch of 128" >&2; exit 2; fi
vectors=(--clip_model ViT-L-14 --clip_pretrained openai)
for flag in "$@"; do
    case "$flag" in --attr_vectors* | --clip_pretrained*) vectors=() ;; esac
done
cd "$(dirname "$0")/.."
set -x
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node="$gpus" main_finetune.py --task attr \
    --attr_format veri776 --data_path "$data" --finetune "$checkpoint" --output_dir "$output" --resume auto \
    --batch_size "$((128 / gpus))" --epochs 20 --warmup_epochs 5 --opt sgd --lr 8e-3 --weight_decay 1e-4 --drop_path 0.1 \
    --seed 605 --report "${flags[@]}" ${vectors[@]+"${vectors[@]}"} "$@"
