#!/usr/bin/env bash
# Measures blipds and, beside it, transformers' BLIP with the same weights.
#   bash tests/benchmarks/run.sh [BENCHMARK ...] [OPTIONS]     --help explains them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch/environment.sh"
install_blipds "[bench]"
cd "$root"
PYTHONPATH="$root/tests${PYTHONPATH:+:$PYTHONPATH}" python -m benchmarks.run "$@"
