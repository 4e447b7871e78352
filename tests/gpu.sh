#!/usr/bin/env bash
# Proves and measures blipds on a GPU, in less than ten minutes.
#   bash tests/gpu.sh [SECTION ...] [--output FOLDER] [--dry]     --help explains them
#   WHEELS=DIR bash tests/gpu.sh     on a machine with torch, timm and transformers, without a network: the wheels of DIR
#                                    (../shared/gpu/wheels.sh packs them) go into a temporary folder, and nothing else
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$root:$root/tests"
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --target "$scratch/site" "$WHEELS"/*.whl
    export PYTHONPATH="$scratch/site:$PYTHONPATH" PATH="$scratch/site/bin:$PATH"
    export TORCH_EXTENSIONS_DIR="$scratch/ops" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"
    export TRITON_CACHE_DIR="$scratch/triton"
fi
cd "$root"
"$python" -m on_gpu.run "$@"
