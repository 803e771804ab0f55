#!/usr/bin/env bash
# Install what the tests need and run them: about 17 minutes on 2 cores.
# Usage: bash scripts/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest "$@"
