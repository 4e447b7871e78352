#!/usr/bin/env bash
# Runs all checks on a machine that has only Python: own virtual environment, lint, types, tests.
#   bash tests/run.sh [PYTEST ARGUMENTS]     e.g. bash tests/run.sh tests/config/test_run.py -k unknown
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
install_blipds "[test]"
cd "$root"

echo "== what the tests of NVMe offload, of two machines and of the report run on"
wanted=()
[ -e /usr/include/libaio.h ] || wanted+=(libaio-dev)
command -v c++ >/dev/null || wanted+=(g++)
command -v ip >/dev/null || wanted+=(iproute2)
command -v sshd >/dev/null || [ -x /usr/sbin/sshd ] || wanted+=(openssh-server)
command -v pdsh >/dev/null || wanted+=(pdsh)
command -v chromium >/dev/null || wanted+=(chromium)
command -v chromedriver >/dev/null || wanted+=(chromium-driver)
if [ ${#wanted[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        { apt-get update && apt-get install -y --no-install-recommends "${wanted[@]}"; } >/dev/null ||
            echo "apt-get cannot install ${wanted[*]}: the tests say what did not run"
    else
        echo "missing ${wanted[*]}, and only root with apt-get installs: the tests say what did not run"
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
if [ $# -gt 0 ]; then
    exec python -m pytest --durations=25 "$@"
fi
# Two files at a time, in the order of tests/conftest.py. A test that fails beside another may have lacked a core, and
# tests with deadlines do: what failed must pass alone.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25 || {
    status=$?
    [ $status = 1 ] || exit $status  # not that tests failed: there are tests that did not run
    echo "== pytest, what failed, alone"
    python -m pytest --last-failed --last-failed-no-failures none
}
