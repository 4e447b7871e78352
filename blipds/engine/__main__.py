"""Compiles what DeepSpeed needs on the device at hand, so that later starts are quick."""

import argparse
import sys

from blipds.chatter import CHATTER
from blipds.engine.ops import prepare_nvme, prepare_ops
from blipds.errors import UserError

parser = argparse.ArgumentParser(prog="python -m blipds.engine", description=__doc__)
parser.add_argument("--offload", action="store_true", help="what offloading to the host needs, too")
parser.add_argument("--nvme", action="store_true", help="what offloading to NVMe needs, too (libaio's headers)")
arguments = parser.parse_args()

with CHATTER:
    prepare_ops(offload=False)
    if arguments.offload:
        prepare_ops(offload=True)
    if arguments.nvme:
        try:
            prepare_nvme()
        except UserError as error:
            sys.exit(f"error: {error}")
