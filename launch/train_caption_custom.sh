#!/usr/bin/env bash
# BLIP base on your own images and captions: copy run_configs/caption_custom.yaml, and give its paths there.
#   bash launch/train_caption_custom.sh --cfg-path my_captions.yaml
# Run it again to resume. HOSTFILE=hosts trains on several machines, RANKS=4 on four GPUs (launch/train.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"
train caption_custom.yaml "$@"
