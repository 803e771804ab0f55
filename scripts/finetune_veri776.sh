#!/usr/bin/env bash
# VeRi-776 re-identification with TransReID. Usage:
#   bash scripts/finetune_veri776.sh CHECKPOINT VERI [baseline|transreid|transreid_star] [FLAGS of main_finetune.py]
#   CHECKPOINT: encoder.pth of CGD-MAE, or any encoder of docs/FINETUNE.md
#   VERI: folder with image_train/ image_query/ image_test/, and keypoint_train.txt, keypoint_test.txt for SIE by view
#         (without them the rows know the cameras only, and say so)
# Published, ViT-B/16 at 256 px, 120 epochs, no re-ranking, mAP | R1 (TransReID starts from supervised ImageNet-21k):
#   baseline        stride 16, no JPM, no SIE     TransReID's ViT baseline   79.0 | 96.6
#   transreid       stride 16, JPM, SIE cam+view  VehicleMAE (this recipe)   85.6 | 97.9 best epoch, 83.4 | 96.7 rerun by others
#   transreid_star  stride 12, JPM, SIE cam+view  TransReID*                 82.1 | 97.4
# Not run here (the set is gated); expected on one 24 GB GPU: 3 to 5 hours, 8 GB (star: 8 hours, 14 GB), bf16 or fp16.
# Environment: GPUS (1), PYTHON (python), OUTPUT (runs/veri776_ROW). The batch of 64 is shared among the GPUS.
set -euo pipefail
checkpoint="$(realpath "${1:?checkpoint}")"
data="$(realpath "${2:?folder of VeRi-776}")"
row="${3:-transreid}"
shift $(( $# < 3 ? $# : 3 ))
gpus="${GPUS:-1}"
output="$(realpath -m "${OUTPUT:-runs/veri776_$row}")"
cd "$(dirname "$0")/.."
views=(--sie_view)
if [ ! -f "$data/keypoint_train.txt" ] || [ ! -f "$data/keypoint_test.txt" ]; then
    views=()
    echo "no keypoint_train.txt and keypoint_test.txt in $data: SIE knows the cameras only, not the views" >&2
fi
case "$row" in
    baseline) flags=(--stride 16 --lr 0.008) ;;
    transreid) flags=(--stride 16 --lr 0.01 --jpm --jpm_shift 8 --sie_camera ${views[@]+"${views[@]}"}) ;;
    transreid_star) flags=(--stride 12 --lr 0.01 --jpm --jpm_shift 8 --sie_camera ${views[@]+"${views[@]}"}) ;;
    *) echo "row '$row': choose baseline, transreid or transreid_star" >&2; exit 2 ;;
esac
if (( 64 % gpus )); then echo "GPUS=$gpus does not divide the batch of 64" >&2; exit 2; fi
set -x
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node="$gpus" main_finetune.py --task reid \
    --format veri776 --data_path "$data" --finetune "$checkpoint" --output_dir "$output" --resume auto \
    --input_size 256 --batch_size "$((64 / gpus))" --num_instances 4 --epochs 120 --warmup_epochs 5 \
    --weight_decay 1e-4 --drop_path 0.1 --seed 1234 --report "${flags[@]}" "$@"
