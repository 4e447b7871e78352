#!/usr/bin/env bash
# From a fresh machine to a trained captioner: drawn shapes, a tiny BLIP, two ranks (or all GPUs), a few minutes.
#   bash launch/quickstart.sh [KEY=VALUE ...]     options for the run config, e.g. run.max_epoch=2
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_blipds ""
cd "$root"

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu # else DeepSpeed warns that it found nothing else
echo "== DeepSpeed's compiled parts"
python -m blipds.engine

ranks=$((gpus > 0 ? gpus : 2))
job=quickstart-$(date +%Y%m%d-%H%M%S)
echo "== training on $ranks ranks ($gpus GPUs)"
deepspeed --quiet --master_port "$(free_port)" --num_accelerators "$ranks" launch/finetune.py \
    --cfg-path run_configs/shapes_tiny.yaml --ds-config ds_configs/zero2.json \
    --options run.job_id="$job" "$@"

echo "== what came out"
python - "output/shapes_tiny/$job" <<'PYTHON'
import json
import sys
from pathlib import Path

from blipds.config.run import load_run_config
from blipds.data.datasets import build_dataset
from blipds.scoring.metrics import score_held_out_reference

run_dir = Path(sys.argv[1])
config, _ = load_run_config(run_dir / "config.yaml")
dataset = build_dataset("shapes_caption", config, "test", training=False)
references = {record.image_id: list(record.captions) for record in dataset.records}
results = next(run_dir.glob("results/test_epoch*.json"))
captions = {entry["image_id"]: entry["caption"] for entry in json.loads(results.read_text())}
lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
cider = next(line["CIDEr"] for line in reversed(lines) if line.get("split") == "test")
human = score_held_out_reference(references).values["CIDEr"]
print(f"CIDEr of {len(captions)} drawings with combinations that training never showed: {cider:.2f}")
print(f"CIDEr of one given caption against the other four: {human:.2f}\n")
for image_id in list(captions)[:5]:
    print(f"  {captions[image_id]}\n      given: {references[image_id][0]}")
print(f"""
captions     {results}
samples      {run_dir}/samples
checkpoint   {run_dir}/checkpoints/best
curves       tensorboard --logdir {run_dir.parent}""")
PYTHON
