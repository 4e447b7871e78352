#!/usr/bin/env bash
# Runs all checks on a machine that has only Python: own virtual environment, lint, types, tests.
#   bash tests/run.sh [PYTEST ARGUMENTS]     e.g. bash tests/run.sh tests/test_config.py -k unknown
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
install_blipds "[test]"
cd "$root"

# What the test of two machines runs on; without it that test says what is missing
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! (which ip sshd pdsh >/dev/null); then
    echo "== installing iproute2, openssh-server, pdsh"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update && apt-get install -y --no-install-recommends iproute2 openssh-server pdsh; } >/dev/null ||
        echo "they cannot be installed here"
fi

echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== DeepSpeed's compiled parts"
python -m blipds.engine
echo "== pytest"
python -m pytest --durations=10 "$@"
