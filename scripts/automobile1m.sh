#!/usr/bin/env bash
# From folders of public sources to data/automobile1m: a million curated images and their texts. docs/DATA.md
# says what each source is and how to obtain it; nothing is downloaded here. A missing source is skipped.
# Usage: [GPUS=8] [DRY_RUN=1] bash scripts/automobile1m.sh [SOURCES] [OUTPUT]
#        (default: data/sources data/automobile1m; DRY_RUN=1 prints the commands and runs none)
#   ATTRIBUTES="a.csv b.csv"   tables of makes, models, colours for main_describe.py
#   TARGET_SIZE=1000000
set -euo pipefail
cd "$(dirname "$0")/.."
sources="${1:-data/sources}"
output="${2:-data/automobile1m}"
python="${PYTHON:-python}"
gpus="${GPUS:-1}"
lists="$output/lists"
pools=()
excludes=()

run() {
    printf '+ %s\n' "$*"
    if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}

pool() {  # NAME FOLDER HOW_TO_OBTAIN
    if [ -d "$sources/$2" ]; then
        pools+=(--pool "$1=$sources/$2")
    else
        echo "skipped $1: no folder $sources/$2. $3"
    fi
}

exclude() {  # NAME FOLDER
    if [ -d "$sources/$2" ]; then excludes+=(--exclude "$1=$sources/$2"); fi
}

listed() {  # NAME BENCHMARK FOLDER HOW_TO_OBTAIN: train and test images share a folder, lists part them
    if [ ! -d "$sources/$3" ]; then
        echo "skipped $1: no folder $sources/$3. $4"
        return
    fi
    for split in train test; do
        run "$python" -m datasets.benchmarks --name "$2" --root "$sources/$3" --split "$split" \
            --output "$lists/$1_$split.txt"
    done
    pools+=(--pool "$1=$lists/$1_train.txt")
    excludes+=(--exclude "$1=$lists/$1_test.txt")
}

echo "== 1/3  sources in $sources"
pool veri VeRi/image_train "By e-mail from the authors: https://vehiclereid.github.io/VeRi/"
exclude veri_query VeRi/image_query
exclude veri VeRi/image_test
listed vehicleid VehicleID VehicleID_V1.0 "On request: https://pkuml.org/resources/pku-vehicleid.html"
listed veri_wild VERI-Wild VERI-Wild "Signed agreement: https://github.com/PKU-IMRE/VERI-Wild"
listed vehicle1m Vehicle-1M Vehicle-1M "Signed agreement: http://www.nlpr.ia.ac.cn/iva/homepage/jqwang/Vehicle1M.htm"
pool cityflow AIC21_Track2_ReID/image_train "AI City Challenge agreement: https://www.aicitychallenge.org"
exclude cityflow_query AIC21_Track2_ReID/image_query
exclude cityflow AIC21_Track2_ReID/image_test
pool vric VRIC/train_images "On request: https://qmul-vric.github.io"
exclude vric_probe VRIC/probe_images
exclude vric VRIC/gallery_images
listed compcars CompCars CompCars/data "Agreement: http://mmlab.ie.cuhk.edu.hk/datasets/comp_cars/"
listed compcars_sv CompCars-surveillance CompCars/sv_data "Agreement: http://mmlab.ie.cuhk.edu.hk/datasets/comp_cars/"
pool stanford_cars StanfordCars/cars_train "See docs/DATA.md, Stanford Cars."
exclude stanford_cars StanfordCars/cars_test
exclude partimagenet_val PartImageNet/images/val
exclude partimagenet PartImageNet/images/test
pool vmmrdb VMMRdb "See docs/DATA.md, VMMRdb."
pool dvm_car DVM-CAR "See docs/DATA.md, DVM-CAR."
pool mio_tcd MIO-TCD/train "See docs/DATA.md, MIO-TCD."
pool web web "Your own photos, or any further pool: put the folder here."

if [ ${#pools[@]} -eq 0 ]; then
    echo "error: no source in $sources: obtain at least one (docs/DATA.md) and name its folder as above" >&2
    exit 2
fi
if [ ${#excludes[@]} -eq 0 ]; then
    echo "warning: no test split in $sources: nothing can be compared with, so leaks will stay" >&2
fi

echo "== 2/3  curating"
launch=("$python")
if [ "$gpus" -gt 1 ]; then launch=(torchrun --standalone "--nproc_per_node=$gpus"); fi
run "${launch[@]}" main_curate.py "${pools[@]}" ${excludes[@]+"${excludes[@]}"} --output "$output" \
    --target_size "${TARGET_SIZE:-1000000}" --stratify source --vehicle_filter --clip_model ViT-L-14 --clip_pretrained openai

echo "== 3/3  describing"
read -r -a attributes <<< "${ATTRIBUTES:-}"
bank=()
if [ ${#attributes[@]} -gt 0 ]; then
    run "$python" main_describe.py --attributes "${attributes[@]}" --images "$output" --output "$output/texts"
    bank=(--text_bank "$output/texts" --kl_weight 0.05)  # at weight 0, the default, a bank is only logged
else
    echo "skipped: no ATTRIBUTES given, so training uses the built-in vocabulary"
fi

accum_iter=$((4096 / (256 * gpus)))  # an update sees 4096 images
if [ "$accum_iter" -lt 1 ]; then accum_iter=1; fi
echo "Done. Pre-train with:"
echo "torchrun --nproc_per_node=$gpus main_pretrain.py --batch_size 256 --model mae_vit_base_patch16 --mask_ratio 0.75 \\"
echo "    --epochs 400 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --accum_iter $accum_iter --norm_pix_loss \\"
echo "    --data_path $output ${bank[*]-}"
