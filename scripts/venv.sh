# Sourced by the other scripts: `source scripts/venv.sh REQUIREMENTS` makes .venv once and activates it.

[[ "${BASH_SOURCE[0]}" != "$0" && -n "${1:-}" ]] || { echo "error: this file is sourced by others: bash scripts/quickstart.sh or scripts/test.sh" >&2; exit 2; }

cpu_builds() {  # torch and torchvision as `NAME==VERSION+cpu`, where an index has both as REQUIREMENTS want them
    local name versions
    for name in torch torchvision; do
        versions=$("$python" -m pip index versions "$name" --retries 1 --timeout 5 "${cpu_index[@]}" 2>/dev/null) || return 0
        "$python" - "$1" "$name" "$versions" <<'PY'
import re, sys
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.version import Version
file, name, versions = sys.argv[1:]
wanted = [Requirement(line) for line in open(file) if re.match(rf"{name}\b(?![\w-])", line)]
found = [v for v in re.findall(r"[\d.]+\+cpu", versions) if all(v in need.specifier for need in wanted)]
print(f"{name}=={max(found, key=Version)}" if found else "none")
PY
    done
}

if ! cmp -s "$1" ".venv/installed/$1"; then
    "${PYTHON:-python3}" -m venv .venv
    python=.venv/bin/python cpu_index=(--extra-index-url https://download.pytorch.org/whl/cpu) builds=none
    if [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && [ ! -e /dev/nvidiactl ]; then
        builds=$(cpu_builds requirements.txt)
    fi
    case "$builds" in
        *none* | "") builds="" cpu_index=() size="about 3 GB to download, 6 GB on disk: 3 to 10 minutes" ;;
        *) size="no NVIDIA card, so torch's CPU build: about 0.4 GB to download, 1.5 GB on disk: 1 to 3 minutes" ;;
    esac
    echo "== installing $1 into .venv, once ($size)"
    "$python" -m pip install --disable-pip-version-check "${cpu_index[@]}" $builds -r "$1"
    mkdir -p .venv/installed && cp "$1" .venv/installed/
fi
source .venv/bin/activate
