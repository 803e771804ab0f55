# Sourced by the other scripts: `source scripts/venv.sh REQUIREMENTS` makes .venv once and activates it.
if ! cmp -s "$1" .venv/installed.txt; then
    echo "== installing $1 into .venv (once)"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
    cp "$1" .venv/installed.txt
fi
source .venv/bin/activate
