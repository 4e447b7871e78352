#!/usr/bin/env bash
# BLIP large on COCO: the paper's recipe for 8 GPUs (caption_coco_large.yaml says what to change for fewer).
#   bash launch/train_caption_coco_large.sh --options env.cache_root=/data
# Run it again to resume. HOSTFILE=hosts trains on several machines, RANKS=4 on four GPUs (launch/train.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"
train caption_coco_large.yaml "$@"
