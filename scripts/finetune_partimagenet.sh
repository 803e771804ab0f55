#!/usr/bin/env bash
# Vehicle parts of PartImageNet with SETR. Usage:
#   bash scripts/finetune_partimagenet.sh CHECKPOINT PARTS [car_parts|car_bicycle|vehicle_parts] [FLAGS of main_finetune.py]
#   CHECKPOINT: encoder.pth of CGD-MAE, or any encoder of docs/FINETUNE.md
#   PARTS: folder of either release of PartImageNet (it is converted to OUTPUT_parts first), or one converted with this ROW
# Published mIoU | mAcc, ViT-B/16 (VehicleMAE's table; which classes, decoder, crop and length it used is not public, so no
# row below is said to be it, and with background or without is not known either: both are printed):
#   VehicleMAE 73.29 | 80.22, MoCo v3 73.17 | 78.60, MAE on ImageNet-1k 69.54 | 75.36, MAE on its vehicles 69.00 | 75.36,
#   DINO 68.43 | 73.37, iBOT 66.03 | 71.06, random weights 49.36 | 59.22
# PartImageNet's images are ImageNet training images: encoders of ImageNet-1k have seen them.
# Rows are label spaces: car_parts (3 parts), car_bicycle (7), vehicle_parts (14); the background besides. All: SETR-PUP, crop
# 512, learning rate 0.001 (heads 0.01), 20,000 updates of 16. --decoder mla or naive are the variants.
# Not run here (the set is not at hand). By arithmetic, not measured: 1 TFLOP an image in training, 3 hours at 30 TFLOP/s.
# Environment: GPUS (1), PYTHON (python), UPDATES (20000), OUTPUT (runs/partimagenet_ROW). The batch of 16 is shared.
SET=PartImageNet sign="classes.json train.json annotations" rows="car_parts car_bicycle vehicle_parts" batch=16 gpus="${GPUS:-1}"
source "$(dirname "$0")/recipe.sh"
if [ ! -f "$data/classes.json" ]; then
    "${PYTHON:-python}" -m tools.convert_partimagenet --input "$data" --output "${output}_parts" --label_space "$row"
    data="${output}_parts"
fi
[ -d "$data/images/train" ] || stop "$data has no images/train"
images="$(find -L "$data/images/train" -type f | wc -l)"
(( images >= batch )) || stop "$data/images/train holds $images files, a batch needs $batch"
updates="$(( images / batch ))"  # of an epoch
launch --task seg --input_size 512 --epochs "$(( (${UPDATES:-20000} + updates - 1) / updates ))" \
    --decoder pup --opt sgd --lr 0.001 --head_lr_factor 10 --weight_decay 0 --min_lr_ratio 0.1 --seed 0
