#!/usr/bin/env bash
# From a fresh machine to a trained captioner: drawn shapes, a tiny BLIP, two ranks (or all GPUs), two minutes.
#   bash launch/quickstart.sh [KEY=VALUE ...]     options for the run config, e.g. run.max_iters=1200
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_blipds ""
cd "$root"

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu # else DeepSpeed warns that it found nothing else
echo "== DeepSpeed's compiled parts"
python -m blipds.engine

ranks=$((gpus > 0 ? gpus : 2))
job=quickstart-$(date +%Y%m%d-%H%M%S)-$$
echo "== training on $ranks ranks ($gpus GPUs)"
deepspeed --quiet --master_port "$(free_port)" --num_accelerators "$ranks" launch/finetune.py \
    --cfg-path run_configs/shapes_tiny.yaml --ds-config ds_configs/zero0.json \
    --options run.job_id="$job" "$@"

echo "== what came out"
python - "output/shapes_tiny/$job" <<'PYTHON'
import json
import sys
from pathlib import Path

from blipds.data.shapes import make_scene

run_dir = Path(sys.argv[1])
results = next(run_dir.glob("results/test_epoch*.json"))
captions = {entry["image_id"]: entry["caption"] for entry in json.loads(results.read_text())}
scenes = {scene_id: make_scene(scene_id) for scene_id in captions}
wrong = [scene_id for scene_id, caption in captions.items() if caption not in scenes[scene_id].right_captions()]
right = [scene_id for scene_id in captions if scene_id not in wrong]

print(f"""report       {run_dir}/report.html
captions     {results}
samples      {run_dir}/samples
checkpoint   {run_dir}/checkpoints/best
curves       tensorboard --logdir {run_dir.parent}

{len(right)} of {len(captions)} captions ({len(right) / len(captions):.1%}) are right in every word about colour, shape,
size, place and relation, on combinations that training never showed.""")
for scene_id in right[:3]:
    print(f"  right: {captions[scene_id]}")
for scene_id in wrong[:1]:
    print(f"  wrong: {captions[scene_id]}\n     it is {scenes[scene_id].captions()[0]}")
PYTHON
