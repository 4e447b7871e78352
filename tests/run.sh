#!/usr/bin/env bash
# Runs all checks on a machine that has only Python: own virtual environment, lint, types, tests.
#   bash tests/run.sh [PYTEST ARGUMENTS]     e.g. bash tests/run.sh tests/test_config.py -k unknown
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
install_blipds "[test]"
cd "$root"

echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== DeepSpeed's compiled parts"
python -m blipds.engine
echo "== pytest"
python -m pytest --durations=10 "$@"
