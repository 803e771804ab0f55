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
SET=VeRi-776 sign=train_label.xml rows="square peer" batch=128 gpus="${GPUS:-1}"
source "$(dirname "$0")/recipe.sh"
flags=(--input_size 224)
if [ "$row" = peer ]; then flags=(--input_size 256,128 --pixel_stats half --pos_resize bilinear); fi
vectors=(--clip_model ViT-L-14 --clip_pretrained openai)
for flag in ${more[@]+"${more[@]}"}; do
    case "$flag" in --attr_vectors* | --clip_pretrained*) vectors=() ;; esac
done
launch --task attr --attr_format veri776 --epochs 20 --warmup_epochs 5 --opt sgd --lr 8e-3 --weight_decay 1e-4 --drop_path 0.1 \
    --seed 605 "${flags[@]}" ${vectors[@]+"${vectors[@]}"}
