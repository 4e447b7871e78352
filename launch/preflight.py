#!/usr/bin/env python
"""Checks several machines before a run, and then starts it.

    python launch/preflight.py --hostfile hosts
    python launch/preflight.py --hostfile hosts -- deepspeed --hostfile hosts launch/finetune.py --cfg-path ...

One line for each check. With a command, its run config, DeepSpeed JSON and port are checked on every host too, and it
is run if nothing failed. Exit status 1 if anything did.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from blipds import cli
from blipds.errors import UserError
from blipds.planning.preflight import run_checks


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hostfile", type=Path, required=True, metavar="FILE", help="lines of NAME slots=N")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="after --: what is run if all is well")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    failed = False
    for check in run_checks(args.hostfile, args.command):
        print(check, flush=True)
        failed |= not check.good
    if failed:
        cli.leave(1)
    if args.command:
        program = shutil.which(args.command[0])
        if program is None:
            raise UserError(f"no such command: {args.command[0]}")
        sys.stdout.flush()
        os.execv(program, args.command)


def command() -> None:
    """`blipds-preflight`."""
    cli.run(main)


if __name__ == "__main__":
    command()
