# Sourced by quickstart.sh, train.sh and tests/run.sh.
#   install_blipds EXTRAS     makes .venv beside the code (once) and installs blipds into it
#                             with EXTRAS, "" or "[test]"
#   free_port                 prints a port that nothing on this machine uses
# BLIPDS_VENV chooses another place; PYTHON another interpreter.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

install_blipds() {
    local venv=${BLIPDS_VENV:-$root/.venv} python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $("$python" --version) is too old; Python 3.10 or later is needed (PYTHON=... chooses one)" >&2
        return 1
    }
    if [ ! -x "$venv/bin/python" ]; then
        echo "== making the virtual environment $venv"
        "$python" -m venv "$venv" || {
            echo "error: python's venv module does not work here; on Debian and Ubuntu: apt-get install python3-venv" >&2
            return 1
        }
    fi
    export PATH="$venv/bin:$PATH"
    echo "== installing blipds and what it needs (several GB the first time, seconds after that)"
    python -m pip install --quiet --disable-pip-version-check -e "$root$1"
}

free_port() {
    python -c 'import socket; probe = socket.socket(); probe.bind(("127.0.0.1", 0)); print(probe.getsockname()[1])'
}
