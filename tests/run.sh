#!/usr/bin/env bash
# Runs all checks on a machine that has only Python: own virtual environment, lint, types, tests.
#   bash tests/run.sh [PYTEST ARGUMENTS]     e.g. bash tests/run.sh tests/test_config.py -k unknown
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
install_blipds "[test]"
cd "$root"

echo "== libaio and a compiler, for the test of NVMe offload"
wanted=()
[ -e /usr/include/libaio.h ] || wanted+=(libaio-dev)
command -v c++ >/dev/null || wanted+=(g++)
if [ ${#wanted[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null ||
            echo "apt-get cannot install ${wanted[*]}: that test will say that it did not run"
    else
        echo "missing ${wanted[*]}, and only root with apt-get installs: that test will say that it did not run"
    fi
fi

echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== DeepSpeed's compiled parts"
python -m blipds.engine --offload
[ ! -e /usr/include/libaio.h ] || python -m blipds.engine --nvme || true  # the test says what is missing
echo "== pytest"
python -m pytest --durations=10 "$@"
