#!/usr/bin/env bash
# StanfordCars, 196 classes, with TransFG. Usage:
#   bash scripts/finetune_stanfordcars.sh CHECKPOINT CARS [transfg|baseline|cheap] [FLAGS of main_finetune.py]
#   CHECKPOINT: encoder.pth of CGD-MAE, or any encoder of docs/FINETUNE.md
#   CARS: folder with devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat (or car/ or stanford_cars/
#         with them), or with cars_annos.mat and car_ims/
# Published top-1, ViT-B/16 at 448 px (VehicleMAE's table uses TransFG; its size and patches are not said):
#   transfg   stride 12, parts              VehicleMAE 94.5, MAE on its vehicles 91.3, MAE on ImageNet-1k 91.2,
#                                           MoCo v3 91.3, iBOT 81.1, random weights 24.8; TransFG from supervised
#                                           ImageNet-21k 94.8
#   baseline  stride 16, class token alone  ViT from supervised ImageNet-21k 93.7
#   cheap     224 px, stride 16, parts      none
# Not run here (the set is not offered any more). By arithmetic, not measured, on a GPU that does 30 TFLOP/s in bf16:
# transfg (890 GFLOP an image in training) about 80 minutes, baseline (470) 45, cheap (100) 10.
# Environment: GPUS (1), PYTHON (python), OUTPUT (runs/stanfordcars_ROW). The batch of 16 is shared among the GPUS;
# TransFG's own command has 16 on each of four GPUs, 10,000 steps, the same learning rate:
#   GPUS=4 bash scripts/finetune_stanfordcars.sh CHECKPOINT CARS transfg --batch_size 16 --lr 0.03 --epochs 79 --warmup_epochs 4
SET=StanfordCars sign="devkit cars_annos.mat car stanford_cars" rows="transfg baseline cheap" batch=16 gpus="${GPUS:-1}"
source "$(dirname "$0")/recipe.sh"
case "$row" in
    transfg) flags=(--input_size 448 --stride 12) ;;
    baseline) flags=(--input_size 448 --parts off) ;;
    cheap) flags=(--input_size 224) ;;
esac
launch --task fgvc --epochs 20 --warmup_epochs 1 --opt sgd --weight_decay 0 --clip_grad 1 --seed 42 "${flags[@]}"
