# Sourced by scripts/finetune_*.sh, which set `rows` (the first is the default), `batch`, `sign` (what a folder of the set
# holds, patterns apart by blanks: one of them is enough) and SET (its name): reads CHECKPOINT FOLDER [ROW] [FLAGS], checks them.
# Then: checkpoint, data, row, gpus, output, more (FLAGS); `launch FLAGS` starts main_finetune.py with them.
set -euo pipefail

stop() {
    echo "error: $1" >&2
    exit 2
}

usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"; }

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
if (( $# < 2 )); then
    usage >&2
    stop "give CHECKPOINT and the folder of $SET: bash $0 encoder.pth FOLDER"
fi
home="$(cd "$(dirname "$0")/.." && pwd)"
checkpoint="$1"
if [ -e "$checkpoint" ]; then
    checkpoint="$(realpath -- "$checkpoint")"
elif [[ "$checkpoint" != *://* ]] && ! grep -qF "\"$checkpoint\":" "$home/util/registry.json"; then
    stop "CHECKPOINT $checkpoint is no file, no address, and no name of python -m tools.checkpoint list"
fi
[ -d "$2" ] || stop "$2 is no folder: give the folder of $SET"
data="$(realpath -- "$2")"
found=""
for pattern in $sign; do
    if compgen -G "$data/$pattern" > /dev/null; then found=1; fi
done
[ -n "$found" ] || stop "$data is not $SET: it holds none of $sign"
row="${rows%% *}"
shift 2
if (( $# )) && [[ "$1" != --* ]]; then
    row="$1"
    shift
fi
[[ " $rows " == *" $row "* ]] || stop "row '$row': choose among $rows"
more=("$@")
output="$(realpath -m -- "${OUTPUT:-runs/$(basename "$0" .sh | sed s/finetune_//)_$row}")"
cd "$home"

launch() {  # FLAGS of main_finetune.py, of the row; those of the command line come after them
    [[ "$gpus" =~ ^[1-9][0-9]*$ ]] || stop "GPUS=$gpus: give a number of GPUs"
    (( batch % gpus == 0 )) || stop "GPUS=$gpus does not divide the batch of $batch"
    set -x
    exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node="$gpus" main_finetune.py \
        --data_path "$data" --finetune "$checkpoint" --output_dir "$output" --resume auto \
        --batch_size "$(( batch / gpus ))" --report "$@" ${more[@]+"${more[@]}"}
}
