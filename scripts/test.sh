#!/usr/bin/env bash
# Install what the tests need and run them: about 5 minutes on 2 idle cores after the install.
# Usage: bash scripts/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements-dev.txt
ruff check .
ruff format --check .
# two files at a time: most of the time goes to starting Python. One thread each, so that they leave each other alone
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest -n 2 --dist loadfile "$@"
